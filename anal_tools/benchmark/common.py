"""Types that the benchmarks share: that of their figures, and argparse types of their options."""

from __future__ import annotations

import argparse
import math
from typing import Any

Figures = dict[str, Any]  # what a benchmark prints as one JSON line


def not_negative(text: str) -> int:
    """Parse a whole number of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def seconds(text: str) -> float:
    """Parse a number of seconds above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        # NaN fails the check below, so that both mistakes get one message
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0, as `benchmark step` prints it")
    return value
