"""Result folders: what an evaluation leaves behind, and how to read it back (result_parts.py writes them).

`results/<name>/` holds, for the N videos of the list in list order, the V views of the protocol and K classes:

* `ids.txt`: one path per line, as the list has it (JSON-quoted, so that any name fits on its line)
* `labels.npy` (N,) int32; of a list with several labels per video the first one, -1 where there is none
* `targets.npy` (N, K) bool: only for such a list
* `logits.npy` (N, V, K) float32 or float16; the rows of a video that could not be read are NaN
* `scores.npy` (N, K) float32: probabilities, joined over the views by the protocol's average
* `frames.npy` (N, V, T) int32: frame ordinals the model saw, -1 where the video could not be read
* `views.json`: of each view its clip, crop, place and flip, and its box on the first video that could be read
* `ledger.jsonl`: one row for each video that failed or was repaired: sample, path, status, reason

and `results/<name>.json` the protocol, the hashes of list and weights, the counts and the metrics. It is written last:
its presence means complete. When the evaluation is repeated it goes first, and only once the new files are written. It
holds the sha256 of each file (`files`) and of its own content (`checksum`), and readers compare them. Results of
earlier versions have neither; of these only the shapes are checked, and `Results.verified` is False.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from anal_tools import protocols
from utils import files, metrics
from utils.faults import UserError, refuse_odd_file

_Content = TypeVar("_Content")
_TRIES = 3  # times that a result is read anew because it was replaced meanwhile


@dataclass(frozen=True)
class Results:
    """One finished evaluation, read from `results/<name>`; shapes as in the module's docstring.

    `logits` and `frames` are memory-mapped: go through them in blocks.
    """

    name: str
    ids: list[str]
    labels: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    summary: dict[str, Any]
    exp: Path = Path()
    targets: np.ndarray | None = None
    stamp: tuple[int, ...] | None = None  # of the summary file as it was read

    @classmethod
    def names(cls, exp: Path) -> list[str]:
        """Finished evaluations of an experiment, oldest first."""
        found = Path(exp, "results").glob("*.json")
        return [path.stem for path in sorted(found, key=lambda path: path.stat().st_mtime)]

    @classmethod
    def load(cls, exp: Path, name: str | None = None) -> Results:
        """Read one evaluation of an experiment; without a name the most recent one.

        Raises:
            UserError: there is none, or its files are not complete.
        """
        folder = Path(exp) / "results"
        if name is None:
            found = cls.names(exp)
            if not found:
                raise UserError(f"{exp}: no results yet; run `python main.py eval {exp}` first")
            name = found[-1]
        summary_file = folder / f"{name}.json"
        if not summary_file.is_file():
            known = ", ".join(sorted(cls.names(exp))) or "none"
            raise UserError(f"{summary_file}: no finished evaluation of that name (there are: {known})")
        parts = folder / name
        for _ in range(_TRIES):
            stamp = _stamp(summary_file)
            try:
                content = cls._read(parts, summary_file)
            except (OSError, Damaged) as error:
                if _stamp(summary_file) == stamp:
                    raise UserError(f"{parts}: cannot be read ({error}); run the evaluation again") from error
                continue
            if stamp is not None and _stamp(summary_file) == stamp:
                return cls(name=name, exp=Path(exp), stamp=stamp, **content)
        raise _replaced(parts)

    @staticmethod
    def _read(parts: Path, summary_file: Path) -> dict[str, Any]:
        """Read and check everything but frames, views and ledger, which not every reader needs."""
        for file in ("labels.npy", "scores.npy", "logits.npy", "targets.npy", "ids.txt"):
            refuse_odd_file(parts / file)
        summary = read_summary(summary_file)
        hashes = summary.get("files")
        content: dict[str, Any] = {"summary": summary}
        for key in ("labels", "scores"):
            content[key] = _array(parts / f"{key}.npy", hashes)
        content["logits"] = _array(parts / "logits.npy", hashes, mapped=True)
        content["ids"] = _lines(parts / "ids.txt", hashes, str)
        several = parts / "targets.npy"
        has_targets = several.exists() if hashes is None else several.name in hashes
        content["targets"] = _array(several, hashes) if has_targets else None
        check_shapes(**content)
        return content

    def _of_this_evaluation(self, content: _Content) -> _Content:
        """What was just read from the folder, if no other evaluation has taken it over since `load`."""
        if self.stamp is not None and _stamp(self.exp / "results" / f"{self.name}.json") != self.stamp:
            raise _replaced(self.folder)
        return content

    @property
    def folder(self) -> Path:
        """`results/<name>` of the experiment."""
        return self.exp / "results" / self.name

    @property
    def class_names(self) -> list[str]:
        """Names of the K classes, in label order."""
        return self.summary["class_names"]

    @property
    def num_class(self) -> int:
        """K."""
        return self.scores.shape[1]

    @property
    def multi_label(self) -> bool:
        """True if a video may have several labels: `targets` has them."""
        return self.targets is not None

    @property
    def protocol(self) -> dict[str, Any]:
        """How the videos were shown, as plain values (`anal_tools.protocols.Protocol.from_dict` reads it)."""
        return self.summary["protocol"]

    @property
    def failed(self) -> np.ndarray:
        """(N,) bool: the video could not be read; it counts as wrong."""
        return np.asarray(np.isnan(self.scores).any(axis=1))

    @property
    def verified(self) -> bool:
        """True if the summary has the sha256 of each file; results of earlier versions do not."""
        return "files" in self.summary

    @cached_property
    def frames(self) -> np.ndarray:
        """(N, V, T) int32, memory-mapped."""
        found = self._checked("frames.npy", lambda path, hashes: _array(path, hashes, mapped=True))
        if found.ndim != 3 or found.shape[:2] != self.logits.shape[:2] or found.dtype.kind != "i":
            raise self._unfit(f"frames.npy has shape {found.shape}, logits.npy {self.logits.shape}")
        return found

    @cached_property
    def views(self) -> list[dict[str, Any]]:
        """Of each view: clip, crop, place, box (x1, y1, x2, y2), flip."""
        found = self._checked("views.json", _json)
        if not isinstance(found, list) or not all(isinstance(view, dict) and view.keys() >= _VIEW for view in found):
            raise self._unfit("views.json does not describe views")
        return found

    @cached_property
    def ledger(self) -> list[dict[str, Any]]:
        """Videos that failed or were repaired: sample, path, status, reason."""
        if not self.verified and not (self.folder / "ledger.jsonl").is_file():  # of an earlier version: failures only
            reasons = self.summary.get("failures", {})
            rows = [(i, self.ids[i]) for i in np.flatnonzero(self.failed)]
            return [{"sample": int(i), "path": p, "status": "failed", "reason": reasons.get(p, "")} for i, p in rows]
        found = self._checked("ledger.jsonl", lambda path, hashes: _lines(path, hashes, dict))
        if not all(row.keys() >= _LEDGER and row["sample"] in range(len(self.ids)) for row in found):
            raise self._unfit("ledger.jsonl names no video of this list")
        return found

    def _checked(self, name: str, read: Callable[[Path, Any], Any]) -> Any:
        try:
            found = read(self.folder / name, self.summary.get("files"))
        except (OSError, Damaged) as error:
            self._of_this_evaluation(None)
            raise self._unfit(str(error)) from error
        return self._of_this_evaluation(found)

    def _unfit(self, reason: str) -> UserError:
        return UserError(f"{self.folder}: cannot be read ({reason}); run the evaluation again")


class Damaged(ValueError):  # noqa: N818 (the state of a file)
    """A file of a result that is not as it was written."""


_VIEW = {"clip", "crop", "flip"}
_LEDGER = {"sample", "path", "status", "reason"}


def summary_checksum(summary: dict[str, Any]) -> str:
    """Return the sha256 of all that a summary says, whatever the order of its keys and its spaces."""
    content = {key: value for key, value in summary.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _own_checksum(summary: dict[str, Any], name: str) -> str:
    try:
        return summary_checksum(summary)
    except RecursionError as error:
        raise Damaged(f"{name}: {error}") from error


def read_summary(path: Path) -> dict[str, Any]:
    """Return what `results/<name>.json` says, checked.

    Raises:
        Damaged: no summary, or not as it was written.
        OSError: it cannot be read.
    """
    summary = _parsed(_bytes(path), path.name)
    if not isinstance(summary, dict):
        raise Damaged(f"{path.name} holds no summary")
    if ("files" in summary or "checksum" in summary) and summary.get("checksum") != _own_checksum(summary, path.name):
        raise Damaged(f"{path.name} has another checksum than it says")
    wanted = {"class_names": list, "metrics": dict, "protocol": dict}
    optional = {"counts": dict, "failures": dict, "cost": dict, "config": dict, "files": dict}
    for key, kind in (wanted | optional).items():
        if (key in summary or key in wanted) and not isinstance(summary.get(key), kind):
            raise Damaged(f"{path.name} has no {key!r}, or not of the kind that belongs there")
    if not all(isinstance(name, str) for name in summary["class_names"]):
        raise Damaged(f"{path.name}: 'class_names' are not all text")
    for key in ("metrics", "cost", "counts"):
        wrong = [name for name, value in summary.get(key, {}).items() if not isinstance(value, int | float | None)]
        if wrong:
            raise Damaged(f"{path.name}: {key}.{wrong[0]} is not a number")
    try:
        protocols.Protocol.from_dict(summary["protocol"])
    except Exception as error:  # of values that are not those of a protocol almost anything can be raised
        raise Damaged(f"{path.name}: 'protocol' is not one ({type(error).__name__}: {error})") from error
    return summary


def check_shapes(
    ids: list[str],
    labels: np.ndarray,
    scores: np.ndarray,
    logits: np.ndarray,
    targets: np.ndarray | None,
    summary: dict[str, Any],
) -> None:
    """Raise Damaged if the files are not of one evaluation: N videos, K classes, kinds of numbers, range of labels."""
    shapes = {"labels": (labels, 1, "iu"), "scores": (scores, 2, "f"), "logits": (logits, 3, "f")}
    shapes |= {} if targets is None else {"targets": (targets, 2, "b")}
    for name, (array, dimensions, kinds) in shapes.items():
        if array.ndim != dimensions or array.dtype.kind not in kinds:
            raise Damaged(f"{name}.npy has shape {array.shape} and type {array.dtype}, which {name} never have")
    counts = {"ids.txt": len(ids)} | {f"{name}.npy": len(array) for name, (array, _, _) in shapes.items()}
    counts |= {"counts.videos": summary["counts"]["videos"]} if "videos" in summary.get("counts", {}) else {}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise Damaged(f"different numbers of videos: {each}")
    classes = {name: array.shape[-1] for name, (array, _, _) in shapes.items() if name != "labels"}
    classes["class_names"] = len(summary["class_names"])
    if len(set(classes.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in classes.items())
        raise Damaged(f"different numbers of classes: {each}")
    if logits.shape[1] < 1:
        raise Damaged("logits.npy has no views")
    lowest = -1 if targets is not None else 0
    if len(labels) and (labels.min() < lowest or labels.max() >= scores.shape[1]):
        raise Damaged(f"labels.npy has a label outside 0..{scores.shape[1] - 1}")


def _regular(path: Path) -> Path:
    """Raise Damaged if a pipe, device or folder is in the place of a file: opening a pipe may never return."""
    if path.exists() and not path.is_file():
        raise Damaged(f"{path.name} is not a regular file")
    return path


def _bytes(path: Path) -> bytes:
    return _regular(path).read_bytes()


def _compare(data: bytes | Path, name: str, hashes: dict[str, Any] | None) -> None:
    """Raise Damaged if bytes, or a file, are not those whose hash the summary has."""
    if hashes is None:  # of an earlier version
        return
    found = files.sha256(data) if isinstance(data, Path) else hashlib.sha256(data).hexdigest()
    if hashes.get(name) != found:
        raise Damaged(f"{name} has another checksum than the summary says")


def _array(path: Path, hashes: dict[str, Any] | None, *, mapped: bool = False) -> np.ndarray:
    data = _regular(path) if mapped else _bytes(path)
    _compare(data, path.name, hashes)
    try:
        if isinstance(data, Path):
            return np.load(data, mmap_mode="r", allow_pickle=False)
        return np.load(io.BytesIO(data), allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make numpy raise almost anything
        raise Damaged(f"{path.name}: {error or type(error).__name__}") from error


def _parsed(data: bytes, name: str) -> Any:
    try:
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name}: {error}") from error


def _json(path: Path, hashes: dict[str, Any] | None) -> Any:
    data = _bytes(path)
    _compare(data, path.name, hashes)
    return _parsed(data, path.name)


def _lines(path: Path, hashes: dict[str, Any] | None, kind: type) -> list[Any]:
    """Return the JSON values of a file with one a line, all of one kind."""
    data = _bytes(path)
    _compare(data, path.name, hashes)
    rows = [_parsed(line, path.name) for line in data.splitlines()]
    if not all(isinstance(row, kind) for row in rows):
        raise Damaged(f"{path.name} has a line that is no {kind.__name__}")
    return rows


def _stamp(summary_file: Path) -> tuple[int, ...] | None:
    """What tells one summary file from another of the same name; None if there is none."""
    try:
        status = summary_file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _replaced(folder: Path) -> UserError:
    return UserError(f"{folder}: was evaluated anew while it was read; run this command again")


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, float64 inside, float32 out."""
    return metrics.probabilities(logits).astype(np.float32)
