from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests import golden
from utils import metrics, ranking


def test_golden_tables_of_mmaction2() -> None:
    rows = golden.rows("mma_metrics")
    for row in rows:
        scores, labels = np.array(row["scores"]), np.array(row["labels"])
        count = scores.shape[1]
        assert [metrics.top_k_accuracy(scores, labels, k) for k in (1, 5)] == pytest.approx(row["top1_5"], abs=1e-12)
        # Its matrix and class mean take numpy's argmax, so the lowest index of equal scores, unlike its own top-k.
        predicted = scores.argmax(axis=1)
        assert metrics.mean_class_accuracy(predicted, labels, count) == pytest.approx(row["mean_class"], abs=1e-12)
        for key in ("None", "true", "pred", "all"):
            matrix = metrics.confusion_matrix(predicted, labels, count, normalize=None if key == "None" else key)
            np.testing.assert_allclose(matrix, row[f"confusion_{key}"], atol=1e-12)


def test_golden_meter_of_pyslowfast() -> None:
    rows = golden.rows("psf_test_meter")
    for row in rows:
        clips, labels = np.array(row["clip_preds"]), np.array(row["labels"])
        views = clips.reshape(len(labels), -1, clips.shape[1])
        merged = metrics.merge_views(views, "logit" if row["ensemble"] == "sum" else "max")
        scale = views.shape[1] if row["ensemble"] == "sum" else 1
        np.testing.assert_allclose(scale * merged, row["video_preds"], rtol=1e-6)
        assert round(100 * metrics.top_k_accuracy(merged, labels, 1), 2) == row["top1"]
        assert round(100 * metrics.top_k_accuracy(merged, labels, 5), 2) == row["top5"]


def slow_rank(row: list[float], label: int) -> int:
    order = sorted(range(len(row)), key=lambda k: (-row[k], -k))
    return order.index(label)


def test_tensors_and_arrays_agree_with_a_sort() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 4, (300, 7)).astype(np.float32)  # full of ties
    labels = generator.integers(0, 7, 300)
    ranks = np.array([slow_rank(row, label) for row, label in zip(scores.tolist(), labels, strict=True)])
    right = metrics.correct_at_k(torch.from_numpy(scores), torch.from_numpy(labels), (1, 3, 5))
    for row, k in zip(right, (1, 3, 5), strict=True):
        assert row.tolist() == (ranks < k).tolist()
        assert metrics.top_k_accuracy(scores, labels, k) == pytest.approx((ranks < k).mean())
    assert ((ranking.predictions(scores) == labels) == (ranks == 0)).all()


def test_few_classes_and_nan() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [float("nan")] * 3, [0.0, float("nan"), 1.0]])
    labels = torch.tensor([0, 1, 2])
    top1, top5 = metrics.correct_at_k(logits, labels, (1, 5))
    assert top1.tolist() == [False, False, False]
    assert top5.tolist() == [True, False, False]
    assert ranking.predictions(logits.numpy()).tolist() == [1, -1, -1]
    assert metrics.top_k_accuracy(logits.numpy()[:1], labels.numpy()[:1], 50) == 1.0


def test_mixed_accuracy() -> None:
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 9.0, 0], [0, 0, 9.0]])
    labels = torch.tensor([0, 0, 1, 2])
    assert metrics.mixed_accuracy(logits, labels, ks=(1,)).tolist() == [75.0]
    # own labels: 3 of 4 right; the neighbours': clip 0 is right for label 0, the other three are not
    assert metrics.mixed_accuracy(logits, labels, 0.7, ks=(1,)).tolist() == pytest.approx([100 * (0.7 * 3 + 0.3) / 4])


