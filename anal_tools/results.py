"""Result folders: what an evaluation leaves behind, and how to read it back.

`results/<name>/` holds, for the N videos of the list in list order and the V views of the protocol:

* `ids.txt`: one path per line, as the list has it (JSON-quoted, so that any name fits on its line)
* `labels.npy` (N,) int32
* `logits.npy` (N, V, K) float32; the rows of a video that could not be read are NaN
* `scores.npy` (N, K) float32: mean over the views of the softmax
* `frames.npy` (N, V, T) int32: frame ordinals the model saw, -1 where the video could not be read
* `views.json`: for each view its clip, crop box and flip on the first video

and `results/<name>.json` the protocol, the hashes of list and weights, the counts and the metrics. While the evaluation
runs, each rank appends part files (an evaluation that was stopped or killed goes on from them); rank 0 merges them and
only then writes the JSON: its presence means complete.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.faults import UserError

PART_SECONDS = 60.0  # a killed evaluation has lost at most this much work


@dataclass(frozen=True)
class Results:
    """One finished evaluation, read from `results/<name>`; shapes as in the module's docstring."""

    name: str
    ids: list[str]
    labels: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    summary: dict[str, Any]

    @classmethod
    def load(cls, exp: Path, name: str | None = None) -> Results:
        """Read one evaluation of an experiment; without a name the most recent one.

        Raises:
            UserError: there is none, or its files are not complete.
        """
        folder = Path(exp) / "results"
        if name is None:
            found = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
            if not found:
                raise UserError(f"{exp}: no results yet; run `python main.py eval {exp}` first")
            name = found[-1].stem
        summary_file = folder / f"{name}.json"
        if not summary_file.is_file():
            known = ", ".join(sorted(path.stem for path in folder.glob("*.json"))) or "none"
            raise UserError(f"{summary_file}: no finished evaluation of that name (there are: {known})")
        parts = folder / name
        try:
            arrays = {key: np.load(parts / f"{key}.npy", allow_pickle=False) for key in ("labels", "logits", "scores")}
            ids = [json.loads(line) for line in (parts / "ids.txt").read_text("utf-8").splitlines()]
            summary = json.loads(summary_file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{parts}: cannot be read ({error}); run the evaluation again") from error
        return cls(name=name, ids=ids, summary=summary, **arrays)

    @property
    def class_names(self) -> list[str]:
        """Names of the K classes, in label order."""
        return self.summary["class_names"]


class PartWriter:
    """One rank's share of the results, appended to part files while the evaluation runs."""

    def __init__(self, folder: Path, rank: int, *, start: int = 0, videos_per_part: int = 512) -> None:
        """`start`: how often this evaluation was started before, so that no earlier part is overwritten."""
        self.folder, self.rank, self.size = folder, rank, videos_per_part
        self.rows: list[dict[str, np.ndarray]] = []
        self.start, self.number, self.flushed = start, 0, time.monotonic()

    def keep(self, item: Any, logits: Any | None) -> None:
        """Remember one video; `item` is a VideoItem, `logits` (V, K) on any device or None for one that failed."""
        row = {"sample": np.int64(item.sample), "failed": np.array(item.failure or "")}
        if logits is not None:
            row["logits"] = logits.float().cpu().numpy()
            row["frames"] = item.plan.frames[item.plan.clip_rows].astype(np.int32)  # (V, T)
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
            "failed": np.array([str(row["failed"]) for row in self.rows]),
            "logits": np.stack([row["logits"] for row in good]) if good else np.zeros((0, 0, 0), np.float32),
            "frames": np.stack([row["frames"] for row in good]) if good else np.zeros((0, 0, 0), np.int32),
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
    temporary = note.with_suffix(".json.tmp")
    temporary.write_text(json.dumps({"key": text, "starts": start}) + "\n", "utf-8")
    os.replace(temporary, note)
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


def merge(folder: Path, ids: Sequence[str], labels: np.ndarray, summary: dict[str, Any]) -> dict[str, str]:
    """Join all part files into the final arrays and write the summary; returns the failed videos and why.

    Raises:
        RuntimeError: a video is missing or was scored twice; that would be a bug of ours, and no result is written.
    """
    parts = [np.load(path, allow_pickle=False) for path in sorted(folder.glob("part-*.npz"))]
    samples = np.concatenate([part["samples"] for part in parts]) if parts else np.zeros(0, np.int64)
    if not np.array_equal(np.sort(samples), np.arange(len(ids))):
        raise RuntimeError(f"{folder}: {len(samples)} rows for {len(ids)} videos, not each exactly once")
    shapes = [(part["logits"].shape[1:], part["frames"].shape[1:]) for part in parts if len(part["logits"])]
    score_shape, frame_shape = shapes[0] if shapes else ((1, len(summary["class_names"])), (1, 1))
    logits = np.full((len(ids), *score_shape), np.nan, dtype=np.float32)
    frames = np.full((len(ids), *frame_shape), -1, dtype=np.int32)
    failed: dict[str, str] = {}
    for part in parts:
        good = part["failed"] == ""
        logits[part["samples"][good]] = part["logits"]
        frames[part["samples"][good]] = part["frames"]
        failed |= {ids[int(i)]: str(why) for i, why in zip(part["samples"][~good], part["failed"][~good], strict=True)}
    (folder / "ids.txt").write_text("".join(json.dumps(name) + "\n" for name in ids), "utf-8")
    for name, array in (
        ("labels", np.asarray(labels, dtype=np.int32)),
        ("logits", logits),
        ("frames", frames),
        ("scores", softmax(logits).mean(axis=1)),
    ):
        np.save(folder / f"{name}.npy", array)
    summary = summary | {"counts": {"scored": len(ids) - len(failed), "failed": len(failed)}, "failures": failed}
    temporary = folder.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8", errors="surrogateescape")
    os.replace(temporary, folder.with_suffix(".json"))
    for path in [*folder.glob("part-*.npz"), folder / "parts.json"]:
        path.unlink(missing_ok=True)
    return failed


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, float64 inside, float32 out."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(np.float32)
