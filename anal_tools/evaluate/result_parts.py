"""Write results: part files while an evaluation runs, then the folder that results.py reads.

Each rank writes part files for its videos. An evaluation that was stopped or killed resumes from them. Rank 0 merges
them when all videos are scored. An earlier result of the same name stays until every byte of the new one is written;
then its JSON file is removed first and the new one comes last, so that no reader sees a mixture.
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
from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from anal_tools.evaluate.results import LedgerRow, Results, Summary
    from datasets.loading.eval import VideoItem
    from datasets.plan.views import VideoPlan

PART_SECONDS = 10.0  # a killed evaluation loses at most this much work
_NOTE = "parts.json"  # the identity of the evaluation that wrote the parts next to it, and its number of starts
_ASIDE = "aside"  # the folder with the parts of an evaluation with other settings
_COMING = "coming"  # what was in it, while the two change places
_BLOCK = 256  # videos whose views are all in memory at once while parts are merged
_NO_SPACE = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "a limit on the size of files, ulimit -f, is in force",
}


def summary_file(folder: Path) -> Path:
    """Return `results/<name>.json` of `results/<name>`; a name may hold dots."""
    # not `with_suffix`, which cuts a name at its last dot
    return folder.with_name(f"{folder.name}.json")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of the file system while `results/<name>` is written into a sentence with what to do."""
    try:
        yield
    except OSError as error:
        again = "run the same command again, which resumes from what was written"
        in_the_way = [path for path in (folder.parent, folder) if path.exists() and not path.is_dir()]

        if in_the_way:
            text = f"{in_the_way[0]} is a file, and the results need a folder of that name: move it away and {again}"
        elif error.errno in _NO_SPACE or error.errno is None:  # numpy reports only how many values it wrote
            text = f"{folder}: the results could not be written, {_NO_SPACE.get(error.errno or errno.ENOSPC)}"
            text += f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB are free): make room and {again}"
        else:
            reason = error.strerror or str(error)
            text = f"{folder}: the results could not be written ({reason}): fix that and {again}"
        raise UserError(text) from error


@dataclass(frozen=True)
class _Row:
    """One video of a part: "" or the reasons, and if it could be read its scores (V, K) and its plan."""

    sample: int
    failed: str
    repaired: str
    seen: tuple[Tensor, VideoPlan] | None


class PartWriter:
    """Append one rank's share of the results to part files while the evaluation runs."""

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
        """Start with no rows.

        Args:
            folder: `results/<name>`.
            rank: of this process; each rank writes separate part files.
            start: how often this evaluation was started before, so that no earlier part is overwritten.
            videos_per_part: a part is written when it has this many videos.
            dtype: number format of the kept logits.
            owner: identity of the evaluation (`owner_of`).
        """
        self.folder, self.rank, self.size, self.dtype = folder, rank, videos_per_part, dtype
        self.rows: list[_Row] = []
        self.start, self.number, self.flushed = start, 0, time.monotonic()
        self.owner = owner or owner_of({})

    def keep(self, item: VideoItem, logits: Tensor | None) -> None:
        """Remember one video: its item, and its logits (V, K) on any device, or None if it failed.

        The logits stay on their device until a part is written, so that the GPU is not synchronised once per video.
        """
        seen = None if logits is None or item.plan is None else (logits, item.plan)

        self.rows.append(_Row(item.sample, item.failure or "", item.repaired, seen))
        if len(self.rows) >= self.size or time.monotonic() - self.flushed > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the remembered rows as one part file; a torn file never gets its final name.

        Raises:
            UserError: the file system refuses it; earlier parts stay, the rows of this one are lost.
        """
        self.flushed = time.monotonic()
        if not self.rows:
            return

        # without a readable video the last three are empty
        arrays = {
            "samples": np.array([row.sample for row in self.rows], dtype=np.int64),
            "failed": np.array([row.failed for row in self.rows], dtype=str),
            "repaired": np.array([row.repaired for row in self.rows], dtype=str),
            "logits": np.zeros((0, 0, 0), self.dtype),
            "frames": np.zeros((0, 0, 0), np.int32),
            "boxes": np.zeros((0, 4), np.int64),  # (V, 4) of one video, for views.json
        }

        seen = [row.seen for row in self.rows if row.seen is not None]
        if seen:
            import torch

            from utils import transfer

            logits = transfer.to_numpy(torch.stack([logits for logits, _ in seen]).float())  # (n, V, K)
            arrays["logits"] = logits.astype(self.dtype, copy=False)
            # a plan holds distinct frames, (F,); its rows give each view's T frames
            arrays["frames"] = np.stack([plan.frames[plan.clip_rows] for _, plan in seen]).astype(np.int32)
            arrays["boxes"] = seen[0][1].boxes

        # names sort by start, rank and number, so no two processes write the same file
        name = f"part-{self.start:04d}-{self.rank:04d}-{self.number:06d}.npz"
        with writing(self.folder):
            part_file.write(self.folder / name, arrays, self.owner)
        self.rows, self.number = [], self.number + 1


def write_part(path: Path, whole: Results, start: int, owner: bytes) -> None:
    """Write a finished result as a part of a larger one, in which its videos are samples `start`, `start` + 1, ..."""
    # object columns hold texts of any length
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
    """Return the sha256 of an evaluation's identity, which every part file holds."""
    return hashlib.sha256(_text_of(key).encode()).digest()


