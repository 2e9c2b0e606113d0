"""Compare two ways that were measured in turn, so that what else the machine does meets both alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def interval_of_median(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return an interval that holds the median of the distribution with at least this probability.

    Its ends are two of the values, found with the sign test: nothing is assumed about the distribution. Raises
    ValueError for too few values.
    """
    ordered, count = sorted(values), len(values)
    outside, below = 0.0, -1  # probability that the median lies below ordered[below + 1]
    while below + 1 < count / 2:
        outside += math.comb(count, below + 1) / 2**count
        if 2 * outside > 1 - level:
            break
        below += 1
    if below < 0:
        raise ValueError(f"{count} values are too few for an interval of the median")
    return ordered[below], ordered[count - 1 - below]


def compare(ours: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Return the ratio ours / other over the pairs: median, 95 % interval, number of pairs."""
    ratios = [one / two for one, two in zip(ours, other, strict=True)]
    low, high = interval_of_median(ratios)
    measured = {"median": statistics.median(ratios), "low": low, "high": high}
    return {name: round(value, 4) for name, value in measured.items()} | {"pairs": len(ratios)}
