"""Define the rule for equal scores, and the metrics of ranked scores: average precision, and those of YouTube-8M.

Among equal scores, the class with the higher index ranks first (the rule of MMAction2's top-k), so that top-1,
predictions, curves and the confusion matrix always agree. `before`, `order` and `predictions` implement this rule, and
no other code compares scores of classes.

Scores are (N, K), targets (N, K) bool: which classes a video shows. A row of nan is a video that could not be read: it
counts as wrong for every label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch


_Array = TypeVar("_Array", "np.ndarray", "torch.Tensor")


def before(scores: _Array, label_scores: _Array, classes: _Array, labels: _Array) -> _Array:
    """Return which classes rank before a label, for numpy arrays or torch tensors.

    Args:
        scores: (N, K).
        label_scores: (N, 1), the scores of the labels.
        classes: (K,) 0 .. K - 1.
        labels: (N, 1).

    Returns:
        (N, K) bool.
    """
    return (scores > label_scores) | ((scores == label_scores) & (classes > labels))  # pyright: ignore[reportReturnType]


def order(scores: np.ndarray) -> np.ndarray:
    """Return the classes by falling score: (N, K) -> (N, K) int64."""
    # A stable sort of the reversed columns puts the higher index first among equal scores.
    return scores.shape[1] - 1 - np.argsort(-scores[:, ::-1], axis=1, kind="stable")


def predictions(scores: np.ndarray) -> np.ndarray:
    """Return the class that ranks first: (N, K) -> (N,) int64; -1 for a row with a nan."""
    scores = np.asarray(scores)
    # argmax takes the first maximum: in the reversed columns, the one with the higher index.
    first = scores.shape[1] - 1 - scores[:, ::-1].argmax(axis=1)
    return np.where(np.isnan(scores).any(axis=1), -1, first)


def rank_of(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many classes rank before the label of each row, (N,); K + 1 for a row with a nan."""
    labels = labels.astype(np.int64)[:, None]
    count = scores.shape[1]
    ranks = before(scores, np.take_along_axis(scores, labels, axis=1), np.arange(count), labels).sum(axis=1)
    return np.where(np.isnan(scores).any(axis=1), count + 1, ranks)  # K + 1: beyond every k, K itself included


def rank_of_best(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the rank of the best label of each row, (N,); K + 1 for a row without labels or with a nan."""
    ranked_targets = np.take_along_axis(targets, order(scores), axis=1)  # (N, K) by falling score
    wrong = np.isnan(scores).any(axis=1) | ~targets.any(axis=1)
    return np.where(wrong, scores.shape[1] + 1, ranked_targets.argmax(axis=1))


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the area under the steps of each class's precision-recall curve; equal scores enter together.

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
    """Return the mean over the classes that have a video; 0 if none has."""
    values = average_precision(scores, targets)
    seen = ~np.isnan(values)
    return float(values[seen].mean()) if seen.any() else 0.0


def precision_at_equal_recall(scores: np.ndarray, targets: np.ndarray) -> float:
    """Return YouTube-8M's PERR: the mean precision among each video's first k, with k its number of labels.

    A score that is not above 0 counts as no prediction; a video without labels contributes 0.
    """
    scores, targets = _lowest_if_unread(scores), np.asarray(targets, dtype=bool)
    if not len(scores):
        return 0.0

    places = order(scores)
    # Only scores above 0 count, as in YouTube-8M's eval_util.py.
    right = np.take_along_axis(targets, places, axis=1) & (np.take_along_axis(scores, places, axis=1) > 0)

    labels = targets.sum(axis=1)
    hits = np.where(np.arange(scores.shape[1]) < labels[:, None], right, False).sum(axis=1)
    return float((hits / np.maximum(labels, 1)).mean())


def global_average_precision(scores: np.ndarray, targets: np.ndarray, top: int = 20) -> float:
    """Return YouTube-8M's GAP: the average precision over the pooled first `top` predictions of all videos.

    Predictions are ordered by score over all videos. Recall refers to all labels, including those outside the first
    `top`.
    """
    scores, targets = _lowest_if_unread(scores), np.asarray(targets, dtype=bool)
    labels = int(targets.sum())
    if not labels:
        return 0.0

    places = order(scores)[:, :top]  # (N, top)
    pooled = np.take_along_axis(scores, places, axis=1).ravel()  # (N * top,)
    # Videos that could not be read have -inf scores and are never right.
    right = (np.take_along_axis(targets, places, axis=1) & np.isfinite(scores[:, :1])).ravel()
    right = right[np.argsort(-pooled, kind="stable")]

    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(precision[right].sum() / labels)


def _lowest_if_unread(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    return np.where(np.isnan(scores).any(axis=1, keepdims=True), -np.inf, scores)


def _step_area(scores: np.ndarray, targets: np.ndarray) -> float:
    # The steps of the curve lie at the ends of groups of equal scores.
    by_score = np.argsort(-scores, kind="stable")
    scores, targets = scores[by_score], targets[by_score]
    ends = np.append(np.flatnonzero(np.diff(scores) != 0), len(scores) - 1)  # the last row of each group of equal ones

    hits = np.cumsum(targets)[ends]
    precision, recall = hits / (ends + 1), hits / hits[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())