def _text_of(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)


def earlier_parts(
    folder: Path, key: Mapping[str, object], videos: int, say: Callable[[str], object] = print
) -> tuple[int, list[dict[str, np.ndarray]]]:
    """Return the parts that an unfinished evaluation of this name left, if it was the same evaluation.

    If its settings differ, its parts are moved to `results/<name>/aside/` until an evaluation of this name finishes.
    So a mistyped command loses no work: the right one uses them again. Videos that failed are dropped and will be
    tried again. A finished result of this name does not change.

    Args:
        folder: `results/<name>`.
        key: the identity of the evaluation (`identity.identity`).
        videos: length of the list.
        say: prints a line about the settings that differ.

    Returns:
        How often it was started before, and its complete part files as arrays; no video is in two of them.

    Raises:
        UserError: the folder cannot be written to.
    """
    # through JSON and back, as the note on the disk was: tuples become lists
    with writing(folder):
        return _earlier_parts(folder, json.loads(_text_of(key)), videos, say)


def _earlier_parts(
    folder: Path, key: dict[str, object], videos: int, say: Callable[[str], object]
) -> tuple[int, list[dict[str, np.ndarray]]]:
    folder.mkdir(parents=True, exist_ok=True)
    _mend(folder)
    before, start = _read_note(folder)

    # another evaluation is in the folder: exchange it with the one in `aside`
    if before is not None and before != key:
        aside, aside_start = _read_note(folder / _ASIDE)
        _exchange(folder, bring_back=aside == key)
        say(
            f"{folder.name}: the evaluation that was stopped differs in {identity.differences(before, key)}; "
            "its scores are not used, and kept until this one is finished"
        )
        before, start = (aside, aside_start) if aside == key else (None, 0)
    same = before is not None

    # keep each part of this evaluation once; all other files of parts go
    seen, parts, owner = np.zeros(videos, bool), [], owner_of(key)
    for path in [*folder.glob("*.tmp"), *sorted(folder.glob("part-*.npz"))]:
        part = _usable(path, owner, seen) if same and path.suffix == ".npz" else None
        if part is None:
            path.unlink()
            continue
        start = max(start, int(path.name.split("-")[1]))  # no part may be overwritten, even if the note is wrong
        seen[part["samples"]] = True
        parts.append(part)

    # written before the first part, so that a part always has its note
    start = start + 1 if same else 0
    files.write_text(folder / _NOTE, json.dumps({"key": key, "starts": start}) + "\n", errors="surrogateescape")
    return start, parts


def _read_note(folder: Path) -> tuple[dict[str, object] | None, int]:
    """Return identity and number of starts of the unfinished evaluation in a folder, or (None, 0) if there is none."""
    if not (folder / _NOTE).is_file():  # missing, or a pipe, which must not be opened
        return None, 0
    try:
        note = json.loads((folder / _NOTE).read_text("utf-8"))
        key, starts = note["key"], int(note["starts"])
    # a damaged note counts as none: the videos of its parts are scored again
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, 0
    return (key, max(0, starts)) if isinstance(key, dict) else (None, 0)