def test_tally_equals_the_metrics_on_arrays_and_adds_up_over_ranks() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(23, 3, 6, generator=generator)
    labels = torch.randint(0, 5, (23,), generator=generator).tolist()  # class 5 never occurs
    tallies = {}
    for ranks in (1, 2, 3):
        parts = [metrics.Tally(labels, 6) for _ in range(ranks)]
        for i in range(len(labels)):
            parts[i % ranks].add(i, None if i == 4 else logits[i])
        for other in parts[1:]:
            parts[0].counts += other.counts
        tallies[ranks] = parts[0].metrics()
    assert tallies[1] == tallies[2] == tallies[3]
    scores = logits.double().softmax(2).mean(1).numpy()
    scores[4] = np.nan
    ours = tallies[1]
    assert (ours["num_videos"], ours["failed"]) == (23, 1)
    assert ours["top1"] == pytest.approx(100 * metrics.top_k_accuracy(scores, np.array(labels), 1))
    assert ours["top5"] == pytest.approx(100 * metrics.top_k_accuracy(scores, np.array(labels), 5))
    per_class = metrics.mean_class_accuracy(ranking.predictions(scores), np.array(labels), 6)
    assert ours["mean_class_accuracy"] == pytest.approx(100 * per_class)
    good = [i for i in range(23) if i != 4]
    assert ours["loss"] == pytest.approx(-np.log(scores[good, np.array(labels)[good]]).mean(), abs=1e-6)


def test_empty_tally() -> None:
    empty = metrics.Tally([], 3).metrics()
    assert (empty["num_videos"], empty["top1"], empty["mean_class_accuracy"]) == (0, 0.0, 0.0)
    assert np.isnan(empty["loss"])


def test_confusion_matrix_never_shrinks_and_checks() -> None:
    matrix = metrics.confusion_matrix(np.array([2, -1, 2]), np.array([0, 0, 2]), 5)
    assert matrix.shape == (5, 5)
    assert matrix.sum() == 2
    assert (matrix[0, 2], matrix[2, 2]) == (1, 1)
    with pytest.raises(ValueError, match=r"outside 0\.\.4"):
        metrics.confusion_matrix(np.array([0]), np.array([5]), 5)
    with pytest.raises(ValueError, match="normalize 'rows'"):
        metrics.confusion_matrix(np.array([0]), np.array([0]), 5, normalize="rows")


def test_merge_views_by_probability() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 3, 5)) * 300
    merged = metrics.merge_views(logits)
    np.testing.assert_allclose(merged, torch.from_numpy(logits).softmax(2).mean(1).numpy(), atol=1e-12)
    np.testing.assert_allclose(merged.sum(1), 1)
    with pytest.raises(ValueError, match="not one of prob, sum, logit, max"):
        metrics.merge_views(logits, "median")


def test_every_average_of_views() -> None:
    logits = np.random.default_rng(1).normal(size=(6, 4, 5)) * 3
    soft = torch.from_numpy(logits).softmax(2)
    np.testing.assert_allclose(metrics.merge_views(logits, "sum"), soft.sum(1).numpy(), atol=1e-12)
    np.testing.assert_allclose(metrics.video_scores(logits, "sum"), soft.mean(1).numpy(), atol=1e-12)
    mean = torch.from_numpy(logits).mean(1)
    np.testing.assert_allclose(metrics.merge_views(logits, "logit"), mean.numpy(), atol=1e-12)
    np.testing.assert_allclose(metrics.video_scores(logits, "logit"), mean.softmax(1).numpy(), atol=1e-12)
    multi_label = metrics.video_scores(logits, "prob", multi_label=True)
    np.testing.assert_allclose(multi_label, torch.from_numpy(logits).sigmoid().mean(1).numpy(), atol=1e-12)
    assert metrics.probabilities(np.array([[-1e4, 1e4]]), multi_label=True).tolist() == [[0.0, 1.0]]
    assert np.isnan(metrics.video_scores(np.full((1, 2, 3), np.nan))).all()
    with pytest.raises(ValueError, match="not one of prob, logit, sum"):
        metrics.video_scores(logits, "max")
    for average in metrics.AVERAGES:
        labels = [0, 1, 2, 3, 4, 0]
        tally = metrics.Tally(labels, 5, average=average)
        for i in range(6):
            tally.add(i, torch.from_numpy(logits[i]))
        scores = metrics.video_scores(logits, average)
        numbers = tally.metrics()
        assert numbers["top1"] == pytest.approx(100 * metrics.top_k_accuracy(scores, np.array(labels), 1))
        assert numbers["loss"] == pytest.approx(-np.log(scores[np.arange(6), labels]).mean(), abs=1e-6)


