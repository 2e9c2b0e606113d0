"""Compute every number of an evaluation: the formulas, the table that names them, and the tally that ranks sum up.

`METRICS` lists all metrics. Training's validation, `eval`, `score`, `analyze`, `report`, `compare` and the tables of
sweeps and folds show its entries, so a new metric is one entry. Elsewhere are the accuracies of a training step
(`utils/engine/totals.py`), the choice of the best checkpoint (`utils/engine/probes.py`), and the rule for equal scores
(`utils/ranking.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from utils import ranking
from utils.renamed import LOG_TITLES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AVERAGES = ("prob", "logit", "sum")  # how the views of a video are joined
_UNIT = 2.0**24  # losses and shares of views are summed as integers of this fraction, so that sums are exact
_BLOCK = 64  # videos whose views a tally joins at once

Place = Literal["line", "curve", "score", "analyze", "report", "compare", "collect"]
EVERYWHERE: tuple[Place, ...] = ("line", "curve", "score", "analyze", "report", "compare", "collect")


@dataclass(frozen=True)
class Videos:
    """The scores of a list, from which every metric is computed.

    Attributes:
        scores: (N, K) probabilities; a row of nan has no prediction.
        labels: (N,) int.
        targets: (N, K) bool of a list with several labels per video, else None.
        views: (N, 2) of each video: 1 if its first view alone is right, the share of its views that are right; None if
            the views were not looked at.
        unread: (N,) bool: the video could not be read; needed if a network may return nan too. None: a row of nan means
            an unread video.
    """

    scores: np.ndarray
    labels: np.ndarray
    targets: np.ndarray | None = None
    views: np.ndarray | None = None
    unread: np.ndarray | None = None

    @cached_property
    def failed(self) -> np.ndarray:
        """(N,) bool: the video could not be read, which counts as wrong."""
        return np.asarray(np.isnan(self.scores).any(axis=1)) if self.unread is None else self.unread

    @cached_property
    def predicted(self) -> np.ndarray:
        """(N,) the class that ranks first, -1 for a video that could not be read."""
        return ranking.predictions(self.scores)

    @cached_property
    def ranks(self) -> np.ndarray:
        """(N,) the rank of a video's label, or of the best of its labels: 0 is first."""
        targets = self.targets
        if targets is None:
            return ranking.rank_of(self.scores, self.labels)
        return ranking.rank_of_best(self.scores, targets)

    def right(self, k: int = 1) -> np.ndarray:
        """Return (N,) bool: a label of the video is among its first k predictions. No other code decides this."""
        return self.ranks < k


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Attributes:
        name: its key in results.
        compute: returns the number, in the unit that is shown (shares in per cent).
        title: its name in text and on pages.
        labels: lists that have it: with one label per video, several, or both (None).
        places: where it is shown besides the results themselves.
        head: its name in tables, if not `title`.
        line: its name in the line of a validation, if not `title`.
        curve: its tag in TensorBoard, if not `<name>_val`.
        digits: decimal places in the line of a validation.
        unit: appended to the number on a page.
        needs_views: it looks at single views, so only an evaluation itself has it.
    """

    name: str
    compute: Callable[[Videos], float]
    title: str
    labels: Literal["single_label", "multi_label"] | None = None
    places: tuple[Place, ...] = EVERYWHERE
    head: str = ""
    line: str = ""
    curve: str = ""
    digits: int = 3
    unit: str = " %"
    needs_views: bool = False

    def in_line(self, value: float) -> str:
        """Return the text for the line of a validation, such as `mAP 93.125`."""
        return f"{self.line or self.title} {value:.{self.digits}f}"

    def on_page(self, value: float) -> str:
        """Return the text for a page, such as `93.12 %`, or a dash for a missing number."""
        return f"{value:.2f}{self.unit}" if np.isfinite(value) else "–"

    @property
    def tag(self) -> str:
        """Name of its curve."""
        return self.curve or f"{self.name}_val"


def metrics_of(place: Place | None = None, *, multi_label: bool = False) -> list[Metric]:
    """Return the metrics that this kind of list has and that `place` shows, in the order of the table."""
    kind = "multi_label" if multi_label else "single_label"
    return [one for one in METRICS if one.labels in (None, kind) and (place is None or place in one.places)]


def shown_in(place: Place, result: Mapping[str, float]) -> list[Metric]:
    """Return the metrics of a result that `place` shows."""
    # Every result of a list with several labels has mAP, and no other result has it.
    multi_label = "mean_average_precision" in result
    return [metric for metric in metrics_of(place, multi_label=multi_label) if metric.name in result]


def evaluate(videos: Videos) -> dict[str, float]:
    """Return num_videos, failed, and every metric of `METRICS` that these videos have."""
    values: dict[str, float] = {"num_videos": len(videos.scores), "failed": int(videos.failed.sum())}
    for metric in metrics_of(multi_label=videos.targets is not None):
        if not metric.needs_views or videos.views is not None:
            values[metric.name] = metric.compute(videos)
    return values


def _top(k: int) -> Callable[[Videos], float]:
    return lambda videos: 100 * int(videos.right(k).sum()) / max(len(videos.labels), 1)


def _loss(videos: Videos) -> float:
    """Return the cross entropy in nats, the mean over readable videos; with several labels also over the classes."""
    read = ~videos.failed
    if not read.any():
        return float("nan")

    scores = videos.scores[read].astype(np.float64)

    if videos.targets is not None:
        # Clipped: an infinite loss of one video would hide all others.
        good = scores.clip(1e-12, 1 - 1e-12)
        return float(-np.log(np.where(videos.targets[read], good, 1 - good)).mean())

    label_scores = np.take_along_axis(scores, videos.labels[read][:, None], axis=1).clip(1e-300, 1)
    # Summed in units of 2^-24, so that any number of ranks and any order gives the same bits.
    return float(np.rint(np.log(1 / label_scores) * _UNIT).sum() / _UNIT / len(label_scores))


def _mean_class(videos: Videos) -> float:
    return 100 * mean_class_accuracy(videos.predicted, videos.labels, videos.scores.shape[1])


def _of_views(column: int) -> Callable[[Videos], float]:
    def mean(videos: Videos) -> float:
        assert videos.views is not None
        return float(100 * np.rint(videos.views[:, column] * _UNIT).sum() / _UNIT / max(len(videos.views), 1))

    return mean


def _calibration(videos: Videos) -> float:
    return 100 * calibration_error(videos.scores, videos.labels)


def _of_targets(compute: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[Videos], float]:
    def share(videos: Videos) -> float:
        assert videos.targets is not None
        return 100 * compute(videos.scores, videos.targets)

    return share


_map = _of_targets(ranking.mean_average_precision)
_gap = _of_targets(ranking.global_average_precision)
_perr = _of_targets(ranking.precision_at_equal_recall)


_SCORES: tuple[Place, ...] = ("score", "analyze", "report", "collect")
_NOT_SCORE: tuple[Place, ...] = ("line", "curve", "compare", "collect")

#: Every metric, in the order in which tables show them. A new one is a row here and its test.
METRICS: list[Metric] = [
    Metric("top1", _top(1), "top-1", "single_label", line=LOG_TITLES["top1"], curve="top1_val"),
    Metric("top5", _top(5), "top-5", "single_label", line=LOG_TITLES["top5"], curve="top5_val"),
    # With several labels these are hit@1, as in YouTube-8M, and hit@5. `score` shows hit@1 under its own name.
    Metric("top1", _top(1), "top-1", "multi_label", _NOT_SCORE, line=LOG_TITLES["top1"], curve="top1_val"),
    Metric("top5", _top(5), "top-5", "multi_label", _NOT_SCORE, line=LOG_TITLES["top5"], curve="top5_val"),
    Metric("mean_class_accuracy", _mean_class, "mean class accuracy", "single_label", _SCORES, head="class mean"),
    Metric("loss", _loss, "loss", None, ("line", "curve", "collect"), line="Loss", digits=4, unit=""),
    Metric("clip1", _of_views(0), "clip-1 accuracy", "single_label", (), needs_views=True),
    Metric("clip", _of_views(1), "clip accuracy", "single_label", (), needs_views=True),
    Metric("calibration_error", _calibration, "calibration error", "single_label", ("score", "report"), head="calib."),
    Metric(
        "mean_average_precision", _map, "mAP", "multi_label", ("line", "curve", "score", "collect"), curve="map_val"
    ),
    Metric("gap", _gap, "GAP", "multi_label", ("score",)),
    Metric("hit1", _top(1), "hit@1", "multi_label", ("score",)),
    Metric("perr", _perr, "PERR", "multi_label", ("score",)),
]


class Tally:
    """The scores of an evaluation in one tensor that ranks can sum; each video is on one rank.

    Args:
        labels: (N,) of the list.
        num_class: K.
        targets: (N, K) bool of a list with several labels per video.
        device: the device of `counts`, for the sum over the ranks.
        average: how the views of a video are joined, one of `AVERAGES`.
    """

    def __init__(
        self,
        labels: np.ndarray | Sequence[int],
        num_class: int,
        *,
        targets: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        average: str = "prob",
    ) -> None:
        import torch

        if average not in AVERAGES:
            raise ValueError(f"average {average!r} is not one of {', '.join(AVERAGES)}")

        self.labels, self.targets = np.asarray(labels, dtype=np.int64), targets
        self.average, self.device = average, torch.device(device)
        # Scores, then four columns: seen, readable, first view right, share of right views. Other ranks' rows stay 0.
        self._table = torch.zeros(len(self.labels), num_class + 4, dtype=torch.float64)
        self._waiting: dict[int, Tensor] = {}

    def add(self, sample: int, logits: Tensor | None) -> None:
        """Add one video.

        Args:
            sample: its index in the list.
            logits: (V, K) of its views; None if it could not be read.
        """
        if logits is None:
            self._table[sample, -4] = 1
            return

        self._waiting[sample] = logits
        if len(self._waiting) == _BLOCK:  # one synchronisation with the GPU per block, not per video
            self._join_views()

    def _join_views(self) -> None:
        import torch

        from utils import transfer

        samples = list(self._waiting)
        views = transfer.to_numpy(torch.stack(list(self._waiting.values()))).astype(np.float64)  # (n, V, K)
        self._waiting.clear()

        with np.errstate(invalid="ignore"):  # a network that has diverged: nan is right for no label
            scores = video_scores(views, self.average, multi_label=self.targets is not None)

        # All views of all videos as rows (n * V, K), each with the label of its video.
        view_labels = np.repeat(self.labels[samples], views.shape[1])
        right = ranking.rank_of(views.reshape(len(view_labels), -1), view_labels).reshape(views.shape[:2]) == 0

        more = np.stack([np.ones(len(views)), np.ones(len(views)), right[:, 0], right.mean(axis=1)], axis=1)
        self._table[samples] = torch.from_numpy(np.concatenate([scores, more], axis=1))

    @property
    def counts(self) -> Tensor:
        """(N, K + 4) float64, on the device: the table that ranks sum up, once all videos are added."""
        from utils import transfer

        if self._waiting:
            self._join_views()

        # On the CPU until now, so that adding a video does not wait for the device.
        if self._table.device.type == "cpu":
            self._table = transfer.to_device(self._table, self.device)
        return self._table

    @counts.setter
    def counts(self, table: Tensor) -> None:
        self._table = table

    def metrics(self) -> dict[str, float]:
        """Return `evaluate` of the videos that were added."""
        from utils import transfer

        # After the sum over the ranks every row is there; in a part of a list rows of other parts are missing.
        table = transfer.to_numpy(self.counts)
        seen = table[:, -4] > 0
        table = table[seen]
        failed = table[:, -3] == 0

        return evaluate(
            Videos(
                scores=np.where(failed[:, None], np.nan, table[:, :-4]),
                labels=self.labels[seen],
                targets=None if self.targets is None else np.asarray(self.targets, dtype=bool)[seen],
                views=table[:, -2:],
                unread=failed,
            )
        )


def correct_at_k(logits: Tensor, labels: Tensor, ks: tuple[int, ...] = (1, 5)) -> Tensor:
    """Return which clips have their label among the k highest scores.

    Args:
        logits: (B, K).
        labels: (B,) int64.
        ks: a k of at least K finds every label.

    Returns:
        (len(ks), B) bool, on the device of the logits, without a synchronisation.
    """
    import torch

    labels = labels.unsqueeze(1)  # (B, 1)
    classes = torch.arange(logits.shape[1], device=logits.device)
    rank = ranking.before(logits, logits.gather(1, labels), classes, labels).sum(1)  # (B,) 0 for the best
    readable = ~logits.isnan().any(1)  # (B,) a diverged network is right for no label
    return torch.stack([(rank < k) & readable for k in ks])


def hit_at_k(logits: Tensor, targets: Tensor, ks: tuple[int, ...] = (1, 5)) -> Tensor:
    """Return which clips have any of their several labels among the k highest scores.

    Args:
        logits: (B, K).
        targets: (B, K), above 0 at a clip's labels.
        ks: a k of at least K finds every label.

    Returns:
        (len(ks), B) bool.
    """
    best = logits.masked_fill(targets <= 0, float("-inf"))
    # Of a clip's own labels the one that ranks first: the highest score, and the higher class index of equal scores.
    best_label = logits.shape[1] - 1 - best.flip(1).argmax(1)  # (B,) flipped, as argmax takes the first of equal scores
    return correct_at_k(logits, best_label, ks) & (targets > 0).any(1)


def mixed_accuracy(
    logits: Tensor,
    labels: Tensor,
    lam: float = 1.0,
    *,
    ks: tuple[int, ...] = (1, 5),
    weights: Tensor | None = None,
) -> Tensor:
    """Return the top-k accuracies of a batch in per cent, (len(ks),) float32.

    Under mixup the accuracies of both labels are weighted like the labels. Several labels per clip, (B, K), count as in
    `hit_at_k`. `weights` (B,) weight the mean: clips of weight 0, which could not be read, do not count. The result is
    0 if no clip could be read.
    """
    from utils import mixup

    correct = correct_at_k if labels.dim() == 1 else hit_at_k
    right = correct(logits, labels, ks).float()

    if lam != 1.0:
        right = lam * right + (1 - lam) * correct(logits, mixup.partner(labels), ks).float()

    if weights is None:
        return 100 * right.mean(1)
    total = weights.to(right.dtype).sum()
    return 100 * (right @ weights.to(right.dtype)) / total.masked_fill(total == 0, 1)  # no branch on a device value


def merge_views(values: np.ndarray, average: str = "prob", *, multi_label: bool = False) -> np.ndarray:
    """Join the rows of a video's views into one row per video, in the numbers that tools print.

    Args:
        values: (N, V, K).
        average: "prob": mean of the softmax; "sum": their sum (PaddleVideo's TPN, PySlowFast); "logit": mean of the raw
            values (TSN, TSM); "max": their maximum (PySlowFast's other choice, of probabilities there).
        multi_label: use the sigmoid in place of the softmax.

    Returns:
        (N, K) float64.
    """
    values = np.asarray(values, dtype=np.float64)

    if average in ("prob", "sum"):
        scores = probabilities(values, multi_label=multi_label)
        return scores.mean(axis=1) if average == "prob" else scores.sum(axis=1)

    if average not in ("logit", "max"):
        raise ValueError(f"average {average!r} is not one of prob, sum, logit, max")
    # (N, V, K) -> (N, K)
    return values.mean(axis=1) if average == "logit" else values.max(axis=1)


def video_scores(values: np.ndarray, average: str = "prob", *, multi_label: bool = False) -> np.ndarray:
    """Join views like `merge_views`, but into class probabilities, as thresholds and calibration need them.

    Args:
        values: (N, V, K) logits.
        average: one of `AVERAGES`; "sum" is divided by V, "logit" goes through the softmax at the end.
        multi_label: each class by itself, by the sigmoid.

    Returns:
        (N, K) float64; rows of nan stay nan.
    """
    if average not in AVERAGES:
        raise ValueError(f"average {average!r} is not one of {', '.join(AVERAGES)}")
    if average == "logit":
        return probabilities(merge_views(values, "logit"), multi_label=multi_label)
    return merge_views(values, "prob", multi_label=multi_label)


def probabilities(logits: np.ndarray, *, multi_label: bool = False) -> np.ndarray:
    """Return the softmax, or with `multi_label` the sigmoid, over the last axis; float64."""
    wide = np.asarray(logits, dtype=np.float64)
    if multi_label:
        small = np.exp(-np.abs(wide))  # of a negative number: never overflows
        return np.where(wide >= 0, 1 / (1 + small), small / (1 + small))
    # Minus the maximum: the largest exponential is 1, so none overflows.
    exponentials = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the share of rows with the label among the k highest scores, 0..1."""
    right = ranking.rank_of(np.asarray(scores), np.asarray(labels)) < k
    return float(right.mean()) if len(right) else 0.0


def confusion_matrix(
    predicted: np.ndarray, labels: np.ndarray, num_class: int, *, normalize: str | None = None
) -> np.ndarray:
    """Count true classes (rows) against predicted classes (columns); always (K, K), whatever classes occur.

    Args:
        predicted: (N,); -1 (no prediction) is left out.
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

    # One flat index per (true, predicted) pair: bincount is far faster than a loop or `np.add.at`.
    flat = np.bincount(labels[seen] * num_class + predicted[seen], minlength=num_class * num_class)
    counts = flat.reshape(num_class, num_class)

    if normalize is None:
        return counts

    axes = {"true": 1, "pred": 0, "all": (0, 1)}
    if normalize not in axes:
        raise ValueError(f"normalize {normalize!r} is not one of true, pred, all")
    return counts / np.maximum(counts.sum(axis=axes[normalize], keepdims=True), 1)


def mean_class_accuracy(predicted: np.ndarray, labels: np.ndarray, num_class: int) -> float:
    """Return the mean, over the classes that occur as truth or prediction, of the share of right videos, 0..1."""
    matrix = confusion_matrix(predicted, labels, num_class)
    videos = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_class)
    return _mean_over_seen(matrix.diagonal(), videos, matrix.sum(axis=0))


def _mean_over_seen(right: np.ndarray, videos: np.ndarray, predicted: np.ndarray) -> float:
    seen = (videos > 0) | (predicted > 0)  # a class that is only predicted has no video and counts as 0
    return float((right[seen] / np.maximum(videos[seen], 1)).mean()) if seen.any() else 0.0


def class_means(values: np.ndarray, classes: np.ndarray, num_class: int, *, empty: float = np.nan) -> np.ndarray:
    """Return the mean of the values of each class, (K,) float64; `empty` for a class without values.

    Args:
        values: (N,) numbers, or bool for a share.
        classes: (N,) int, the class of each value.
        num_class: K.
        empty: the result for a class without values.
    """
    count = np.bincount(classes, minlength=num_class)
    total = np.bincount(classes, weights=np.asarray(values, dtype=np.float64), minlength=num_class)
    return np.divide(total, count, out=np.full(num_class, empty), where=count > 0)


def precision_and_recall(predicted: np.ndarray, labels: np.ndarray, num_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Return per class the share of right predictions (precision) and of its videos that are found (recall).

    A video that could not be read (predicted -1) is a video of its class that was not found.

    Returns:
        Two (K,) float64; nan for a class without predictions, or without videos.
    """
    predicted, labels = np.asarray(predicted, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    right, guessed = predicted == labels, predicted >= 0
    return class_means(right[guessed], predicted[guessed], num_class), class_means(right, labels, num_class)


def calibration_error(scores: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3), 0..1.

    Videos are binned by the score of their prediction into (0, 1/bins], ... The distance between a bin's accuracy and
    its mean score is weighted by the bin's share of the videos. Rows of nan are left out.

    Args:
        scores: (N, K) probabilities.
        labels: (N,).
        bins: number of equal parts of 0..1.
    """
    guesses = ranking.predictions(scores)
    read = guesses >= 0
    if not read.any():
        return float("nan")

    guesses = guesses[read]
    confidence = np.asarray(scores, dtype=np.float64)[read][np.arange(len(guesses)), guesses]
    right = (guesses == np.asarray(labels)[read]).astype(np.float64)

    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)  # right-closed bins: ceil, not floor
    # |sum(right) - sum(confidence)| of a bin is its size times the distance, which is the weighted term.
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(guesses))
