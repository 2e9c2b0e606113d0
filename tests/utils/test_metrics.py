from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import metrics


def test_golden_tables_of_mmaction2(shared_data: Path) -> None:
    rows = json.loads((shared_data / "golden/tables/mma_metrics.json").read_text())["rows"]
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


def test_golden_meter_of_pyslowfast(shared_data: Path) -> None:
    rows = json.loads((shared_data / "golden/tables/psf_test_meter.json").read_text())["rows"]
    for row in rows:
        clips, labels = np.array(row["clip_preds"]), np.array(row["labels"])
        views = clips.reshape(len(labels), -1, clips.shape[1])
        merged = metrics.merge_views(views, "score" if row["ensemble"] == "sum" else "max")
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
    assert ((metrics.predictions(scores) == labels) == (ranks == 0)).all()


def test_few_classes_and_nan() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [float("nan")] * 3, [0.0, float("nan"), 1.0]])
    labels = torch.tensor([0, 1, 2])
    top1, top5 = metrics.correct_at_k(logits, labels, (1, 5))
    assert top1.tolist() == [False, False, False]
    assert top5.tolist() == [True, False, False]
    assert metrics.predictions(logits.numpy()).tolist() == [1, -1, -1]
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
        parts = [metrics.Tally(6) for _ in range(ranks)]
        for i, label in enumerate(labels):
            parts[i % ranks].add(label, None if i == 4 else logits[i])
        for other in parts[1:]:
            parts[0].counts += other.counts
        tallies[ranks] = parts[0].metrics()
    assert tallies[1] == tallies[2] == tallies[3]
    scores = logits.double().softmax(2).mean(1).numpy()
    scores[4] = np.nan
    ours = tallies[1]
    assert (ours["num_videos"], ours["failed"]) == (23, 1)
    assert ours["top1"] == pytest.approx(100 * metrics.top_k_accuracy(scores, labels, 1))
    assert ours["top5"] == pytest.approx(100 * metrics.top_k_accuracy(scores, labels, 5))
    per_class = metrics.mean_class_accuracy(metrics.predictions(scores), np.array(labels), 6)
    assert ours["mean_class_accuracy"] == pytest.approx(100 * per_class)
    good = [i for i in range(23) if i != 4]
    assert ours["loss"] == pytest.approx(-np.log(scores[good, np.array(labels)[good]]).mean(), abs=1e-6)


def test_empty_tally() -> None:
    empty = metrics.Tally(3).metrics()
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
    with pytest.raises(ValueError, match="none of prob, score, max"):
        metrics.merge_views(logits, "median")