def _exchange(folder: Path, *, bring_back: bool) -> None:
    """Move the unfinished evaluation aside, in the place of an older one that may come back.

    A note moves before its parts, both ways. So a kill in between leaves parts that `_mend` can tell apart.
    """
    aside, coming = folder / _ASIDE, folder / _COMING
    if not bring_back:
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.is_dir():
        aside.rename(coming)

    aside.mkdir()
    for path in [folder / _NOTE, *folder.glob("part-*.npz")]:
        path.rename(aside / path.name)
    if bring_back:
        _bring_back(folder)


def _bring_back(folder: Path) -> None:
    """Move the evaluation in `coming` into the folder, or what is left of it there."""
    coming = folder / _COMING
    for path in [coming / _NOTE, *coming.glob("part-*.npz")]:
        if path.exists():
            path.rename(folder / path.name)
    shutil.rmtree(coming, ignore_errors=True)


def _mend(folder: Path) -> None:
    """Finish an exchange that a kill interrupted, wherever it was: no part of either evaluation is lost."""
    note, aside, coming = folder / _NOTE, folder / _ASIDE, folder / _COMING

    # Nothing has been moved yet but the older evaluation: it goes back to its place.
    if coming.is_dir() and not (aside / _NOTE).exists():
        shutil.rmtree(aside, ignore_errors=True)
        coming.rename(aside)
        return

    # The note has been moved, its parts have not, or not all of them.
    if not note.exists() and (aside / _NOTE).exists():
        for path in folder.glob("part-*.npz"):
            path.rename(aside / path.name)

    # One evaluation at a time has its note in the folder: with both notes gone or there, nothing is to be moved.
    if coming.is_dir() and (coming / _NOTE).exists() != note.exists():
        _bring_back(folder)
    shutil.rmtree(coming, ignore_errors=True)


def _usable(path: Path, owner: bytes, seen: np.ndarray) -> dict[str, np.ndarray] | None:
    """Return a part of this evaluation without its failed videos, after removing these from the file too.

    Return None if it is damaged, of another evaluation, names a video twice or an unknown one, or nothing is left.
    """
    if not re.fullmatch(r"part-\d+-\d+-\d+\.npz", path.name):
        return None

    try:
        part = part_file.read(path, owner)
    except part_file.DamagedPart:
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
        # the merge reads this file, and a new part will hold the failed videos
        part_file.write(path, part, owner)
    return None if seen[part["samples"]].any() else part


def discard(folder: Path) -> None:
    """Remove the parts of an evaluation that is not worth resuming, and bring back one that was moved aside.

    Raises:
        UserError: the folder cannot be changed.
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
            with contextlib.suppress(OSError):  # the folder holds an earlier result
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
        summary: content of the JSON file; its protocol defines how views are joined.
        targets: (N, K) bool for a list with several labels per video.
        owner: the identity of the evaluation (`owner_of`); parts of others are ignored.

    Returns:
        The summary with `counts`, `failures` ({path: reason}), further metrics and the sha256 of every file.

    Raises:
        UserError: the file system refuses the files, or a part file was damaged or removed since it was written;
            the other parts and an earlier result stay.
    """
    with writing(folder):
        try:
            return _merge(folder, owner or owner_of({}), ids, labels, summary, targets)
        except OSError:
            for path in [*folder.glob("*.tmp"), _new(summary_file(folder))]:  # half-written files only take up room
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
    # the large arrays, on the disk
    parts, arrays, boxes = _joined(folder, owner, len(ids), len(summary["class_names"]))
    protocol = Protocol.from_dict(summary["protocol"])
    if boxes is not None:
        _check_views(folder, (len(boxes),), (protocol.spec.views,))
    scores = score_in_blocks(arrays["logits"], protocol.average, multi_label=targets is not None)
    for array in arrays.values():
        array.flush()

    # The small files next to them. All have temporary names until `_publish`.
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

    # The summary has the hash of every file, and comes last.
    names = [*(f"{name}.npy" for name in (*arrays, *small)), *texts]
    failed = {row["path"]: row["reason"] for row in ledger if row["status"] == "failed"}
    summary = {
        **summary,
        "counts": _counts(ledger, ids),
        "failures": failed,
        "files": {name: _synced_hash(_new(folder / name)) for name in names},
    }
    summary = json.loads(json.dumps(summary))  # as a reader gets it, so that the checksum is that of the read values

    summary["checksum"] = results.summary_checksum(summary)
    _write_new(summary_file(folder), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _synced_hash(_new(summary_file(folder)))

    # From here on the result is complete, so its parts may go.
    _publish(folder, names)
    for path in [*folder.glob("part-*.npz"), folder / _NOTE]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / _ASIDE, ignore_errors=True)
    return summary