def test_clip_accounting() -> None:
    """clip-1: the first view alone; clip: every view on its own; a video that could not be read is wrong in both."""
    logits = torch.tensor([[[2.0, 1], [1, 2]], [[2, 1], [2, 1]], [[1, 2], [1, 2]]])  # views right: 1 of 2, 2, 0
    tally = metrics.Tally([0, 0, 0, 0], 2)
    for i in range(3):
        tally.add(i, logits[i])
    tally.add(3, None)
    numbers = tally.metrics()
    assert numbers["clip1"] == pytest.approx(100 * 2 / 4)
    assert numbers["clip"] == pytest.approx(100 * (0.5 + 1) / 4)


def test_per_class_numbers_against_scikit_learn() -> None:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

    generator = np.random.default_rng(2)
    scores = generator.normal(size=(400, 7))
    labels = generator.integers(0, 7, 400)
    labels[labels == 6] = 5  # class 6 has no video
    predicted = ranking.predictions(scores)
    classes = np.arange(7)
    precision, recall = metrics.precision_and_recall(predicted, labels, 7)
    no_video: Any = np.nan  # scikit-learn annotates texts only
    known = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=no_video)
    np.testing.assert_allclose(precision, known[0], atol=1e-9)
    np.testing.assert_allclose(recall, known[1], atol=1e-9)
    assert np.isnan(recall[6])
    np.testing.assert_array_equal(metrics.confusion_matrix(predicted, labels, 7), confusion_matrix(labels, predicted))
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=classes)
        assert metrics.top_k_accuracy(scores, labels, k) == pytest.approx(expected, abs=1e-9)


def test_calibration_error_is_its_formula() -> None:
    generator = np.random.default_rng(3)
    scores = metrics.probabilities(generator.normal(size=(500, 6)) * 2)
    labels = generator.integers(0, 6, 500)
    scores[17] = np.nan
    guess, top = scores.argmax(1), scores.max(1)
    total = 0.0
    for edge in range(15):
        inside = (top > edge / 15) & (top <= (edge + 1) / 15)
        if inside.any():
            total += inside.sum() * abs((guess == labels)[inside].mean() - top[inside].mean())
    assert metrics.calibration_error(scores, labels) == pytest.approx(total / 499, abs=1e-9)
    assert metrics.calibration_error(np.eye(3), np.arange(3)) == 0
    assert metrics.calibration_error(np.eye(3), np.array([1, 2, 0])) == 1
    assert np.isnan(metrics.calibration_error(np.full((2, 3), np.nan), np.zeros(2, int)))


def test_several_labels_of_a_clip_hit_if_any_of_them_does() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [3.0, 3.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    targets = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    hits = metrics.hit_at_k(logits, targets, (1, 2, 3, 9))
    # The second clip's label 0 ties with class 1, which ranks first. The third clip has no label.
    assert hits.tolist() == [[False] * 3, [True, True, False], [True, True, False], [True, True, False]]
    one_hot = torch.nn.functional.one_hot(torch.tensor([2, 0, 3]), 4).float()
    assert torch.equal(metrics.hit_at_k(logits, one_hot), metrics.correct_at_k(logits, torch.tensor([2, 0, 3])))
    # Mixed up at 1: own labels miss twice, the partner's are first in both.
    assert metrics.mixed_accuracy(logits[:2], targets[:2], 0.75, ks=(1,)).item() == pytest.approx(25)


def test_mixed_accuracy_leaves_out_clips_without_weight() -> None:
    logits = torch.eye(4)
    labels = torch.tensor([0, 1, 3, 2])  # two of four
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])  # of which one, and one that is wrong, were read
    assert metrics.mixed_accuracy(logits, labels, ks=(1, 4), weights=weights).tolist() == [50.0, 100.0]
    assert metrics.mixed_accuracy(logits, labels, ks=(1,), weights=torch.tensor([1.0, 1.0, 1.0, 0.0])).item() == (
        pytest.approx(100 * 2 / 3)
    )
    assert metrics.mixed_accuracy(logits, labels, ks=(1,), weights=torch.zeros(4)).tolist() == [0.0]
