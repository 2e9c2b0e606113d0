"""Read the folders in which evaluations keep their results (result_parts.py writes them).

`results/<name>/` holds, for the N videos of the list in list order, the V views of the protocol and K classes:

* `ids.txt`: one path per line, as the list has it (JSON-quoted, so that any name fits on its line)
* `labels.npy` (N,) int32; the first label if a video may have several, -1 if it has none
* `targets.npy` (N, K) bool: only if a video may have several labels
* `logits.npy` (N, V, K) float32 or float16; NaN in the rows of a video that could not be read
* `scores.npy` (N, K) float32: probabilities, joined over the views by the protocol's average
* `frames.npy` (N, V, T) int32: ordinals of the frames that the model saw, -1 if the video could not be read
* `views.json`: for each view its clip, crop, place and flip, and its box on the first video that could be read
* `ledger.jsonl`: one row for each video that failed or was repaired: sample, path, status, reason

`results/<name>.json` holds the protocol, the hashes of list and weights, the counts and the metrics. It is written
last, so a result with it is complete. A repeated evaluation removes it first, and only after the new files are written.
It holds the sha256 of each file (`files`) and of its own content (`checksum`), and readers compare them. Results of
earlier versions have neither: only their shapes are checked, and `Results.verified` is False.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict, TypeVar, cast

import numpy as np

from anal_tools.evaluate import protocols
from utils import files, metrics, renamed
from utils.errors import UserError, refuse_odd_file

_T = TypeVar("_T")
_TRIES = 3  # attempts to read a result that is replaced meanwhile


class Cost(TypedDict, total=False):
    """What scoring a video takes, in 10^9 multiply-accumulates, and the number of the network's parameters."""

    gmacs_per_view: float
    gmacs_per_video: float
    parameters: int


class _AlwaysThere(TypedDict):
    protocol: dict[str, object]
    class_names: list[str]
    metrics: dict[str, float]


class Summary(_AlwaysThere, total=False):
    """The content of `results/<name>.json`; results of earlier versions lack some keys."""

    list: str
    list_hash: str
    root: str
    weights: str
    weights_are: str
    weights_hash: str
    step: int | None
    config: dict[str, object]
    cost: Cost
    ranks: int
    seconds: float
    counts: dict[str, int]
    failures: dict[str, str]
    files: dict[str, str]
    folds: dict[str, dict[str, float]]  # of a pooled result: the metrics of each fold
    checksum: str


class View(TypedDict):
    """One view of the protocol, with its box on the first video that could be read."""

    clip: int
    crop: int
    place: str
    box: tuple[int, int, int, int] | None
    flip: bool


class LedgerRow(TypedDict):
    """A video that failed or was repaired."""

    sample: int
    path: str
    status: str
    reason: str


class DamagedResult(ValueError):  # noqa: N818 (the state of a file)
    """A file of a result that differs from what was written."""


