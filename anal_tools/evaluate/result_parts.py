"""How results are written: part files while an evaluation runs, then the folder that results.py reads.

Each rank appends part files of its own; an evaluation that was stopped or killed goes on from them. Rank 0 merges them
when all videos are scored. An earlier result of the same name stays as it is until every byte of the new one is
written; then its JSON file goes first and the new one comes last, so that nobody who looks for it reads a mixture.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anal_tools.evaluate import identity, part_file, results
from anal_tools.evaluate.protocols import Protocol
from datasets.plan.views import view_table
from utils import files, metrics
from utils.faults import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from anal_tools.evaluate.results import LedgerRow, Results, Summary
    from datasets.loading.eval import VideoItem
    from datasets.plan.views import VideoPlan

PART_SECONDS = 10.0  # a killed evaluation has lost at most this much work
_NOTE = "parts.json"  # which evaluation the parts beside it are of, and how often it was started
_ASIDE = "aside"  # the folder of the parts of an evaluation with other settings
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


@dataclass(frozen=True)
class _Row:
    """One video of a part: reasons, "" for none; of one that could be read its scores (V, K), and how it was seen."""

    sample: int
    failed: str
    repaired: str
    seen: tuple[Tensor, VideoPlan] | None


class PartWriter:
    """One rank's share of the results, appended to part files while the evaluation runs."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        start: int = 0,
        videos_per_part: int = 512,
        dtype: str = "float32",
        owner: bytes | None = None,
    ) -> None:
        """`start`: how often this evaluation was started before, so that no earlier part is overwritten; `owner`: its
        identity (`owner_of`).
        """
        self.folder, self.rank, self.size, self.dtype = folder, rank, videos_per_part, dtype
        self.rows: list[_Row] = []
        self.start, self.number, self.flushed = start, 0, time.monotonic()
        self.owner = owner or owner_of({})

    def keep(self, item: VideoItem, logits: Tensor | None) -> None:
        """Remember one video: its item, and (V, K) on any device or None for one that failed.

        The logits stay where they are until a part is written: a GPU is not waited for once a video.
        """
        seen = None if logits is None or item.plan is None else (logits, item.plan)
        self.rows.append(_Row(item.sample, item.failure or "", item.repaired, seen))
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
        arrays = {
            "samples": np.array([row.sample for row in self.rows], dtype=np.int64),
            "failed": np.array([row.failed for row in self.rows], dtype=str),
            "repaired": np.array([row.repaired for row in self.rows], dtype=str),
            "logits": np.zeros((0, 0, 0), self.dtype),
            "frames": np.zeros((0, 0, 0), np.int32),
            "boxes": np.zeros((0, 4), np.int64),  # of one video, for views.json
        }
        seen = [row.seen for row in self.rows if row.seen is not None]
        if seen:
            import torch

            from utils import transfer

            logits = transfer.to_numpy(torch.stack([logits for logits, _ in seen]).float())  # (n, V, K)
            arrays["logits"] = logits.astype(self.dtype, copy=False)
            arrays["frames"] = np.stack([plan.frames[plan.clip_rows] for _, plan in seen]).astype(np.int32)
            arrays["boxes"] = seen[0][1].boxes

        name = f"part-{self.start:04d}-{self.rank:04d}-{self.number:06d}.npz"
        with writing(self.folder):
            part_file.write(self.folder / name, arrays, self.owner)
        self.rows, self.number = [], self.number + 1


def write_part(path: Path, whole: Results, start: int, owner: bytes) -> None:
    """Write a finished result as a part of a larger one, in which its videos are the samples from `start` on."""
    notes = {kind: np.zeros(len(whole.ids), object) for kind in ("failed", "repaired")}
    for column in notes.values():
        column[:] = ""
    for row in whole.ledger:
        notes[row["status"]][row["sample"]] = row["reason"] or row["status"]
    good = notes["failed"] == ""
    boxes = [view["box"] for view in whole.views]
    arrays = {
        "samples": np.arange(start, start + len(good), dtype=np.int64),
        **{kind: column.astype(str) for kind, column in notes.items()},
        "logits": whole.logits[good],
        "frames": whole.frames[good],
        "boxes": np.array(boxes if good.any() else np.zeros((0, 4)), np.int64),
    }
    with writing(path.parent):
        part_file.write(path, arrays, owner)


