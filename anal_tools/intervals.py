"""Estimate how certain the numbers of an evaluation are: an interval for every metric.

Top-1 and top-5 are shares of videos and have Wilson's interval, which also holds for few videos and near 100 %. Every
other metric has a percentile bootstrap interval over videos (Efron and Tibshirani 1993, section 13.3): it draws as many
videos as the list has from it with replacement, many times, and computes the metric of each draw. Both show how the
numbers vary with the videos. To see how they vary with the seed, train several times (`compare --seeds`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from anal_tools.evaluate.scoring import LEVEL, RESAMPLES
from utils.metrics import Metric, Videos

FEWER = 200  # resamples of a metric that has no short form here, on a large list
LARGE = 200_000  # scores, N x K; a list with more is large

_RANK = {"top1": 1, "top5": 5, "mean_class_accuracy": 1}  # a video is right if its label is among the first k
_Z = 1.959964  # of a normal distribution: the ends of its middle 95 %

Draw = Callable[[np.ndarray], float]  # rows (N,) -> the metric of these videos


def of_metrics(videos: Videos, shown_metrics: list[Metric]) -> dict[str, tuple[float, float]]:
    """Return name -> lower and upper end, in the unit that is shown; all metrics use the same draws.

    A calibration error can only rise by chance: draws have a larger one than the list, as the list has a larger one
    than the model. Its interval is mirrored (basic bootstrap, Davison and Hinkley 1997, section 5.2), and cut at 0.

    If every video is right, or none, all draws are equal, although other videos need not be. The class mean then has
    Wilson's interval too.
    """
    return {metric.name: _of(videos, metric) for metric in shown_metrics}


def _of(videos: Videos, metric: Metric) -> tuple[float, float]:
    count = len(videos.labels)
    if not count:
        return float("nan"), float("nan")

    right = videos.right(_RANK[metric.name]) if metric.name in _RANK else None
    if right is not None and (metric.name in ("top1", "top5") or right.all() or not right.any()):
        return wilson(int(right.sum()), count)

    # All others: draw rows, and compute the metric of each draw
    short = _SHORT.get(metric.name)
    resamples = FEWER if short is None and videos.scores.size > LARGE else RESAMPLES
    draw = short(videos) if short else _any(videos, metric)
    # The same seed for each metric, so that all see the same draws
    generator = np.random.Generator(np.random.Philox(0))
    values = np.array([draw(generator.integers(0, count, count)) for _ in range(resamples)])
    low, high = np.quantile(values[np.isfinite(values)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])

    if metric.name == "calibration_error":
        estimate = metric.compute(videos)
        return max(0.0, float(2 * estimate - high)), max(0.0, float(2 * estimate - low))
    return float(low), float(high)


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the score interval of a share in per cent (Wilson 1927), 95 %."""
    share, spread = right / count, _Z**2 / count
    half = _Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = ((share + spread / 2 + side * half) / (1 + spread) for side in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)


def _any(videos: Videos, metric: Metric) -> Draw:
    """Return a function that computes the metric itself from the scores of the drawn videos."""

    def draw(rows: np.ndarray) -> float:
        parts = {
            field.name: None if (value := getattr(videos, field.name)) is None else value[rows]
            for field in dataclasses.fields(videos)
        }
        return metric.compute(Videos(**parts))  # pyright: ignore[reportArgumentType]

    return draw


def _mean_class(videos: Videos) -> Draw:
    """Return a function like `metrics.mean_class_accuracy` that needs only label and prediction of each video."""
    classes = videos.scores.shape[1]
    labels, predicted = np.asarray(videos.labels, np.int64), videos.predicted
    right = (labels == predicted).astype(np.float64)

    def draw(rows: np.ndarray) -> float:
        drawn_labels, guesses = labels[rows], predicted[rows]
        count = np.bincount(drawn_labels, minlength=classes)
        hits = np.bincount(drawn_labels, weights=right[rows], minlength=classes)
        # A class counts if it has videos or predictions, as in `metrics`
        seen = (count > 0) | (np.bincount(guesses[guesses >= 0], minlength=classes) > 0)
        return 100 * float((hits[seen] / np.maximum(count[seen], 1)).mean()) if seen.any() else 0.0

    return draw


def _calibration(videos: Videos, bins: int = 15) -> Draw:
    """Return a function like `metrics.calibration_error` that needs only bin and gap of each video."""
    read = np.flatnonzero(videos.predicted >= 0)
    confidence = np.asarray(videos.scores, np.float64)[read, videos.predicted[read]]
    # Unreadable videos go into one more bin, which is not counted
    gaps, place = np.zeros(len(videos.labels)), np.full(len(videos.labels), bins)
    gaps[read] = (videos.predicted[read] == videos.labels[read]) - confidence
    # Bins are open below and closed above, so 1.0 belongs to the last one
    place[read] = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)

    def draw(rows: np.ndarray) -> float:
        drawn = place[rows]
        total = int((drawn < bins).sum())
        sums = np.bincount(drawn, weights=gaps[rows], minlength=bins + 1)[:bins]
        # |sum of gaps| / total is the weighted mean of the bins' |accuracy - confidence|
        return 100 * float(np.abs(sums).sum() / total) if total else float("nan")

    return draw


_SHORT: Mapping[str, Callable[[Videos], Draw]] = {
    "mean_class_accuracy": _mean_class,
    "calibration_error": _calibration,
}


def text(ends: tuple[float, float]) -> str:
    """Return `91.20 to 94.90`, or "" without an interval."""
    return f"{ends[0]:.2f} to {ends[1]:.2f}" if all(map(np.isfinite, ends)) else ""