@dataclass(frozen=True)
class Results:
    """One finished evaluation, read from `results/<name>`; shapes as in the module's docstring.

    `logits` and `frames` are memory-mapped: read them in blocks.
    """

    name: str
    ids: list[str]
    labels: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    summary: Summary
    exp: Path = Path()
    targets: np.ndarray | None = None
    stamp: tuple[int, ...] | None = None  # of the summary file as it was read

    @classmethod
    def names(cls, exp: Path) -> list[str]:
        """Return the finished evaluations of an experiment, oldest first."""
        summaries = Path(exp, "results").glob("*.json")
        return [path.stem for path in sorted(summaries, key=lambda path: path.stat().st_mtime)]

    @classmethod
    def load(cls, exp: Path, name: str | None = None) -> Results:
        """Read one evaluation of an experiment, the most recent one by default.

        Raises:
            UserError: there is no such result, or its files are not complete.
        """
        exp = Path(exp)
        if name is None:
            names = cls.names(exp)
            if not names:
                raise UserError(f"{exp}: no results yet; run `python main.py eval {exp}` first")
            name = names[-1]

        summary_file = exp / "results" / f"{name}.json"
        if not summary_file.is_file():
            known = ", ".join(sorted(cls.names(exp))) or "none"
            raise UserError(f"{summary_file}: no finished evaluation of that name (available: {known})")

        folder = exp / "results" / name
        # another evaluation may replace the result at any moment; its summary's stamp changes then
        for _ in range(_TRIES):
            stamp = _stamp(summary_file)
            try:
                results = cls._read(exp, name, stamp)
            except (OSError, DamagedResult) as error:
                # the same summary before and after: the files are damaged, not replaced
                if _stamp(summary_file) == stamp:
                    raise UserError(f"{folder}: cannot be read ({error}); run the evaluation again") from error
                continue

            if stamp is not None and _stamp(summary_file) == stamp:
                return results
        raise _replaced(folder)

    @classmethod
    def _read(cls, exp: Path, name: str, stamp: tuple[int, ...] | None) -> Results:
        """Read and check everything but frames, views and ledger, which not every reader needs."""
        folder = exp / "results" / name
        # a pipe or device in the place of a file would block
        for file in ("labels.npy", "scores.npy", "logits.npy", "targets.npy", "ids.txt"):
            refuse_odd_file(folder / file)
        summary = read_summary(exp / "results" / f"{name}.json")
        hashes = summary.get("files")

        files = _Files(folder, hashes)
        # an earlier version has no list of its files
        has_targets = (folder / "targets.npy").exists() if hashes is None else "targets.npy" in hashes
        results = cls(
            name=name,
            labels=files.array("labels.npy"),
            scores=files.array("scores.npy"),
            logits=files.array("logits.npy", mapped=True),
            ids=files.lines("ids.txt", str),
            targets=files.array("targets.npy") if has_targets else None,
            summary=summary,
            exp=exp,
            stamp=stamp,
        )
        check_shapes(results)
        return results

    @property
    def folder(self) -> Path:
        """The folder `results/<name>` of the experiment."""
        return self.exp / "results" / self.name

    @property
    def class_names(self) -> list[str]:
        """Names of the K classes, in label order."""
        return self.summary["class_names"]

    @property
    def num_class(self) -> int:
        """The number of classes, K."""
        return self.scores.shape[1]

    @property
    def multi_label(self) -> bool:
        """True if a video may have several labels: `targets` has them."""
        return self.targets is not None

    @property
    def protocol(self) -> dict[str, object]:
        """The views of the evaluation as plain values (`Protocol.from_dict` reads them)."""
        return self.summary["protocol"]

    @cached_property
    def videos(self) -> metrics.Videos:
        """The scores in the form that metrics take."""
        return metrics.Videos(self.scores, self.labels, self.targets)

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Every metric, computed from the scores, including metrics that are newer than this evaluation."""
        return metrics.evaluate(self.videos)

    @property
    def failed(self) -> np.ndarray:
        """(N,) bool: True if the video could not be read; such a video counts as wrong."""
        return self.videos.failed

    @property
    def verified(self) -> bool:
        """True if the summary has the sha256 of each file; results of earlier versions do not."""
        return "files" in self.summary

    @cached_property
    def frames(self) -> np.ndarray:
        """The ordinals (N, V, T) int32 of the frames that the model saw, memory-mapped."""
        frames = self._opened(lambda files: files.array("frames.npy", mapped=True))
        if frames.ndim != 3 or frames.shape[:2] != self.logits.shape[:2] or frames.dtype.kind != "i":
            raise self._unfit(f"frames.npy has shape {frames.shape}, logits.npy {self.logits.shape}")
        return frames

    @cached_property
    def views(self) -> list[View]:
        """The V views, in the order of `logits`."""
        views = self._opened(lambda files: files.json("views.json"))
        if not isinstance(views, list) or not all(isinstance(view, dict) and view.keys() >= _VIEW for view in views):
            raise self._unfit("views.json does not describe views")
        return views

    @cached_property
    def ledger(self) -> list[LedgerRow]:
        """Videos that failed or were repaired."""
        if not self.verified and not (self.folder / "ledger.jsonl").is_file():  # an earlier version kept failures only
            reasons = self.summary.get("failures", {})
            rows = [(int(i), self.ids[i]) for i in np.flatnonzero(self.failed)]
            return [{"sample": i, "path": p, "status": "failed", "reason": reasons.get(p, "")} for i, p in rows]

        entries = self._opened(lambda files: files.lines("ledger.jsonl", dict))
        if not all(row.keys() >= _LEDGER and row["sample"] in range(len(self.ids)) for row in entries):
            raise self._unfit("ledger.jsonl names no video of this list")
        return cast("list[LedgerRow]", entries)

    def _opened(self, read: Callable[[_Files], _T]) -> _T:
        """Read a file of the folder, unless another evaluation has replaced the result since `load`."""
        failure, content = None, None
        try:
            content = read(_Files(self.folder, self.summary.get("files")))
        except (OSError, DamagedResult) as error:
            failure = error

        # check first whether the result was replaced: then the file is not damaged
        if self.stamp is not None and _stamp(self.exp / "results" / f"{self.name}.json") != self.stamp:
            raise _replaced(self.folder) from failure
        if failure is not None:
            raise self._unfit(str(failure)) from failure
        return cast("_T", content)

    def _unfit(self, reason: str) -> UserError:
        return UserError(f"{self.folder}: cannot be read ({reason}); run the evaluation again")


_VIEW = {"clip", "crop", "flip"}
_LEDGER = {"sample", "path", "status", "reason"}


@dataclass(frozen=True)
class _Files:
    """Open the files of a result: each must be a regular file with the checksum of the summary.

    Attributes:
        folder: where they are.
        hashes: {name: sha256}; None for results of an earlier version, whose bytes are not checked.
    """

    folder: Path
    hashes: Mapping[str, str] | None

    def content(self, name: str) -> bytes:
        """Return the content of a file."""
        data = self._path(name).read_bytes()
        self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    def array(self, name: str, *, mapped: bool = False) -> np.ndarray:
        """Return an array; a mapped one stays on the disk."""
        # `content` compares the hash of an array that is read into memory
        if mapped and self.hashes is not None:
            self._compare(name, files.sha256(self._path(name)))
        try:
            if mapped:
                return np.load(self._path(name), mmap_mode="r", allow_pickle=False)
            return np.load(io.BytesIO(self.content(name)), allow_pickle=False)
        except (OSError, DamagedResult):
            raise
        except Exception as error:  # damaged bytes make numpy raise almost anything
            raise DamagedResult(f"{name}: {error or type(error).__name__}") from error

    def json(self, name: str) -> object:
        """Return the value in a JSON file."""
        return _parsed(self.content(name), name)

    def lines(self, name: str, kind: type[_T]) -> list[_T]:
        """Return the values of a file with one JSON value per line, all of one kind."""
        rows = [_parsed(line, name) for line in self.content(name).splitlines()]
        if not all(isinstance(row, kind) for row in rows):
            raise DamagedResult(f"{name} has a line that is not a {kind.__name__}")
        return cast("list[_T]", rows)

    def _path(self, name: str) -> Path:
        """Return the path of a file; refuse a pipe, device or folder in its place, since opening a pipe may block."""
        path = self.folder / name
        if path.exists() and not path.is_file():
            raise DamagedResult(f"{name} is not a regular file")
        return path

    def _compare(self, name: str, digest: str) -> None:
        if self.hashes is not None and self.hashes.get(name) != digest:
            raise DamagedResult(f"{name} does not have the checksum in the summary")


def _parsed(data: bytes, name: str) -> object:
    try:
        return json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise DamagedResult(f"{name}: {error}") from error


def summary_checksum(summary: Mapping[str, object]) -> str:
    """Return the sha256 of a summary's content, independent of the order of its keys and its spaces."""
    content = {key: value for key, value in summary.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _own_checksum(summary: Mapping[str, object], name: str) -> str:
    try:
        return summary_checksum(summary)
    except RecursionError as error:
        raise DamagedResult(f"{name}: {error}") from error


def read_summary(path: Path) -> Summary:
    """Read `results/<name>.json` and check it.

    Raises:
        Damaged: the file is not a summary, or not as it was written.
        OSError: it cannot be read.
    """
    summary = _Files(path.parent, None).json(path.name)
    if not isinstance(summary, dict):
        raise DamagedResult(f"{path.name} holds no summary")
    # results of earlier versions have neither key; a summary that lost one of them is damaged
    if ("files" in summary or "checksum" in summary) and summary.get("checksum") != _own_checksum(summary, path.name):
        raise DamagedResult(f"{path.name} does not have the checksum that it contains")

    # Every reader may rely on these kinds from here on.
    required = {"class_names": list, "metrics": dict, "protocol": dict}
    optional = {"counts": dict, "failures": dict, "cost": dict, "config": dict, "files": dict}
    for key, kind in (required | optional).items():
        if (key in summary or key in required) and not isinstance(summary.get(key), kind):
            raise DamagedResult(f"{path.name} has no {key!r}, or one of the wrong type")

    if not all(isinstance(name, str) for name in summary["class_names"]):
        raise DamagedResult(f"{path.name}: 'class_names' are not all text")

    for key in ("metrics", "cost", "counts"):
        wrong = [name for name, value in summary.get(key, {}).items() if not isinstance(value, int | float | None)]
        if wrong:
            raise DamagedResult(f"{path.name}: {key}.{wrong[0]} is not a number")

    try:
        protocols.Protocol.from_dict(summary["protocol"])
    except Exception as error:  # values of a different kind can raise almost anything
        raise DamagedResult(f"{path.name}: 'protocol' is invalid ({type(error).__name__}: {error})") from error
    return cast("Summary", renamed.summary(summary))


def check_shapes(results: Results) -> None:
    """Raise Damaged if the files are not of one evaluation: N videos, K classes, kinds of numbers, range of labels."""
    labels, logits, scores, targets = results.labels, results.logits, results.scores, results.targets
    # {name: (array, number of axes, letters of numpy's kinds)}
    shapes = {"labels": (labels, 1, "iu"), "scores": (scores, 2, "f"), "logits": (logits, 3, "f")}
    shapes |= {} if targets is None else {"targets": (targets, 2, "b")}
    for name, (array, dimensions, kinds) in shapes.items():
        if array.ndim != dimensions or array.dtype.kind not in kinds:
            raise DamagedResult(f"{name}.npy has shape {array.shape} and type {array.dtype}, which {name} never have")

    counts = {"ids.txt": len(results.ids)} | {f"{name}.npy": len(array) for name, (array, _, _) in shapes.items()}
    counted = results.summary.get("counts", {})
    counts |= {"counts.videos": counted["videos"]} if "videos" in counted else {}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DamagedResult(f"different numbers of videos: {each}")

    classes = {name: array.shape[-1] for name, (array, _, _) in shapes.items() if name != "labels"}
    classes["class_names"] = len(results.class_names)
    if len(set(classes.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in classes.items())
        raise DamagedResult(f"different numbers of classes: {each}")

    if logits.shape[1] < 1:
        raise DamagedResult("logits.npy has no views")
    lowest = -1 if targets is not None else 0  # -1: a video without a label
    if len(labels) and (labels.min() < lowest or labels.max() >= scores.shape[1]):
        raise DamagedResult(f"labels.npy has a label outside 0..{scores.shape[1] - 1}")


def _stamp(summary_file: Path) -> tuple[int, ...] | None:
    """Return values that differ between two summary files of the same name; None if there is no file."""
    try:
        status = summary_file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _replaced(folder: Path) -> UserError:
    return UserError(f"{folder}: was evaluated again while it was being read; run this command again")