def owner_of(key: Mapping[str, object]) -> bytes:
    """Return the sha256 of an evaluation's identity; every part file carries it."""
    return hashlib.sha256(_text_of(key).encode()).digest()


def _text_of(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)


def earlier_parts(
    folder: Path, key: Mapping[str, object], videos: int, say: Callable[[str], object] = print
) -> tuple[int, list[dict[str, np.ndarray]]]:
    """Return what an unfinished evaluation of this name left, if it was the same evaluation.

    If its settings differ, its parts are set aside in `results/<name>/aside/` until an evaluation of this name
    finishes: a mistyped command loses no work, since the right one uses them again. Videos that failed are dropped, to
    be tried again. A finished result of this name is left alone.

    Args:
        folder: `results/<name>`.
        key: what makes it the same (`identity.identity`).
        videos: length of the list.
        say: takes a line that says which settings differ.

    Returns:
        How often it was started before, and its complete part files as arrays; no video is in two of them.

    Raises:
        UserError: the folder cannot be written to.
    """
    with writing(folder):
        return _earlier_parts(folder, json.loads(_text_of(key)), videos, say)


def _earlier_parts(
    folder: Path, key: dict[str, object], videos: int, say: Callable[[str], object]
) -> tuple[int, list[dict[str, np.ndarray]]]:
    folder.mkdir(parents=True, exist_ok=True)
    before, start = _read_note(folder)
    if before is not None and before != key:
        aside, aside_start = _read_note(folder / _ASIDE)
        _exchange(folder, bring_back=aside == key)
        say(
            f"{folder.name}: the evaluation that was stopped differs in {identity.differences(before, key)}; "
            "its scores are not used, and kept until this one is finished"
        )
        before, start = (aside, aside_start) if aside == key else (None, 0)
    same = before is not None

    seen, parts, owner = np.zeros(videos, bool), [], owner_of(key)
    for path in [*folder.glob("*.tmp"), *sorted(folder.glob("part-*.npz"))]:
        part = _usable(path, owner, seen) if same and path.suffix == ".npz" else None
        if part is None:
            path.unlink()
            continue
        start = max(start, int(path.name.split("-")[1]))
        seen[part["samples"]] = True
        parts.append(part)

    start = start + 1 if same else 0
    files.write_text(folder / _NOTE, json.dumps({"key": key, "starts": start}) + "\n", errors="surrogateescape")
    return start, parts


