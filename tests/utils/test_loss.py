from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from utils.loss import classification_loss, per_clip_loss, training_loss


@pytest.mark.parametrize("smooth", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("classes", [2, 152, 1000])
def test_equals_torch(smooth: float, classes: int) -> None:
    logits, labels = torch.randn(6, classes, dtype=torch.float64) * 4, torch.randint(0, classes, (6,))
    expected = functional.cross_entropy(logits, labels, label_smoothing=smooth, reduction="none")
    torch.testing.assert_close(per_clip_loss(logits, labels, label_smooth=smooth), expected, atol=1e-12, rtol=0)


def test_closed_form_with_everything_on() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]], dtype=torch.float64)
    labels, weights, eps, lam = torch.tensor([0, 2]), torch.tensor([1.0, 0.5]), 0.1, 0.7
    total = 0.0
    for i, (label, other) in enumerate([(0, 2), (2, 0)]):
        row = logits[i].tolist()
        norm = math.log(sum(math.exp(v) for v in row))
        target = [eps / 3] * 3
        target[label] += (1 - eps) * lam
        target[other] += (1 - eps) * (1 - lam)
        assert math.isclose(sum(target), 1)
        total += weights[i].item() * -sum(t * (v - norm) for t, v in zip(target, row, strict=True))
    options = {"label_smooth": eps, "weights": weights, "lam": lam}
    value = classification_loss(logits, labels, **options)
    assert math.isclose(value.item(), total / 2, abs_tol=1e-12)
    explicit = classification_loss(logits, labels, partner=labels.flip(0), **options)
    assert torch.equal(value, explicit)


def test_weight_zero_hides_a_broken_clip_in_value_and_gradient() -> None:
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]], requires_grad=True)
    loss = classification_loss(logits, torch.tensor([0, 1]), weights=torch.tensor([1.0, 0.0]))
    assert math.isclose(loss.item(), math.log(1 + math.e) / 2, rel_tol=1e-6)
    assert math.isnan(classification_loss(logits, torch.tensor([0, 1])).item())


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, labels = torch.randn(8, 10), torch.randint(0, 10, (8,))
    loss = classification_loss(logits.bfloat16(), labels, label_smooth=0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, classification_loss(logits.bfloat16().float(), labels, label_smooth=0.1))


def test_gradient() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: classification_loss(x, labels, label_smooth=0.1, weights=weights, lam=0.4), (logits,)
    )


def test_an_auxiliary_head_adds_its_weighted_loss() -> None:
    from types import SimpleNamespace

    logits, aux, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    both = SimpleNamespace(logits=logits, aux=aux, aux_weight=0.5)
    value, shown = training_loss(both, labels, label_smooth=0.1)
    expected = classification_loss(logits, labels, label_smooth=0.1)
    expected = expected + 0.5 * classification_loss(aux, labels, label_smooth=0.1)
    assert torch.equal(value, expected)
    assert shown is logits
    assert torch.equal(training_loss(logits, labels)[0], classification_loss(logits, labels))


@pytest.mark.parametrize(("smooth", "lam"), [(0.0, 1.0), (0.1, 1.0), (0.0, 0.7), (0.1, 0.7)])
def test_bce_equals_its_closed_form(smooth: float, lam: float) -> None:
    """y = (1 - eps) (lam y + (1 - lam) y') + eps / K, and the mean over classes of -y log s - (1 - y) log(1 - s)."""
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]], dtype=torch.float64)
    labels, weights = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), [1.0, 0.5]
    total = 0.0
    for i in range(2):
        for k in range(3):
            y = (1 - smooth) * (lam * labels[i, k].item() + (1 - lam) * labels[1 - i, k].item()) + smooth / 3
            s = 1 / (1 + math.exp(-logits[i, k].item()))
            total += weights[i] * -(y * math.log(s) + (1 - y) * math.log(1 - s)) / 3
    options = {"label_smooth": smooth, "lam": lam, "weights": torch.tensor(weights), "kind": "bce"}
    assert classification_loss(logits, labels, **options).item() == pytest.approx(total / 2, abs=1e-12)
    assert training_loss(logits, labels, **options)[0].item() == pytest.approx(total / 2, abs=1e-12)


def test_bce_takes_one_label_per_clip_too() -> None:
    logits, labels = torch.randn(4, 5), torch.tensor([0, 3, 2, 4])
    one_hot = functional.one_hot(labels, 5).float()
    both: tuple[dict[str, Any], ...] = ({}, {"label_smooth": 0.1, "lam": 0.3})
    for options in both:
        values = [classification_loss(logits, target, kind="bce", **options) for target in (labels, one_hot)]
        assert torch.equal(values[0], values[1])
    expected = functional.binary_cross_entropy_with_logits(logits, one_hot)
    torch.testing.assert_close(classification_loss(logits, labels, kind="bce"), expected)


def test_bce_is_computed_in_float32() -> None:
    loss = classification_loss(torch.randn(2, 3).bfloat16(), torch.tensor([0, 1]), kind="bce")
    assert loss.dtype == torch.float32
