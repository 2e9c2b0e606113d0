"""The learning rate at points computed by hand, and those of a published training log."""

from __future__ import annotations

import pytest

from utils.lr_schedule import lr_at

PUBLISHED = {
    "type": "COSINE",
    "base_lr": 0.01,
    "warmup_steps": 500,
    "warmup_lr": 0.04,
    "min_lr": 0.0,
    "max_iter": 15010,
}


@pytest.mark.parametrize(
    ("step", "printed"),
    [
        (0, "0.010000"),
        (10, "0.010600"),
        (490, "0.039400"),
        (500, "0.040000"),
        (1000, "0.039883"),
        (7500, "0.021104"),
        (15000, "0.000000"),
    ],
)
def test_published_log(step: int, printed: str) -> None:
    assert f"{lr_at(step, **PUBLISHED):.6f}" == printed


def test_cosine_ends_and_middle() -> None:
    schedule = {"type": "COSINE", "base_lr": 0.2, "min_lr": 0.1, "max_iter": 100}
    assert lr_at(0, **schedule) == pytest.approx(0.2)
    assert lr_at(50, **schedule) == pytest.approx(0.15)
    assert lr_at(100, **schedule) == lr_at(1000, **schedule) == pytest.approx(0.1)


def test_without_warm_up_the_peak_is_base_lr() -> None:
    assert lr_at(0, type="COSINE", base_lr=0.1, warmup_lr=0.4, warmup_steps=0, max_iter=10) == pytest.approx(0.1)
    assert lr_at(3, type="STEP", base_lr=0.1, warmup_lr=0.4, max_iter=10) == pytest.approx(0.1)


def test_steps_act_at_their_iteration() -> None:
    """bisect_right: the factor holds from the step itself on."""
    schedule = {"type": "STEP", "base_lr": 0.01, "warmup_steps": 4, "warmup_lr": 0.1, "max_iter": 40}
    schedule |= {"lr_steps": [10, 20], "lr_mults": [0.1, 0.5]}
    expected = {0: 0.01, 2: 0.055, 4: 0.1, 9: 0.1, 10: 0.01, 19: 0.01, 20: 0.005, 39: 0.005}
    assert {step: lr_at(step, **schedule) for step in expected} == pytest.approx(expected)


def test_a_step_within_the_warm_up_counts_after_it() -> None:
    schedule = {"type": "STEP", "base_lr": 0.0, "warmup_steps": 10, "warmup_lr": 1.0, "max_iter": 40}
    schedule |= {"lr_steps": [5], "lr_mults": [0.1]}
    assert lr_at(6, **schedule) == pytest.approx(0.6)
    assert lr_at(10, **schedule) == pytest.approx(0.1)


def test_absent_steps_may_be_none() -> None:
    assert lr_at(5, type="STEP", base_lr=0.3, max_iter=10, lr_steps=None, lr_mults=None) == 0.3


def test_unknown_type() -> None:
    with pytest.raises(ValueError, match="must be COSINE or STEP"):
        lr_at(0, type="POLY", base_lr=0.1, max_iter=10)