def _read_note(folder: Path) -> tuple[dict[str, object] | None, int]:
    """Return identity and number of starts of the unfinished evaluation in a folder; (None, 0) without one."""
    if not (folder / _NOTE).is_file():  # nothing, or a pipe, which must not be opened
        return None, 0
    try:
        note = json.loads((folder / _NOTE).read_text("utf-8"))
        key, starts = note["key"], int(note["starts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, 0
    return (key, max(0, starts)) if isinstance(key, dict) else (None, 0)


def _exchange(folder: Path, *, bring_back: bool) -> None:
    """Put the unfinished evaluation aside, in the place of an older one that may be wanted back.

    A kill in between leaves parts whose owner is not that of the note beside them; those are never used.
    """
    aside, coming = folder / _ASIDE, folder / "coming"
    shutil.rmtree(coming, ignore_errors=True)
    if aside.is_dir():
        aside.rename(coming)
    aside.mkdir()
    for path in [folder / _NOTE, *folder.glob("part-*.npz")]:
        path.rename(aside / path.name)

    if bring_back:
        for path in [*coming.glob("part-*.npz"), coming / _NOTE]:
            path.rename(folder / path.name)
    shutil.rmtree(coming, ignore_errors=True)


def _usable(path: Path, owner: bytes, seen: np.ndarray) -> dict[str, np.ndarray] | None:
    """Return a part of this evaluation without its failed videos, which the file then lacks too.

    None if it is damaged, of another evaluation, names a video that is not new, or nothing is left of it.
    """
    if not re.fullmatch(r"part-\d+-\d+-\d+\.npz", path.name):
        return None
    try:
        part = part_file.read(path, owner)
    except part_file.Damaged:
        return None
    samples = part["samples"]
    inside = bool(((samples >= 0) & (samples < len(seen))).all())
    if not inside or len(np.unique(samples)) != len(samples):
        return None
    good = part["failed"] == ""
    if not good.all():
        part |= {name: part[name][good] for name in ("samples", "failed", "repaired")}
        if not good.any():
            return None
        part_file.write(path, part, owner)
    return None if seen[part["samples"]].any() else part


def discard(folder: Path) -> None:
    """Remove the parts of an evaluation that is not worth resuming; one that was set aside takes its place.

    Raises:
        UserError: the folder cannot be written to.
    """
    with writing(folder):
        for path in [*folder.glob("part-*.npz"), *folder.glob("*.tmp"), folder / _NOTE]:
            path.unlink(missing_ok=True)
        aside = folder / _ASIDE
        if aside.is_dir():
            for path in [*aside.glob("part-*.npz"), aside / _NOTE]:
                if path.exists():
                    path.rename(folder / path.name)
            shutil.rmtree(aside, ignore_errors=True)
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):  # an earlier result is in it
                empty.rmdir()


def merge(
    folder: Path,
    ids: Sequence[str],
    labels: np.ndarray,
    summary: Summary,
    *,
    targets: np.ndarray | None = None,
    owner: bytes | None = None,
) -> Summary:
    """Join all part files into the final arrays and write the summary.

    Args:
        folder: `results/<name>`.
        ids: path of each of the N videos.
        labels: (N,).
        summary: goes into the JSON file; its protocol says how views are joined.
        targets: (N, K) bool of a list with several labels per video.
        owner: the identity of the evaluation (`owner_of`); parts of others are left out.

    Returns:
        The summary with `counts`, `failures` ({path: reason}), further metrics and the sha256 of every file.

    Raises:
        UserError: the file system does not take the files, or a part file was damaged or removed since it was written;
            the other parts and an earlier result stay.
    """
    with writing(folder):
        try:
            return _merge(folder, owner or owner_of({}), ids, labels, summary, targets)
        except OSError:
            for path in [*folder.glob("*.tmp"), _new(summary_file(folder))]:  # they only take up room
                with contextlib.suppress(OSError):
                    path.unlink()
            raise


def _merge(
    folder: Path,
    owner: bytes,
    ids: Sequence[str],
    labels: np.ndarray,
    summary: Summary,
    targets: np.ndarray | None,
) -> Summary:
    parts, arrays, boxes = _joined(folder, owner, len(ids), len(summary["class_names"]))
    protocol = Protocol.from_dict(summary["protocol"])
    if boxes is not None:
        _check_views(folder, (len(boxes),), (protocol.spec.views,))
    scores = score_in_blocks(arrays["logits"], protocol.average, multi_label=targets is not None)
    for array in arrays.values():
        array.flush()

    small = {"scores": scores.astype(np.float32), "labels": np.asarray(labels, dtype=np.int32)}
    small |= {} if targets is None else {"targets": np.asarray(targets, dtype=bool)}
    for name, array in small.items():
        with _new(folder / f"{name}.npy").open("wb") as file:
            np.save(file, array)
    ledger = _ledger(parts, ids)
    texts = {
        "ids.txt": "".join(json.dumps(name) + "\n" for name in ids),
        "ledger.jsonl": "".join(json.dumps(row) + "\n" for row in ledger),
        "views.json": json.dumps(view_table(protocol.spec, boxes)) + "\n",
    }
    for name, text in texts.items():
        _write_new(folder / name, text)

    names = [*(f"{name}.npy" for name in (*arrays, *small)), *texts]
    failed = {row["path"]: row["reason"] for row in ledger if row["status"] == "failed"}
    summary = {
        **summary,
        "counts": _counts(ledger, ids),
        "failures": failed,
        "files": {name: _synced_hash(_new(folder / name)) for name in names},
    }
    summary = json.loads(json.dumps(summary))  # as it will be read
    summary["checksum"] = results.summary_checksum(summary)
    _write_new(summary_file(folder), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _synced_hash(_new(summary_file(folder)))
    _publish(folder, names)
    for path in [*folder.glob("part-*.npz"), folder / _NOTE]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / _ASIDE, ignore_errors=True)
    return summary


def _check_views(path: Path, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise UserError for rows of other views, classes or frames than this evaluation's."""
    if found != expected:
        raise UserError(
            f"{path}: rows of shape {found}, not {expected}: of another evaluation? Remove it and evaluate again"
        )


def _joined(
    folder: Path, owner: bytes, videos: int, num_class: int
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.memmap], np.ndarray | None]:
    """Copy the parts of an evaluation into the new files logits.npy and frames.npy, one part in memory at a time.

    Returns:
        Of each part its small columns; the two arrays; the boxes of the views on the first video that could be read.
    """
    parts, arrays, boxes = [], None, None
    for path in sorted(folder.glob("part-*.npz")):
        try:
            part = part_file.read(path, owner)
        except part_file.Stranger:
            continue
        except part_file.Damaged as error:
            raise UserError(
                f"{error}; run the same command again, which scores the videos of this part again"
            ) from error
        if len(part["logits"]):
            arrays = arrays or _final_arrays(folder, part, videos)
            boxes = part["boxes"] if boxes is None else boxes
            rows = part["samples"][part["failed"] == ""]
            for name in ("logits", "frames"):
                _check_views(path, part[name].shape[1:], arrays[name].shape[1:])
                arrays[name][rows] = part[name]
        parts.append({name: part[name] for name in ("samples", "failed", "repaired")})

    samples = np.concatenate([part["samples"] for part in parts]) if parts else np.zeros(0, np.int64)
    if not np.array_equal(np.sort(samples), np.arange(videos)):
        raise UserError(
            f"{folder}: its part files have {len(samples)} rows for {videos} videos, not each exactly once; was a part "
            "removed or copied here? Run the same command again, which scores what is missing"
        )
    if arrays is None:
        empty = {"logits": np.zeros((0, 1, num_class), np.float32), "frames": np.zeros((0, 1, 1), np.int32)}
        arrays = _final_arrays(folder, empty, videos)
    return parts, arrays, boxes


def _synced_hash(path: Path) -> str:
    """Return the sha256 of a file whose bytes are on the disk now."""
    files.sync_file(path)
    return files.sha256(path)


def _publish(folder: Path, names: Sequence[str]) -> None:
    """Give the new files their names; a summary is there only while all files beside it are of one evaluation."""
    summary = summary_file(folder)
    summary.unlink(missing_ok=True)
    if "targets.npy" not in names:
        (folder / "targets.npy").unlink(missing_ok=True)
    for name in names:
        os.replace(_new(folder / name), folder / name)
    os.replace(_new(summary), summary)
    files.sync_folder(folder)
    files.sync_folder(summary.parent)


def _counts(ledger: Sequence[LedgerRow], ids: Sequence[str]) -> dict[str, int]:
    """Return how many videos were scored, repaired and failed."""
    failed = sum(row["status"] == "failed" for row in ledger)
    return {
        "videos": len(ids),
        "scored": len(ids) - failed,
        "repaired": len(ledger) - failed,
        "failed": failed,
        "duplicates": len(ids) - len(set(ids)),
    }


def _ledger(parts: Sequence[dict[str, np.ndarray]], ids: Sequence[str]) -> list[LedgerRow]:
    """Return a row for each video that failed or was repaired, in list order."""
    rows: list[LedgerRow] = []
    for part in parts:
        for sample, failed, repaired in zip(*(part[k] for k in ("samples", "failed", "repaired")), strict=True):
            if failed or repaired:
                status, reason = ("failed", str(failed)) if failed else ("repaired", str(repaired))
                sample = int(sample)
                rows.append({"sample": sample, "path": ids[sample], "status": status, "reason": reason})
    return sorted(rows, key=lambda row: row["sample"])


def _final_arrays(folder: Path, part: dict[str, np.ndarray], videos: int) -> dict[str, np.memmap]:
    """Return the new files logits.npy and frames.npy as arrays, of the shapes of a part, filled for failed videos."""
    made = {}
    for name, fill in (("logits", np.nan), ("frames", -1)):
        path, like = _new(folder / f"{name}.npy"), part[name]
        array = np.lib.format.open_memmap(path, "w+", dtype=like.dtype, shape=(videos, *like.shape[1:]))
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
    _new(path).unlink(missing_ok=True)  # whatever was left there, such as a pipe
    _new(path).write_text(text, "utf-8", errors="surrogateescape")
