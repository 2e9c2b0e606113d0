"""KD and DML losses against closed forms, and where gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from utils.engine.distill import Mutual, Pair, Teacher, kd_per_clip, mutual_per_clip, recolour
from utils.loss import classification_loss


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


STUDENT = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.3, 2.5, 0.0], [1.0, -0.5, 1.0]], dtype=torch.float64)
LABELS, WEIGHTS = torch.tensor([1, 2]), torch.tensor([1.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kd_equals_its_closed_form(temperature: float) -> None:
    expected = [
        temperature**2 * kl(softmax(t, temperature), softmax(s, temperature))
        for s, t in zip(STUDENT.tolist(), TEACHER.tolist(), strict=True)
    ]
    assert kd_per_clip(STUDENT, TEACHER, temperature).tolist() == pytest.approx(expected, abs=1e-12)


def test_kd_gradient_is_that_of_hinton_2015_equation_2() -> None:
    """dC/dz_i = (q_i - p_i) / T for one soft target; times T^2 here."""
    student = STUDENT.clone().requires_grad_()
    kd_per_clip(student, TEACHER, 3.0).sum().backward()
    expected = 3.0 * ((STUDENT / 3).softmax(1) - (TEACHER / 3).softmax(1))
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-12)


def test_mutual_equals_its_closed_form_and_paddlevideos() -> None:
    expected = []
    for s, t in zip(STUDENT.tolist(), TEACHER.tolist(), strict=True):
        p, q = softmax(s), softmax(t)
        expected.append((kl(p, q) + kl(q, p)) / 2)
    assert mutual_per_clip(STUDENT, TEACHER).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(mutual_per_clip(STUDENT, TEACHER), mutual_per_clip(TEACHER, STUDENT))
    # PaddleVideo: the mean over all elements of K * p * log((p + 1e-12) / (q + 1e-12)), both ways, halved.
    p, q = STUDENT.softmax(1), TEACHER.softmax(1)
    elements = [3 * a * ((a + 1e-12) / (b + 1e-12)).log() for a, b in ((p, q), (q, p))]
    published = ((elements[0] + elements[1]) / 2).mean()
    assert mutual_per_clip(STUDENT, TEACHER).mean().item() == pytest.approx(published.item(), abs=1e-10)


def test_certain_networks_give_finite_losses() -> None:
    sure = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    for loss in (kd_per_clip(sure, sure.flip(0), 1.0), mutual_per_clip(sure, sure.flip(0))):
        assert torch.isfinite(loss).all()
    assert kd_per_clip(sure, sure, 1.0).tolist() == [0.0, 0.0]


class Fixed(nn.Module):
    """Answers with one table of logits, whatever it sees."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.seen: list[torch.Tensor] = []

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        self.seen.append(clips)
        return self.logits


def test_a_teacher_adds_its_share_and_gets_no_gradient() -> None:
    student, net = STUDENT.clone().requires_grad_(), Fixed(TEACHER)
    teacher = Teacher(net, temperature=4.0, weight=0.3, recolour=lambda clips: clips + 1)
    clips = torch.zeros(2, 3, 1, 2, 2, dtype=torch.float64)
    value, logits = teacher.loss(student, clips, LABELS, label_smooth=0.1, weights=WEIGHTS)
    hard = classification_loss(STUDENT, LABELS, label_smooth=0.1, weights=WEIGHTS)
    soft = (kd_per_clip(STUDENT, TEACHER, 4.0) * WEIGHTS).sum() / 2
    assert value.item() == pytest.approx((0.7 * hard + 0.3 * soft).item(), abs=1e-12)
    assert logits is student
    value.backward()
    assert net.logits.grad is None
    assert not net.training
    assert torch.equal(net.seen[0], clips + 1)


def test_a_clip_that_could_not_be_read_counts_in_neither_part() -> None:
    broken = torch.full((1, 3), float("nan"), dtype=torch.float64)
    student = torch.cat([STUDENT[:1], broken]).requires_grad_()
    teacher = Teacher(Fixed(TEACHER), temperature=2.0, weight=0.5)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    value, _ = teacher.loss(student, torch.zeros(1), LABELS, weights=weights)
    hard = classification_loss(STUDENT[:1], LABELS[:1])
    expected = (hard + kd_per_clip(STUDENT[:1], TEACHER[:1], 2.0).sum()) / 4
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)


def test_mutual_learning_trains_both() -> None:
    pair = Pair(Fixed(STUDENT), Fixed(TEACHER))
    mutual = Mutual(pair.peer, weight=2.0, arguments={})
    clips = torch.zeros(2, 3, 1, 2, 2)
    value, logits = mutual.loss(pair(clips), clips, LABELS, label_smooth=0.1, lam=0.8, weights=WEIGHTS)
    targets = {"label_smooth": 0.1, "lam": 0.8, "weights": WEIGHTS}
    hard = [classification_loss(table, LABELS, **targets) for table in (STUDENT, TEACHER)]
    expected = hard[0] + hard[1] + 2.0 * (mutual_per_clip(STUDENT, TEACHER) * WEIGHTS).sum() / 2
    assert value.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.equal(logits, STUDENT)
    value.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in pair.parameters())
    assert set(mutual.state()) == {"peer", "distill"}


def test_recolour_turns_one_normalisation_into_another() -> None:
    ours, theirs = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.45,) * 3, (0.225,) * 3)
    pixels = torch.rand(2, 3, 4, 5, 5, dtype=torch.float64)

    def normal(colour: tuple) -> torch.Tensor:
        mean, std = (torch.tensor(part, dtype=torch.float64).view(1, 3, 1, 1, 1) for part in colour)
        return (pixels - mean) / std

    change = recolour(theirs, ours, torch.device("cpu"))
    assert change is not None
    torch.testing.assert_close(change(normal(ours)), normal(theirs), rtol=0, atol=1e-12)
    assert recolour(ours, ours, torch.device("cpu")) is None
