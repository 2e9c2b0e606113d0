"""Accuracy: top-k, mean class accuracy, the confusion matrix; on tensors while training, on arrays afterwards.

One rule for equal scores everywhere: the higher class index ranks first (that of MMAction2's top-k), so that top-1, the
predictions and the confusion matrix always agree. A row that holds a nan is right for no label: a video that could not
be read counts as wrong.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from utils import mixup

_LOSS_UNIT = 2.0**24  # losses are summed as integers of this fraction: the sum over ranks does not depend on the order


def correct_at_k(logits: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5)) -> Tensor:
    """Which clips have their label among the k highest scores.

    Args:
        logits: (B, K).
        labels: (B,) int64.
        ks: one that is not below K finds every label.

    Returns:
        (len(ks), B) bool, on the device of the logits; nothing is read back from it.
    """
    own = logits.gather(1, labels.unsqueeze(1))  # (B, 1)
    tied = (logits == own) & (torch.arange(logits.shape[1], device=logits.device) > labels.unsqueeze(1))
    rank = ((logits > own) | tied).sum(1)  # (B,) 0 for the best
    readable = ~logits.isnan().any(1)
    return torch.stack([(rank < k) & readable for k in ks])


def mixed_accuracy(logits: Tensor, labels: Tensor, lam: float = 1.0, *, ks: tuple[int, ...] = (1, 5)) -> Tensor:
    """Top-k accuracies of a batch in per cent, (len(ks),) float32; under mixup those of both labels, weighted alike."""
    right = correct_at_k(logits, labels, ks).float()
    if lam != 1.0:
        right = lam * right + (1 - lam) * correct_at_k(logits, mixup.partner(labels), ks).float()
    return 100 * right.mean(1)


class Tally:
    """Exact counts of an evaluation, one integer tensor that ranks can sum.

    Args:
        num_class: K.
        device: where `counts` lives.

    Attributes:
        counts: (5 + 3K,) int64: videos, failed, right at 1, right at 5, loss; then per class: right, videos, predicted.
    """

    def __init__(self, num_class: int, device: torch.device | str = "cpu") -> None:
        self.num_class = num_class
        self.counts = torch.zeros(5 + 3 * num_class, dtype=torch.int64, device=device)

    def add(self, label: int, logits: Tensor | None) -> None:
        """Count one video.

        Args:
            label: its class.
            logits: (V, K) of its views; None if it could not be read.
        """
        videos, per_class = self.counts[:5], self.counts[5:].view(3, self.num_class)
        videos[0] += 1
        per_class[1, label] += 1
        if logits is None:
            videos[1] += 1
            return
        wide = logits.double()
        score = wide.softmax(1).mean(0)  # (K,)
        right = correct_at_k(score.unsqueeze(0), torch.full((1,), label, device=score.device))[:, 0]
        loss = np.log(len(wide)) - wide.log_softmax(1)[:, label].logsumexp(0)  # of the mean probability
        videos[2:4] += right
        videos[4] += (loss.clamp(max=1e6) * _LOSS_UNIT).round().long()
        per_class[0, label] += right[0]
        highest_index_first = self.num_class - 1 - score.flip(0).argmax()
        per_class[2].index_add_(0, highest_index_first.view(1), videos.new_ones(1))

    def metrics(self) -> dict[str, float]:
        """num_videos, failed, top1, top5, mean_class_accuracy (per cent), loss (of the videos that could be read)."""
        total, failed, top1, top5, loss = self.counts[:5].tolist()
        right, videos, predicted = self.counts[5:].view(3, self.num_class).cpu().numpy()
        return {
            "num_videos": total,
            "failed": failed,
            "top1": 100 * top1 / max(total, 1),
            "top5": 100 * top5 / max(total, 1),
            "mean_class_accuracy": 100 * _mean_over_seen(right, videos, predicted),
            "loss": loss / _LOSS_UNIT / (total - failed) if total > failed else float("nan"),
        }


def merge_views(values: np.ndarray, rule: str = "prob") -> np.ndarray:
    """One row per video out of one per view.

    Args:
        values: (N, V, K).
        rule: "prob": mean of the softmax; "score": mean of the values as they are; "max": their maximum.

    Returns:
        (N, K) float64.
    """
    values = np.asarray(values, dtype=np.float64)
    if rule == "prob":
        exponentials = np.exp(values - values.max(axis=2, keepdims=True))
        return (exponentials / exponentials.sum(axis=2, keepdims=True)).mean(axis=1)
    if rule not in ("score", "max"):
        raise ValueError(f"rule {rule!r} is none of prob, score, max")
    return values.mean(axis=1) if rule == "score" else values.max(axis=1)


def predictions(scores: np.ndarray) -> np.ndarray:
    """(N, K) -> (N,) int64, the class that ranks first; -1 for a row with a nan."""
    scores = np.asarray(scores)
    first = scores.shape[1] - 1 - scores[:, ::-1].argmax(axis=1)
    return np.where(np.isnan(scores).any(axis=1), -1, first)


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows with the label among the k highest scores, 0..1."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if len(labels) == 0:
        return 0.0
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    tied = (scores == own) & (np.arange(scores.shape[1]) > labels[:, None])
    rank = ((scores > own) | tied).sum(axis=1)
    return float(((rank < k) & ~np.isnan(scores).any(axis=1)).mean())


def confusion_matrix(
    predicted: np.ndarray, labels: np.ndarray, num_class: int, *, normalize: str | None = None
) -> np.ndarray:
    """Rows are the true classes, columns the predicted ones; always (K, K), whatever classes occur.

    Args:
        predicted: (N,); -1 (nothing was predicted) is left out.
        labels: (N,).
        num_class: K.
        normalize: "true": rows sum to 1; "pred": columns do; "all": the matrix does; None: counts. Empty sums give 0.

    Returns:
        int64 counts, or float64.
    """
    predicted, labels = np.asarray(predicted, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    if len(labels) and (labels.min() < 0 or max(labels.max(), predicted.max()) >= num_class):
        raise ValueError(f"a class outside 0..{num_class - 1}")
    seen = predicted >= 0
    flat = np.bincount(labels[seen] * num_class + predicted[seen], minlength=num_class * num_class)
    counts = flat.reshape(num_class, num_class)
    if normalize is None:
        return counts
    axes = {"true": 1, "pred": 0, "all": (0, 1)}
    if normalize not in axes:
        raise ValueError(f"normalize {normalize!r} is none of true, pred, all")
    return counts / np.maximum(counts.sum(axis=axes[normalize], keepdims=True), 1)


def mean_class_accuracy(predicted: np.ndarray, labels: np.ndarray, num_class: int) -> float:
    """Mean over the classes that occur, as truth or prediction, of their share of right ones (0 if no video), 0..1."""
    matrix = confusion_matrix(predicted, labels, num_class)
    videos = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_class)
    return _mean_over_seen(matrix.diagonal(), videos, matrix.sum(axis=0))


def _mean_over_seen(right: np.ndarray, videos: np.ndarray, predicted: np.ndarray) -> float:
    seen = (videos > 0) | (predicted > 0)
    return float((right[seen] / np.maximum(videos[seen], 1)).mean()) if seen.any() else 0.0
