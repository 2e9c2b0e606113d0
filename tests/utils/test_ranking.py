from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from tests import golden
from utils import metrics, ranking


def random_data(seed: int = 0, videos: int = 300, classes: int = 25) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = generator.random((videos, classes)) < 0.12
    targets[:, 3] = False  # a class without a video
    targets[5] = False  # a video without a label
    return metrics.probabilities(generator.normal(size=(videos, classes)) + 2 * targets, multi_label=True), targets


def test_average_precision_against_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    scores, targets = random_data()
    each: Any = None  # scikit-learn annotates texts only
    for values in (scores, np.round(scores, 1)):  # the second is full of ties
        ours = ranking.average_precision(values, targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the class without a video
            theirs = np.asarray(average_precision_score(targets, values, average=each))
        seen = targets.any(0)
        np.testing.assert_allclose(ours[seen], theirs[seen], atol=1e-9)
        assert np.isnan(ours[3])
        assert ranking.mean_average_precision(values, targets) == pytest.approx(theirs[seen].mean(), abs=1e-9)


def test_golden_average_precision_of_mmaction2() -> None:
    for row in golden.rows("mma_metrics"):
        scores, labels = np.array(row["scores"]), np.array(row["labels"])
        targets = np.eye(scores.shape[1], dtype=bool)[labels]
        assert ranking.mean_average_precision(scores, targets) == pytest.approx(row["mean_average_precision"], abs=1e-9)


def right(scores: np.ndarray, targets: np.ndarray, k: int = 1) -> np.ndarray:
    return metrics.Videos(scores, targets.argmax(1), targets).right(k)


def slow_gap(scores: np.ndarray, targets: np.ndarray, top: int) -> float:
    """YouTube-8M's definition, one prediction after the other; of equal scores the higher class first."""
    pooled = []
    for row, row_targets in zip(scores, targets, strict=True):
        pooled += [(row[k], row_targets[k]) for k in sorted(range(len(row)), key=lambda k: (-row[k], -k))[:top]]
    pooled.sort(key=lambda pair: -pair[0])
    hits, total = 0, 0.0
    for place, (_, right) in enumerate(pooled, start=1):
        if right:
            hits += 1
            total += hits / place
    return total / targets.sum()


def slow_perr(scores: np.ndarray, targets: np.ndarray) -> float:
    values = []
    for row, row_targets in zip(scores, targets, strict=True):
        first = sorted(range(len(row)), key=lambda k: (-row[k], -k))[: row_targets.sum()]
        values.append(
            sum(row_targets[k] for k in first if row[k] > 0) / row_targets.sum() if row_targets.any() else 0.0
        )
    return float(np.mean(values))


def test_youtube8m_metrics_are_their_formulas() -> None:
    for seed in range(3):
        scores, targets = random_data(seed)
        scores[7] = 0.0  # no prediction at all
        for top in (1, 5, 20, 25):
            expected = slow_gap(scores, targets, top)
            assert ranking.global_average_precision(scores, targets, top) == pytest.approx(expected, abs=1e-9)
        assert ranking.precision_at_equal_recall(scores, targets) == pytest.approx(slow_perr(scores, targets), abs=1e-9)
        hits = [row_targets[24 - row[::-1].argmax()] for row, row_targets in zip(scores, targets, strict=True)]
        assert right(scores, targets).mean() == pytest.approx(np.mean(hits), abs=1e-9)


def test_a_video_that_could_not_be_read_finds_nothing() -> None:
    scores, targets = np.array([[0.9, 0.1], [np.nan, np.nan]]), np.array([[True, False], [True, True]])
    numbers = metrics.evaluate(metrics.Videos(scores, targets.argmax(1), targets))
    assert numbers["hit1"] == 50.0
    assert numbers["perr"] == 50.0
    assert numbers["gap"] == pytest.approx(100 / 3)
    for function in (ranking.precision_at_equal_recall, ranking.global_average_precision):
        assert function(np.zeros((0, 2)), np.zeros((0, 2), bool)) == 0


class Several:
    """What a list with several labels per video has of interest here."""

    def __init__(self, targets: np.ndarray) -> None:
        self.targets, self.labels = targets, targets.argmax(1)


def test_gathered_scores_add_up_over_ranks() -> None:
    _, targets = random_data(4, videos=23)
    logits = torch.randn(23, 3, 25, generator=torch.Generator().manual_seed(0))
    by_ranks = {}
    for ranks in (1, 3):
        parts = [metrics.Tally(targets.argmax(1), 25, targets=targets) for _ in range(ranks)]
        for i in range(23):
            parts[i % ranks].add(i, None if i == 4 else logits[i])
        for other in parts[1:]:
            parts[0].counts += other.counts
        by_ranks[ranks] = parts[0].metrics()
    assert by_ranks[1] == by_ranks[3]
    scores = metrics.video_scores(logits.numpy(), multi_label=True)
    good = [i for i in range(23) if i != 4]
    cross = torch.nn.functional.binary_cross_entropy(
        torch.from_numpy(scores[good]), torch.from_numpy(targets[good]).double()
    )
    assert by_ranks[1]["loss"] == pytest.approx(cross.item(), abs=1e-9)
    scores[4] = np.nan
    assert (by_ranks[1]["num_videos"], by_ranks[1]["failed"]) == (23, 1)
    assert by_ranks[1]["gap"] == pytest.approx(100 * ranking.global_average_precision(scores, targets), abs=1e-9)
    assert by_ranks[1]["top1"] == by_ranks[1]["hit1"] == pytest.approx(100 * right(scores, targets).mean())
