"""What the benchmarks share: the type of their figures, and types of options."""

from __future__ import annotations

import argparse
import math
from typing import Any

Figures = dict[str, Any]  # what a benchmark prints as one JSON line


def not_negative(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0, as `benchmark step` prints it")
    return value
