"""How far the run in an experiment folder has come, read from its files; and small files of JSON lines."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.faults import kind_of_file

_TAIL = 1 << 18
_STEP = re.compile(r"Iter: \[(\d+)/(\d+)\]")
_AT = re.compile(r"\] (?:stopped by .* at iteration (\d+)|finished: (\d+) iterations)")
_TOP1 = re.compile(r"\] +\* Prec@1 ([\d.]+)")


@dataclasses.dataclass(frozen=True)
class Progress:
    """Last iteration in log.txt, the planned last one, and the best validation top-1 in per cent; None: not known."""

    step: int | None = None
    last: int | None = None
    top1: float | None = None

    def __str__(self) -> str:
        step = "-" if self.step is None else f"{self.step}/{self.last or '?'}"
        return f"{step}  {'-' if self.top1 is None else f'{self.top1:.2f}'}"


def read(exp: Path) -> Progress:
    """Read the end of log.txt."""
    if kind_of_file(exp / "log.txt") is not None:  # opening a pipe would wait for ever
        return Progress()
    try:
        with (exp / "log.txt").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return Progress()
    lines = [(int(step), int(last)) for step, last in _STEP.findall(text)]
    others = [int(a or b) for a, b in _AT.findall(text)]
    top1 = [float(value) for value in _TOP1.findall(text)]
    step = max([step for step, _ in lines[-1:]] + others[-1:], default=None)
    return Progress(step, lines[-1][1] if lines else None, max(top1, default=None))


def mark(exp: Path) -> list[int]:
    """What grows when a job gets on: the last iteration, and the number of part files of evaluations."""
    return [read(exp).step or 0, len(list((exp / "results").glob("*/part-*.npz")))]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a torn line is passed over, a missing file has none."""
    rows = []
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Append one row, in one write."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
