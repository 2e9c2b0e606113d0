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
its presence means complete. When the evaluation is repeated it goes first, and only once the new files are written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from utils import metrics
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
            except (OSError, ValueError) as error:
                if _stamp(summary_file) == stamp:
                    raise UserError(f"{parts}: cannot be read ({error}); run the evaluation again") from error
                continue
            if stamp is not None and _stamp(summary_file) == stamp:
                return cls(name=name, exp=Path(exp), stamp=stamp, **content)
        raise _replaced(parts)

    @staticmethod
    def _read(parts: Path, summary_file: Path) -> dict[str, Any]:
        for file in ("labels.npy", "scores.npy", "logits.npy", "targets.npy", "ids.txt"):
            refuse_odd_file(parts / file)
        arrays = {key: np.load(parts / f"{key}.npy", allow_pickle=False) for key in ("labels", "scores")}
        arrays["logits"] = np.load(parts / "logits.npy", mmap_mode="r", allow_pickle=False)
        ids = [json.loads(line) for line in (parts / "ids.txt").read_text("utf-8").splitlines()]
        summary = json.loads(summary_file.read_text("utf-8"))
        several = parts / "targets.npy"
        targets = np.load(several, allow_pickle=False) if several.exists() else None
        return {"ids": ids, "summary": summary, "targets": targets, **arrays}

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

    @cached_property
    def frames(self) -> np.ndarray:
        """(N, V, T) int32, memory-mapped."""
        return self._of_this_evaluation(np.load(self.folder / "frames.npy", mmap_mode="r", allow_pickle=False))

    @cached_property
    def views(self) -> list[dict[str, Any]]:
        """Of each view: clip, crop, place, box (x1, y1, x2, y2), flip."""
        return self._of_this_evaluation(json.loads((self.folder / "views.json").read_text("utf-8")))

    @cached_property
    def ledger(self) -> list[dict[str, Any]]:
        """Videos that failed or were repaired: sample, path, status, reason."""
        path = self.folder / "ledger.jsonl"
        if not path.is_file():  # of an earlier version: failures only
            reasons = self.summary.get("failures", {})
            rows = [(i, self.ids[i]) for i in np.flatnonzero(self.failed)]
            return [{"sample": int(i), "path": p, "status": "failed", "reason": reasons.get(p, "")} for i, p in rows]
        return self._of_this_evaluation([json.loads(line) for line in path.read_text("utf-8").splitlines()])


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
