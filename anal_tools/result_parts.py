"""How results are written: part files while an evaluation runs, then the folder that results.py reads.

Each rank appends part files of its own; an evaluation that was stopped or killed goes on from them. Rank 0 merges them
when all videos are scored. An earlier result of the same name stays as it is until every byte of the new one is
written; then its JSON file goes first and the new one comes last, so that nobody who looks for it reads a mixture.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anal_tools.protocols import Protocol
from datasets.views import view_table
from utils import metrics
from utils.faults import UserError

PART_SECONDS = 10.0  # a killed evaluation has lost at most this much work
_BLOCK = 256  # videos of which all views are in memory at once while parts are merged
_NO_SPACE = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "a limit on the size of files, ulimit -f, is in force",
}


def summary_file(folder: Path) -> Path:
    """`results/<name>.json` of `results/<name>`; a name may hold dots."""
    return folder.with_name(f"{folder.name}.json")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the file system says while `results/<name>` is written into a sentence that tells what to do."""
    try:
        yield
    except OSError as error:
        again = "run the same command again, which goes on from what was written"
        in_the_way = [path for path in (folder.parent, folder) if path.exists() and not path.is_dir()]
        if in_the_way:
            text = f"{in_the_way[0]} is a file, and the results need a folder of that name: move it away and {again}"
        elif error.errno in _NO_SPACE or error.errno is None:  # numpy tells only how many values went through
            text = f"{folder}: the results could not be written, {_NO_SPACE.get(error.errno or errno.ENOSPC)}"
            text += f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB are free): make room and {again}"
        else:
            reason = error.strerror or str(error)
            text = f"{folder}: the results could not be written ({reason}): mend that and {again}"
        raise UserError(text) from error


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
        """Write the remembered rows as one part file; a torn file never gets its final name.

        Raises:
            UserError: the file system does not take it; the parts before it stay, the rows of this one are lost.
        """
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
        with writing(self.folder):
            try:
                with temporary.open("wb") as file:
                    np.savez(file, **arrays)
                os.replace(temporary, final)
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        self.rows, self.number = [], self.number + 1


def earlier_parts(folder: Path, key: dict[str, Any], videos: int) -> tuple[int, list[dict[str, np.ndarray]]]:
    """What an unfinished evaluation of this name left, if it was the same evaluation; else its parts are removed.

    A finished result of this name is left alone.

    Args:
        key: what makes it the same: hashes of weights and list, protocol, precision.
        videos: length of the list.

    Returns:
        How often it was started before, and its complete part files as arrays; no video is in two of them.

    Raises:
        UserError: the folder cannot be written to.
    """
    with writing(folder):
        return _earlier_parts(folder, key, videos)


def _earlier_parts(folder: Path, key: dict[str, Any], videos: int) -> tuple[int, list[dict[str, np.ndarray]]]:
    folder.mkdir(parents=True, exist_ok=True)
    note, text = folder / "parts.json", json.dumps(key, sort_keys=True)
    try:
        before = json.loads(note.read_text("utf-8"))
        same, start = before["key"] == text, int(before["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        same, start = False, 0
    seen, parts = np.zeros(videos, bool), []
    for path in [*folder.glob("*.tmp"), *sorted(folder.glob("part-*.npz"))]:
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
        UserError: the file system does not take the files; the parts and an earlier result stay.
    """
    with writing(folder), contextlib.ExitStack() as stack:
        files = sorted(folder.glob("part-*.npz"))
        parts = [stack.enter_context(np.load(path, allow_pickle=False)) for path in files]
        try:
            return _merge(folder, parts, ids, labels, summary, targets)
        except OSError:
            for path in [*folder.glob("*.tmp"), _new(summary_file(folder))]:  # they only take up room
                with contextlib.suppress(OSError):
                    path.unlink()
            raise


def _merge(
    folder: Path,
    parts: Sequence[Any],
    ids: Sequence[str],
    labels: np.ndarray,
    summary: dict[str, Any],
    targets: np.ndarray | None,
) -> dict[str, Any]:
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
    small = {"scores": scores.astype(np.float32), "labels": np.asarray(labels, dtype=np.int32)}
    small |= {} if targets is None else {"targets": np.asarray(targets, dtype=bool)}
    for name, array in small.items():
        with _new(folder / f"{name}.npy").open("wb") as file:
            np.save(file, array)
    ledger = _ledger(parts, ids)
    shown = next((part["boxes"] for part in parts if len(part["logits"]) and "boxes" in part), None)
    texts = {
        "ids.txt": "".join(json.dumps(name) + "\n" for name in ids),
        "ledger.jsonl": "".join(json.dumps(row) + "\n" for row in ledger),
        "views.json": json.dumps(view_table(protocol.spec, shown)) + "\n",
    }
    for name, text in texts.items():
        _write_new(folder / name, text)
    if targets is None:
        calibration = {"calibration_error": 100 * metrics.calibration_error(scores, labels)}
        summary = summary | {"metrics": summary["metrics"] | calibration}
    summary = summary | _counts(ledger, ids)
    _write_new(summary_file(folder), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _publish(folder, [*(f"{name}.npy" for name in (*arrays, *small)), *texts])
    for path in [*folder.glob("part-*.npz"), folder / "parts.json"]:
        path.unlink(missing_ok=True)
    return summary


def _publish(folder: Path, names: Sequence[str]) -> None:
    """Give the new files their names; a summary is there only while all files beside it are of one evaluation."""
    summary = summary_file(folder)
    summary.unlink(missing_ok=True)
    if "targets.npy" not in names:
        (folder / "targets.npy").unlink(missing_ok=True)
    for name in names:
        os.replace(_new(folder / name), folder / name)
    os.replace(_new(summary), summary)


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
    """The new files logits.npy and frames.npy as arrays in them, filled with what stands for a video that failed."""
    full = [part for part in parts if len(part["logits"])]
    shape, kind = (full[0]["logits"].shape[1:], full[0]["logits"].dtype) if full else ((1, num_class), np.float32)
    frames = full[0]["frames"].shape[1:] if full else (1, 1)
    made = {}
    for name, dtype, rest, fill in (("logits", kind, shape, np.nan), ("frames", np.int32, frames, -1)):
        path = _new(folder / f"{name}.npy")
        array = np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=(videos, *rest))
        with path.open("r+b") as file:  # on a full disk an error here, and not a SIGBUS at the first write to the map
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
                    raise
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


def _new(path: Path) -> Path:
    """The name of a file until the whole result is there."""
    return path.with_name(f"{path.name}.tmp")


def _write_new(path: Path, text: str) -> None:
    _new(path).write_text(text, "utf-8", errors="surrogateescape")


def _write(path: Path, text: str) -> None:
    """Write a text file that is either the old or the whole new one."""
    _write_new(path, text)
    os.replace(_new(path), path)
