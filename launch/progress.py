"""Read from its files how far the run in an experiment folder has come."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path

from utils import log
from utils.errors import kind_of_file

_TAIL = 1 << 18  # bytes at the end of log.txt that are read
_STEP = re.compile(r"Iter: \[(\d+)/(\d+)\](?:.* ETA (\S+))?")
_AT = re.compile(
    r"\] (?:INFO run: (?:stopped|finished) iteration=(\d+)"
    r"|stopped by .* at iteration (\d+)|finished: (\d+) iterations)"  # versions before 0.3
)
# The curve of the metric that decides on the best checkpoint, and its name; the first one that the run has is used.
_CRITERIA = {"map_val": "mAP", "top1_val": "top-1"}


@dataclasses.dataclass(frozen=True)
class RunProgress:
    """The progress of a run; a value is None if its files do not contain it.

    Attributes:
        step: last iteration in log.txt, or else in the curves.
        last: the planned last iteration.
        best: best validation accuracy so far, per cent.
        criterion: the name of `best`: top-1, or mAP if videos have several labels.
        eta: time left, as h:mm:ss.
    """

    step: int | None = None
    last: int | None = None
    best: float | None = None
    criterion: str = "top-1"
    eta: str | None = None

    @property
    def sentence(self) -> str:
        """The progress in words, such as `iteration 120 of 400, 0:03:10 left, best top-1 45.00`."""
        if self.step is None:
            return "no iteration yet"
        left = f", {self.eta} left" if self.eta else ""
        best = "" if self.best is None else f", best {self.criterion} {self.best:.2f}"
        return f"iteration {self.step} of {self.last or '?'}{left}{best}"

    def __str__(self) -> str:
        step = "-" if self.step is None else f"{self.step}/{self.last or '?'}"
        return f"{step}  {'-' if self.best is None else f'{self.best:.2f}'}"


def read(exp: Path) -> RunProgress:
    """Read the iteration from the end of log.txt, and the best accuracy from the curves, which hold all validations."""
    step, last, eta = _iteration(exp)
    try:
        curves = log.read_scalars(exp / "events" / log.SCALARS)
    except OSError:  # no validation yet, or the curves were deleted
        return RunProgress(step, last, eta=eta)

    if step is None:
        step = max((curve[-1][0] for curve in curves.values() if curve), default=None)

    for tag, name in _CRITERIA.items():
        values = [value for _, value in curves.get(tag, ()) if not math.isnan(value)]
        if values:
            return RunProgress(step, last, max(values), name, eta)

    return RunProgress(step, last, eta=eta)


def _iteration(exp: Path) -> tuple[int | None, int | None, str | None]:
    """Return the last iteration that log.txt names, the planned last one, and the time left then."""
    if kind_of_file(exp / "log.txt") is not None:  # opening a pipe would block for ever
        return None, None, None

    try:
        with (exp / "log.txt").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return None, None, None

    lines = [(int(step), int(last), eta or None) for step, last, eta in _STEP.findall(text)]
    # A stop or the end is logged after the last progress line and may be a later iteration.
    others = [int("".join(digits)) for digits in _AT.findall(text)]
    step = max([step for step, _, _ in lines[-1:]] + others[-1:], default=None)
    return (step, *lines[-1][1:]) if lines else (step, None, None)


def mark(exp: Path) -> list[int]:
    """Return numbers that grow while a job makes progress: last iteration, number of part files of evaluations."""
    return [_iteration(exp)[0] or 0, len(list((exp / "results").glob("*/part-*.npz")))]