def _check_views(path: Path, actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise UserError if rows are of other views, classes or frames than those of this evaluation."""
    if actual != expected:
        raise UserError(
            f"{path}: rows of shape {actual}, not {expected}: of another evaluation? Remove it and evaluate again"
        )


def _joined(
    folder: Path, owner: bytes, videos: int, num_class: int
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.memmap], np.ndarray | None]:
    """Copy the parts of an evaluation into the new files logits.npy and frames.npy, one part in memory at a time.

    Returns:
        The small columns of each part; the two arrays; the boxes of the views on the first video that could be read.
    """
    parts, arrays, boxes = [], None, None
    for path in sorted(folder.glob("part-*.npz")):
        try:
            part = part_file.read(path, owner)
        except part_file.Stranger:
            continue
        except part_file.DamagedPart as error:
            raise UserError(
                f"{error}; run the same command again, which scores the videos of this part again"
            ) from error

        if len(part["logits"]):
            arrays = arrays or _final_arrays(folder, part, videos)
            boxes = part["boxes"] if boxes is None else boxes
            rows = part["samples"][part["failed"] == ""]  # logits and frames have rows for these only
            for name in ("logits", "frames"):
                _check_views(path, part[name].shape[1:], arrays[name].shape[1:])
                arrays[name][rows] = part[name]
        parts.append({name: part[name] for name in ("samples", "failed", "repaired")})

    samples = np.concatenate([part["samples"] for part in parts]) if parts else np.zeros(0, np.int64)
    # each sample exactly once: a killed rank or a copied file would leave a gap or a duplicate
    if not np.array_equal(np.sort(samples), np.arange(videos)):
        raise UserError(
            f"{folder}: its part files have {len(samples)} rows for {videos} videos, not each exactly once; was a part "
            "removed or copied here? Run the same command again, which scores what is missing"
        )

    # No video could be read: arrays of one view, all of it filled.
    if arrays is None:
        empty = {"logits": np.zeros((0, 1, num_class), np.float32), "frames": np.zeros((0, 1, 1), np.int32)}
        arrays = _final_arrays(folder, empty, videos)
    return parts, arrays, boxes


def _synced_hash(path: Path) -> str:
    """Flush a file to the disk and return its sha256."""
    files.sync_file(path)
    return files.sha256(path)


def _publish(folder: Path, names: Sequence[str]) -> None:
    """Give the new files their names; a summary exists only while all files next to it are of one evaluation."""
    summary = summary_file(folder)
    # first the old summary goes: without it the folder holds no result
    summary.unlink(missing_ok=True)
    if "targets.npy" not in names:
        (folder / "targets.npy").unlink(missing_ok=True)
    for name in names:
        os.replace(_new(folder / name), folder / name)
    # the new summary last: it declares the files complete
    os.replace(_new(summary), summary)
    # renames are on the disk only after a sync of their folders
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
    """Return the new files logits.npy and frames.npy in the shapes of a part, with every row as failed."""
    arrays = {}
    for name, fill in (("logits", np.nan), ("frames", -1)):
        path, like = _new(folder / f"{name}.npy"), part[name]
        array = np.lib.format.open_memmap(path, "w+", dtype=like.dtype, shape=(videos, *like.shape[1:]))

        # a full disk must raise here: at the first write to the map it would kill the process by SIGBUS
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                # a file system that cannot reserve space
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
                    raise
        array[:] = fill
        arrays[name] = array
    return arrays


def score_in_blocks(logits: np.ndarray, average: str, *, multi_label: bool = False) -> np.ndarray:
    """Apply `metrics.video_scores` to many videos, a block at a time in memory: (N, V, K) -> (N, K) float64."""
    blocks = [
        metrics.video_scores(logits[start : start + _BLOCK], average, multi_label=multi_label)
        for start in range(0, len(logits), _BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.zeros((0, logits.shape[2]))


def _new(path: Path) -> Path:
    """Return the name of a file until the whole result is complete."""
    return path.with_name(f"{path.name}.tmp")


def _write_new(path: Path, text: str) -> None:
    _new(path).unlink(missing_ok=True)  # a leftover may be a pipe, which would block
    _new(path).write_text(text, "utf-8", errors="surrogateescape")
