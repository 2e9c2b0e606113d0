"""Read the progress lines of a log.txt back, for tests."""

from __future__ import annotations

import re
from pathlib import Path

from utils.log import METERS

_NUMBER = r"([-+.\w]+)"
_TRAINING = re.compile(
    r"\] Iter: \[(\d+)/(\d+)\] "
    + " ".join(rf"{title} {_NUMBER} \({_NUMBER}\)" for title, _, _ in METERS)
    + rf" LR {_NUMBER}"
)


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
