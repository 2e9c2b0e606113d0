"""The learning rate at points computed by hand, and those of a published training log."""

from __future__ import annotations

import math
from typing import Any

import pytest

from utils.lr_schedule import lr_at, rate_per_256, scaling_remark

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


COSINE = {"type": "COSINE", "base_lr": 0.01, "warmup_lr": 0.1, "warmup_steps": 34, "max_iter": 196}


def pyslowfast(epoch: float) -> float:
    """lr_policy.py of PySlowFast for the Slow and SlowFast recipes, in its own words: epochs, not iterations."""

    def cosine(at: float) -> float:
        return 0.1 * (math.cos(math.pi * at / 196) + 1.0) * 0.5

    return 0.01 + epoch * (cosine(34) - 0.01) / 34 if epoch < 34 else cosine(epoch)


@pytest.mark.parametrize("step", [0, 1, 17, 33, 34, 35, 100, 195])
def test_to_schedule_is_the_warm_up_of_pyslowfast_and_paddlevideo(step: int) -> None:
    assert lr_at(step, **COSINE, warmup_type="to_schedule") == pytest.approx(pyslowfast(step), rel=1e-12)


def test_to_schedule_reaches_the_cosine_without_a_jump() -> None:
    before, at = (lr_at(step, **COSINE, warmup_type="to_schedule") for step in (33, 34))
    assert at == pytest.approx(0.05 * (1 + math.cos(math.pi * 34 / 196)))
    assert at - before == pytest.approx((at - 0.01) / 34)
    assert lr_at(34, **COSINE) == 0.1, "the cosine begins at the end of the warm-up"


@pytest.mark.parametrize(
    ("warmup_type", "factor"),
    [
        ("factor_linear", lambda k: 1 - (1 - k / 34) * (1 - 0.1)),
        ("factor_constant", lambda k: 0.1),
        ("factor_exp", lambda k: 0.1 ** (1 - k / 34)),
    ],
)
def test_factors_of_mmaction2_multiply_the_regular_rate(warmup_type: str, factor) -> None:  # noqa: ANN001
    for step in (0, 1, 20, 33, 34, 50):
        regular = 0.05 * (1 + math.cos(math.pi * step / 196))
        expected = regular * (factor(step) if step < 34 else 1)
        assert lr_at(step, **COSINE, warmup_type=warmup_type) == pytest.approx(expected, rel=1e-12)
    assert lr_at(0, **COSINE, warmup_type=warmup_type) == pytest.approx(0.01)


def test_factors_multiply_steps_too() -> None:
    schedule = {"type": "STEP", "base_lr": 0.1, "warmup_lr": 1.0, "warmup_steps": 10, "max_iter": 40}
    schedule |= {"lr_steps": [5], "lr_mults": [0.1], "warmup_type": "factor_linear"}
    assert lr_at(4, **schedule) == pytest.approx(0.46)
    assert lr_at(5, **schedule) == pytest.approx(0.055)


def test_by_epoch_the_schedule_stands_still_within_an_epoch() -> None:
    """MMAction2 0.x: CosineAnnealing by epoch; the warm-up's factor still moves in every iteration."""
    per_epoch = [lr_at(step, type="COSINE", base_lr=0.1, max_iter=40, epoch_iters=10.0) for step in range(40)]
    assert per_epoch == [0.05 * (1 + math.cos(math.pi * (step // 10) / 4)) for step in range(40)]
    warm = {"type": "COSINE", "base_lr": 0.01, "warmup_lr": 0.1, "warmup_steps": 20, "max_iter": 40}
    rate = lr_at(15, **warm, warmup_type="factor_linear", epoch_iters=10.0)
    assert rate == pytest.approx(per_epoch[10] * (1 - 0.25 * 0.9))
    assert lr_at(25, **warm, epoch_iters=10.0) == lr_at(20, **warm) == pytest.approx(0.1)


@pytest.mark.parametrize("epoch_iters", [10.0, 10.3, 10.6, 7.5, 0.4, 153.7])
def test_epochs_that_are_not_whole_begin_where_lengths_in_epochs_say(epoch_iters: float) -> None:
    """`lr_epochs: [3]` becomes round(3 * epoch_iters); stepping by epoch acts at that very iteration."""
    border = max(1, round(3 * epoch_iters))
    schedule = {"type": "STEP", "base_lr": 1.0, "max_iter": 10_000, "lr_steps": [border], "lr_mults": [0.1]}
    for step in range(int(5 * epoch_iters) + 2):
        by_epoch, by_step = lr_at(step, **schedule, epoch_iters=epoch_iters), lr_at(step, **schedule)
        assert by_epoch == by_step, step


def test_unknown_warm_up() -> None:
    with pytest.raises(ValueError, match="must be one of to_peak"):
        lr_at(0, type="COSINE", base_lr=0.1, max_iter=10, warmup_type="slow")


def test_the_scaling_remark_names_rates_and_changes_nothing() -> None:
    rates = {"base_lr": 0.01, "warmup_lr": 0.04, "min_lr": 0.0}
    remark = scaling_remark(256, 1024, **rates)
    assert remark is not None
    assert "base_lr 0.01 -> 0.0025, warmup_lr 0.04 -> 0.01." in remark
    assert "min_lr" not in remark
    assert "Nothing was changed" in remark
    assert scaling_remark(1024, 1024, **rates) is None
    assert scaling_remark(1024, None, **rates) is None


def test_a_warm_up_by_epoch_is_that_of_mmaction2_1() -> None:
    """mmengine's LinearLR of 5 epochs from 0.1: rates .1, .325, .55, .775 and 1 of the peak, each for an epoch."""
    schedule: dict[str, Any] = {
        "type": "STEP", "base_lr": 0.002, "warmup_lr": 0.02, "warmup_steps": 40, "max_iter": 500,
    }  # fmt: skip
    schedule |= {"lr_steps": [250], "lr_mults": [0.1], "warmup_epoch_iters": 10.0}
    expected = [0.02 * (0.1 + 0.9 * min(step // 10, 4) / 4) for step in range(60)]
    assert [lr_at(step, **schedule) for step in range(60)] == pytest.approx(expected, rel=1e-12)
    assert lr_at(250, **schedule) == pytest.approx(0.002)
    by_iteration = {**schedule, "warmup_epoch_iters": None}
    assert lr_at(15, **by_iteration) == pytest.approx(0.02 * (0.1 + 0.9 * 15 / 40))


def test_the_rate_per_256_is_that_of_the_recipe() -> None:
    """VideoMAE ViT-B on Kinetics: 5e-4 at 256, 64 GPUs x 6 videos."""
    assert "0.00075 at a global batch of 384 videos is 0.0005 per 256" in rate_per_256(384, 7.5e-4)
