"""Accuracy: top-k, mean class accuracy, the confusion matrix; on tensors while training, on arrays afterwards.

One rule for equal scores everywhere: the higher class index ranks first (that of MMAction2's top-k), so that top-1, the
predictions and the confusion matrix always agree. A row that holds a nan is right for no label: a video that could not
be read counts as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils import mixup

AVERAGES = ("prob", "logit", "sum")  # how the views of a video are joined
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


def hit_at_k(logits: Tensor, targets: Tensor, ks: tuple[int, ...] = (1, 5)) -> Tensor:
    """`correct_at_k` for several labels per clip: is any of them among the k highest scores?

    Args:
        logits: (B, K).
        targets: (B, K), above 0 at a clip's labels.
        ks: one that is not below K finds every label.

    Returns:
        (len(ks), B) bool.
    """
    best = logits.masked_fill(targets <= 0, -torch.inf)
    # The highest score of a clip's own labels, the higher class index of equal ones, is the one that is found first.
    own = logits.shape[1] - 1 - best.flip(1).argmax(1)
    return correct_at_k(logits, own, ks) & (targets > 0).any(1)


def mixed_accuracy(
    logits: Tensor,
    labels: Tensor,
    lam: float = 1.0,
    *,
    ks: tuple[int, ...] = (1, 5),
    weights: Tensor | None = None,
) -> Tensor:
    """Top-k accuracies of a batch in per cent, (len(ks),) float32; under mixup those of both labels, weighted alike.

    Several labels per clip, (B, K), count as `hit_at_k`. With `weights` (B,) the mean is weighted by them: clips of
    weight 0, which could not be read, do not count; 0 where none could.
    """
    correct = correct_at_k if labels.dim() == 1 else hit_at_k
    right = correct(logits, labels, ks).float()
    if lam != 1.0:
        right = lam * right + (1 - lam) * correct(logits, mixup.partner(labels), ks).float()
    if weights is None:
        return 100 * right.mean(1)
    total = weights.to(right.dtype).sum()
    return 100 * (right @ weights.to(right.dtype)) / torch.where(total == 0, 1, total)


class Tally:
    """Exact counts of an evaluation, one integer tensor that ranks can sum.

    Args:
        labels: (N,) of the list.
        num_class: K.
        device: where `counts` lives.
        average: how the views of a video are joined, one of `AVERAGES`.

    Attributes:
        counts: (7 + 3K,) int64: videos, failed, right at 1, right at 5, loss, right first views, shares of right views;
            then per class: right, videos, predicted.
    """

    def __init__(
        self,
        labels: np.ndarray | Sequence[int],
        num_class: int,
        *,
        device: torch.device | str = "cpu",
        average: str = "prob",
    ) -> None:
        if average not in AVERAGES:
            raise ValueError(f"average {average!r} is none of {', '.join(AVERAGES)}")
        self.labels, self.num_class, self.average = labels, num_class, average
        self.counts = torch.zeros(7 + 3 * num_class, dtype=torch.int64, device=device)

    def add(self, sample: int, logits: Tensor | None) -> None:
        """Count one video.

        Args:
            sample: its index in the list.
            logits: (V, K) of its views; None if it could not be read.
        """
        label = int(self.labels[sample])
        videos, per_class = self.counts[:7], self.counts[7:].view(3, self.num_class)
        videos[0] += 1
        per_class[1, label] += 1
        if logits is None:
            videos[1] += 1
            return
        wide = logits.double()
        logs = wide.log_softmax(1)
        if self.average == "logit":
            score = wide.mean(0).softmax(0)  # (K,)
            loss = -wide.mean(0).log_softmax(0)[label]
        else:
            score = logs.exp().mean(0)  # (K,)
            loss = np.log(len(wide)) - logs[:, label].logsumexp(0)  # of the mean probability
        own = torch.full((len(wide),), label, device=score.device)
        right = correct_at_k(score.unsqueeze(0), own[:1])[:, 0]
        views = correct_at_k(wide, own, (1,))[0]  # (V,)
        videos[2:4] += right
        videos[4] += (loss.clamp(max=1e6) * _LOSS_UNIT).round().long()
        videos[5] += views[0]
        videos[6] += (views.double().mean() * _LOSS_UNIT).round().long()
        per_class[0, label] += right[0]
        highest_index_first = self.num_class - 1 - score.flip(0).argmax()
        per_class[2].index_add_(0, highest_index_first.view(1), videos.new_ones(1))

    def metrics(self) -> dict[str, float]:
        """The counts as numbers.

        Returns:
            num_videos, failed; top1, top5, mean_class_accuracy (per cent of all videos); loss (mean over the videos
            that could be read); clip1 and clip (per cent: the first view alone; all views, each on its own).
        """
        total, failed, top1, top5, loss, clip1, clip = self.counts[:7].tolist()
        right, videos, predicted = self.counts[7:].view(3, self.num_class).cpu().numpy()
        count = max(total, 1)
        return {
            "num_videos": total,
            "failed": failed,
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "mean_class_accuracy": 100 * _mean_over_seen(right, videos, predicted),
            "loss": loss / _LOSS_UNIT / (total - failed) if total > failed else float("nan"),
            "clip1": 100 * clip1 / count,
            "clip": 100 * clip / _LOSS_UNIT / count,
        }


def merge_views(values: np.ndarray, average: str = "prob", *, multi_label: bool = False) -> np.ndarray:
    """One row per video out of one per view, in the numbers that tools print.

    Args:
        values: (N, V, K).
        average: "prob": mean of the softmax; "sum": their sum (PaddleVideo's TPN, PySlowFast); "logit": mean of the
            values as they are (TSN, TSM); "max": their maximum (PySlowFast's other choice, of probabilities there).
        multi_label: the sigmoid stands for the softmax.

    Returns:
        (N, K) float64.
    """
    values = np.asarray(values, dtype=np.float64)
    if average in ("prob", "sum"):
        scores = probabilities(values, multi_label=multi_label)
        return scores.mean(axis=1) if average == "prob" else scores.sum(axis=1)
    if average not in ("logit", "max"):
        raise ValueError(f"average {average!r} is none of prob, sum, logit, max")
    return values.mean(axis=1) if average == "logit" else values.max(axis=1)


def video_scores(values: np.ndarray, average: str = "prob", *, multi_label: bool = False) -> np.ndarray:
    """What `merge_views` gives as probabilities of the classes, so that thresholds and calibration have a meaning.

    Args:
        values: (N, V, K) logits.
        average: one of `AVERAGES`; "sum" is divided by V, "logit" goes through the softmax at the end.
        multi_label: each class on its own, by the sigmoid.

    Returns:
        (N, K) float64; rows of nan stay nan.
    """
    if average not in AVERAGES:
        raise ValueError(f"average {average!r} is none of {', '.join(AVERAGES)}")
    if average == "logit":
        return probabilities(merge_views(values, "logit"), multi_label=multi_label)
    return merge_views(values, "prob", multi_label=multi_label)


def probabilities(logits: np.ndarray, *, multi_label: bool = False) -> np.ndarray:
    """Softmax, or with `multi_label` sigmoid, over the last axis; float64."""
    wide = np.asarray(logits, dtype=np.float64)
    if multi_label:
        small = np.exp(-np.abs(wide))  # never overflows
        return np.where(wide >= 0, 1 / (1 + small), small / (1 + small))
    exponentials = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


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


def precision_and_recall(predicted: np.ndarray, labels: np.ndarray, num_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Per class: share of its predictions that are right, and of its videos that are found; nan where there are none.

    A video that could not be read (predicted -1) is a video of its class that was not found.

    Returns:
        Two (K,) float64.
    """
    matrix = confusion_matrix(predicted, labels, num_class)
    videos = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_class)
    right, guessed = matrix.diagonal().astype(np.float64), matrix.sum(axis=0)
    nan = np.full(num_class, np.nan)
    return (
        np.divide(right, guessed, out=nan.copy(), where=guessed > 0),
        np.divide(right, videos, out=nan.copy(), where=videos > 0),
    )


def calibration_error(scores: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3), 0..1.

    Videos are binned by the score of their prediction into (0, 1/bins], ...; a bin counts by its share of the videos
    with the distance between its accuracy and its mean score. Rows of nan are left out.

    Args:
        scores: (N, K) probabilities.
        labels: (N,).
        bins: equal parts of 0..1.
    """
    guesses = predictions(scores)
    read = guesses >= 0
    if not read.any():
        return float("nan")
    guesses = guesses[read]
    confidence = np.asarray(scores, dtype=np.float64)[read][np.arange(len(guesses)), guesses]
    right = (guesses == np.asarray(labels)[read]).astype(np.float64)
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(guesses))
