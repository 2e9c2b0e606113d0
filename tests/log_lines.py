"""Read a log.txt back, for tests."""

from __future__ import annotations

import re
from pathlib import Path

from utils.log import METERS, parse_event

_NUMBER = r"([-+.\w]+)"
_TRAINING = re.compile(
    r"\] Iter: \[(\d+)/(\d+)\] "
    + " ".join(rf"{title} {_NUMBER} \({_NUMBER}\)" for title, _, _ in METERS)
    + rf" LR {_NUMBER}"
)
_RECORD = re.compile(r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00\] (.*)")


def odd_lines(path: Path) -> list[str]:
    """Return the lines of a log.txt that are neither an event nor the line of progress or of a validation."""
    odd = []
    for text in path.read_text("utf-8").splitlines():
        record = _RECORD.fullmatch(text)
        if record is None or not (parse_event(record[1]) or record[1].startswith(("Iter: [", " * "))):
            odd.append(text)
    return odd


def parse_log(path: Path) -> list[dict[str, float]]:
    """Return the training lines of a log.txt, one per step; steps done again after a restart count once, as done last.

    Returns:
        For each line step, last, lr, and of time, data, loss, top1, top5 the value and the average (``loss_avg``).
    """
    lines: list[dict[str, float]] = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        match = _TRAINING.search(text)
        if not match:
            continue
        step, last, *numbers, lr = match.groups()
        line = {"step": int(step), "last": int(last), "lr": float(lr)}
        for index, (_, key, _) in enumerate(METERS):
            line[key], line[f"{key}_avg"] = float(numbers[2 * index]), float(numbers[2 * index + 1])
        while lines and lines[-1]["step"] >= line["step"]:
            lines.pop()
        lines.append(line)
    return lines
