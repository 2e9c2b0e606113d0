"""Metrics of ranked scores: average precision, and those of YouTube-8M for videos with several labels.

Scores are (N, K), targets (N, K) bool: which classes a video shows. A row of nan is a video that could not be read: its
labels count as not found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import metrics


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Area under the steps of each class's precision-recall curve; equal scores enter together.

    AP = sum of (recall_n - recall_(n-1)) * precision_n over thresholds, not interpolated (MMAction2, scikit-learn).

    Args:
        scores: (N, K).
        targets: (N, K) bool.

    Returns:
        (K,) float64, 0..1; nan for a class without a video.
    """
    scores = _lowest_if_unread(scores)
    targets = np.asarray(targets, dtype=bool)
    result = np.full(scores.shape[1], np.nan)
    for k in np.flatnonzero(targets.any(axis=0)):
        result[k] = _step_area(scores[:, k], targets[:, k])
    return result


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the classes that have a video; 0 if none has."""
    values = average_precision(scores, targets)
    seen = ~np.isnan(values)
    return float(values[seen].mean()) if seen.any() else 0.0


def hit_at_k(scores: np.ndarray, targets: np.ndarray, k: int = 1) -> float:
    """Share of videos with one of their labels among the first k predictions; k = 1 is YouTube-8M's hit@1."""
    scores, targets = _lowest_if_unread(scores), np.asarray(targets, dtype=bool)
    if not len(scores):
        return 0.0
    right = np.take_along_axis(targets, _order(scores)[:, :k], axis=1).any(axis=1)
    return float((right & np.isfinite(scores[:, 0])).mean())


def precision_at_equal_recall(scores: np.ndarray, targets: np.ndarray) -> float:
    """YouTube-8M PERR: mean over the videos of the precision among their first k, k being their number of labels.

    A score that is not above 0 counts as no prediction; a video without labels contributes 0.
    """
    scores, targets = _lowest_if_unread(scores), np.asarray(targets, dtype=bool)
    if not len(scores):
        return 0.0
    order = _order(scores)
    right = np.take_along_axis(targets, order, axis=1) & (np.take_along_axis(scores, order, axis=1) > 0)
    labels = targets.sum(axis=1)
    found = np.where(np.arange(scores.shape[1]) < labels[:, None], right, False).sum(axis=1)
    return float((found / np.maximum(labels, 1)).mean())


def global_average_precision(scores: np.ndarray, targets: np.ndarray, top: int = 20) -> float:
    """YouTube-8M GAP: average precision over the pooled first `top` predictions of all videos.

    Predictions are ordered by score over all videos; recall is of all labels, also of those outside the first `top`.
    """
    scores, targets = _lowest_if_unread(scores), np.asarray(targets, dtype=bool)
    labels = int(targets.sum())
    if not labels:
        return 0.0
    order = _order(scores)[:, :top]
    pooled = np.take_along_axis(scores, order, axis=1).ravel()
    right = (np.take_along_axis(targets, order, axis=1) & np.isfinite(scores[:, :1])).ravel()
    right = right[np.argsort(-pooled, kind="stable")]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(precision[right].sum() / labels)


def multi_label_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """mean_average_precision, gap, hit1, perr of a list with several labels per video, in per cent."""
    return {
        "mean_average_precision": 100 * mean_average_precision(scores, targets),
        "gap": 100 * global_average_precision(scores, targets),
        "hit1": 100 * hit_at_k(scores, targets),
        "perr": 100 * precision_at_equal_recall(scores, targets),
    }


def tally_of(
    records: Any, num_class: int, *, device: torch.device | str = "cpu", average: str = "prob"
) -> metrics.Tally | Gathered:
    """What counts the videos of an evaluation: by one label each, or by the several that `records.targets` has."""
    targets = getattr(records, "targets", None)
    if targets is None:
        return metrics.Tally(records.labels, num_class, device=device, average=average)
    return Gathered(targets, device=device, average=average)


class Gathered:
    """The scores of all videos of a list with several labels per video, one tensor that ranks can sum.

    Args:
        targets: (N, K) bool.
        device: where `counts` lives.
        average: how the views of a video are joined, one of `metrics.AVERAGES`.

    Attributes:
        counts: (N, K + 2) float64: scores of each video, whether it was seen, whether it could be read.
    """

    def __init__(self, targets: np.ndarray, *, device: torch.device | str = "cpu", average: str = "prob") -> None:
        self.targets, self.average = np.asarray(targets, dtype=bool), average
        videos, num_class = self.targets.shape
        self.counts = torch.zeros(videos, num_class + 2, dtype=torch.float64, device=device)

    def add(self, sample: int, logits: Tensor | None) -> None:
        """Take one video: its index in the list, and (V, K) of its views or None if it could not be read."""
        row = self.counts[sample]
        row[-2] += 1
        if logits is not None:
            wide = logits.double()
            row[:-2] = wide.mean(0).sigmoid() if self.average == "logit" else wide.sigmoid().mean(0)
            row[-1] += 1

    def metrics(self) -> dict[str, float]:
        """The scores as numbers.

        Returns:
            num_videos, failed; mean_average_precision, gap, hit1, perr, top1 (the same as hit1), top5 (one of the first
            five is right), per cent of all videos; loss: binary cross-entropy, mean over videos and classes.
        """
        table = self.counts.cpu().numpy()
        seen, read = table[:, -2] > 0, table[:, -1] > 0
        scores, targets = np.where(read[:, None], table[:, :-2], np.nan)[seen], self.targets[seen]
        good = scores[read[seen]].clip(1e-12, 1 - 1e-12)
        right = np.where(targets[read[seen]], good, 1 - good)
        found = multi_label_metrics(scores, targets)
        return {
            "num_videos": int(seen.sum()),
            "failed": int((seen & ~read).sum()),
            **found,
            "top1": found["hit1"],
            "top5": 100 * hit_at_k(scores, targets, 5),
            "loss": float(-np.log(right).mean()) if right.size else float("nan"),
        }


def _order(scores: np.ndarray) -> np.ndarray:
    """Classes by falling score; of equal ones the higher index first, as everywhere (utils/metrics.py)."""
    return scores.shape[1] - 1 - np.argsort(-scores[:, ::-1], axis=1, kind="stable")


def _lowest_if_unread(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    return np.where(np.isnan(scores).any(axis=1, keepdims=True), -np.inf, scores)


def _step_area(scores: np.ndarray, targets: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    scores, targets = scores[order], targets[order]
    ends = np.append(np.flatnonzero(np.diff(scores) != 0), len(scores) - 1)  # the last row of each group of equal ones
    found = np.cumsum(targets)[ends]
    precision, recall = found / (ends + 1), found / found[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())
