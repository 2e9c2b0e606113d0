"""How results are written: part files while an evaluation runs, then the folder that results.py reads.

Each rank appends part files of its own; an evaluation that was stopped or killed goes on from them. Rank 0 merges them
when all videos are scored, and writes the JSON file last.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anal_tools.protocols import Protocol
from datasets.views import view_table
from utils import metrics

PART_SECONDS = 10.0  # a killed evaluation has lost at most this much work
_BLOCK = 256  # videos of which all views are in memory at once while parts are merged


class PartWriter:
    """One rank's share of the results, appended to part files while the evaluation runs."""

    def __init__(
        self, folder: Path, rank: int, *, start: int = 0, videos_per_part: int = 512, dtype: str = "float32"
    ) -> None:
        """`start`: how often this evaluation was started before, so that no earlier part is overwritten."""
        self.folder, self.rank, self.size, self.dtype = folder, rank, videos_per_part, dtype
        self.rows: list[dict[str, Any]] = []
        self.start, self.number, self.flushed = start, 0, time.monotonic()

    def keep(self, item: Any, logits: Any | None) -> None:
        """Remember one video; `item` is a VideoItem, `logits` (V, K) on any device or None for one that failed."""
        row = {"sample": item.sample, "failed": item.failure or "", "repaired": getattr(item, "repaired", "")}
        if logits is not None:
            row["logits"] = logits.float().cpu().numpy().astype(self.dtype)
            row["frames"] = item.plan.frames[item.plan.clip_rows].astype(np.int32)  # (V, T)
            row["boxes"] = item.plan.boxes  # (V, 4)
        self.rows.append(row)
        if len(self.rows) >= self.size or time.monotonic() - self.flushed > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the remembered rows as one part file; a torn file never gets its final name."""
        self.flushed = time.monotonic()
        if not self.rows:
            return
        good = [row for row in self.rows if "logits" in row]
        arrays = {
            "samples": np.array([row["sample"] for row in self.rows], dtype=np.int64),
            "failed": np.array([row["failed"] for row in self.rows], dtype=str),
            "repaired": np.array([row["repaired"] for row in self.rows], dtype=str),
            "logits": np.stack([row["logits"] for row in good]) if good else np.zeros((0, 0, 0), self.dtype),
            "frames": np.stack([row["frames"] for row in good]) if good else np.zeros((0, 0, 0), np.int32),
            "boxes": good[0]["boxes"] if good else np.zeros((0, 4), np.int64),  # of one video, for views.json
        }
        final = self.folder / f"part-{self.start:04d}-{self.rank:04d}-{self.number:06d}.npz"
        temporary = final.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, final)
        self.rows, self.number = [], self.number + 1


def earlier_parts(folder: Path, key: dict[str, Any], videos: int) -> tuple[int, list[dict[str, np.ndarray]]]:
    """What an unfinished evaluation of this name left, if it was the same evaluation; else the folder is emptied.

    Args:
        key: what makes it the same: hashes of weights and list, protocol, precision.
        videos: length of the list.

    Returns:
        How often it was started before, and its complete part files as arrays; no video is in two of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".json").unlink(missing_ok=True)
    note, text = folder / "parts.json", json.dumps(key, sort_keys=True)
    try:
        before = json.loads(note.read_text("utf-8"))
        same, start = before["key"] == text, int(before["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        same, start = False, 0
    seen, parts = np.zeros(videos, bool), []
    for path in [*folder.glob("part-*.tmp"), *sorted(folder.glob("part-*.npz"))]:
        part = _read_part(path, seen) if same and path.suffix == ".npz" else None
        if part is None:
            path.unlink()
        else:
            seen[part["samples"]] = True
            parts.append(part)
    start = start + 1 if same else 0
    _write(note, json.dumps({"key": text, "starts": start}) + "\n")
    return start, parts


def _read_part(path: Path, seen: np.ndarray) -> dict[str, np.ndarray] | None:
    """The arrays of a part file; None if it is damaged or names a video that is not new."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            part = {name: file[name] for name in ("samples", "failed", "logits")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    samples = part["samples"]
    fits = len(samples) == len(part["failed"]) and len(part["logits"]) == int((part["failed"] == "").sum())
    whole = fits and bool(((samples >= 0) & (samples < len(seen))).all()) and len(np.unique(samples)) == len(samples)
    return part if whole and not seen[samples].any() else None


def merge(
    folder: Path,
    ids: Sequence[str],
    labels: np.ndarray,
    summary: dict[str, Any],
    *,
    targets: np.ndarray | None = None,
) -> dict[str, Any]:
    """Join all part files into the final arrays and write the summary.

    Args:
        folder: `results/<name>`.
        ids: path of each of the N videos.
        labels: (N,).
        summary: goes into the JSON file; its protocol says how views are joined.
        targets: (N, K) bool of a list with several labels per video.

    Returns:
        The summary with `counts`, `failures` ({path: reason}) and further metrics.

    Raises:
        RuntimeError: a video is missing or was scored twice; that would be a bug of ours, and no result is written.
    """
    parts = [np.load(path, allow_pickle=False) for path in sorted(folder.glob("part-*.npz"))]
    samples = np.concatenate([part["samples"] for part in parts]) if parts else np.zeros(0, np.int64)
    if not np.array_equal(np.sort(samples), np.arange(len(ids))):
        raise RuntimeError(f"{folder}: {len(samples)} rows for {len(ids)} videos, not each exactly once")
    arrays = _final_arrays(folder, parts, len(ids), len(summary["class_names"]))
    for part in parts:
        for name in ("logits", "frames"):
            arrays[name][part["samples"][part["failed"] == ""]] = part[name]
    protocol = Protocol.from_dict(summary["protocol"])
    scores = score_in_blocks(arrays["logits"], protocol.average, multi_label=targets is not None)
    for array in arrays.values():
        array.flush()
    np.save(folder / "scores.npy", scores.astype(np.float32))
    np.save(folder / "labels.npy", np.asarray(labels, dtype=np.int32))
    (folder / "targets.npy").unlink(missing_ok=True)
    if targets is not None:
        np.save(folder / "targets.npy", np.asarray(targets, dtype=bool))
    ledger = _ledger(parts, ids)
    _write(folder / "ids.txt", "".join(json.dumps(name) + "\n" for name in ids))
    _write(folder / "ledger.jsonl", "".join(json.dumps(row) + "\n" for row in ledger))
    shown = next((part["boxes"] for part in parts if len(part["logits"]) and "boxes" in part), None)
    _write(folder / "views.json", json.dumps(view_table(protocol.spec, shown)) + "\n")
    if targets is None:
        calibration = {"calibration_error": 100 * metrics.calibration_error(scores, labels)}
        summary = summary | {"metrics": summary["metrics"] | calibration}
    summary = summary | _counts(ledger, ids)
    _write(folder.with_suffix(".json"), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    for path in [*folder.glob("part-*.npz"), folder / "parts.json"]:
        path.unlink(missing_ok=True)
    return summary


def _counts(ledger: Sequence[dict[str, Any]], ids: Sequence[str]) -> dict[str, Any]:
    """How many videos were scored, repaired and failed, and why those failed."""
    failed = [row for row in ledger if row["status"] == "failed"]
    counts = {
        "videos": len(ids),
        "scored": len(ids) - len(failed),
        "repaired": len(ledger) - len(failed),
        "failed": len(failed),
        "duplicates": len(ids) - len(set(ids)),
    }
    return {"counts": counts, "failures": {row["path"]: row["reason"] for row in failed}}


def _ledger(parts: Sequence[Any], ids: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each video that failed or was repaired, in list order."""
    rows = []
    for part in parts:
        repaired = part["repaired"] if "repaired" in part else np.full(len(part["failed"]), "")
        for sample, failed, mended in zip(part["samples"].tolist(), part["failed"], repaired, strict=True):
            if failed or mended:
                status, reason = ("failed", str(failed)) if failed else ("repaired", str(mended))
                rows.append({"sample": sample, "path": ids[sample], "status": status, "reason": reason})
    return sorted(rows, key=lambda row: row["sample"])


def _final_arrays(folder: Path, parts: Sequence[Any], videos: int, num_class: int) -> dict[str, Any]:
    """Files logits.npy and frames.npy as arrays in them, filled with what stands for a video that failed."""
    full = [part for part in parts if len(part["logits"])]
    shape, kind = (full[0]["logits"].shape[1:], full[0]["logits"].dtype) if full else ((1, num_class), np.float32)
    frames = full[0]["frames"].shape[1:] if full else (1, 1)
    made = {}
    for name, dtype, rest, fill in (("logits", kind, shape, np.nan), ("frames", np.int32, frames, -1)):
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype=dtype, shape=(videos, *rest))
        array[:] = fill
        made[name] = array
    return made


def score_in_blocks(logits: np.ndarray, average: str, *, multi_label: bool = False) -> np.ndarray:
    """`metrics.video_scores` of many videos, a block of them in memory at a time: (N, V, K) -> (N, K) float64."""
    blocks = [
        metrics.video_scores(logits[start : start + _BLOCK], average, multi_label=multi_label)
        for start in range(0, len(logits), _BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.zeros((0, logits.shape[2]))


def _write(path: Path, text: str) -> None:
    """Write a text file that is either the old or the whole new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, "utf-8", errors="surrogateescape")
    os.replace(temporary, path)
