"""RandAugment's draws: odds and magnitudes of the policy over 10,000 clips, and its text."""

from __future__ import annotations

import math

import numpy as np
import pytest

from datasets.plan.ops.randaugment import NONE, OPERATIONS, RandAugment
from datasets.plan.order import uniforms
from utils.config.kinds import RandPolicy, rand_policy

CLIPS = 10_000
VIDEOMAE = "rand-m7-n4-mstd0.5-inc1"


def drawn(text: str = VIDEOMAE, *, clips: int = CLIPS, side: int = 100) -> np.ndarray:
    """(clips, n, 2): what positions 0, 1, ... draw."""
    op = RandAugment(rand_policy(text))
    u = np.concatenate([uniforms(0, 0, position, op.block, op.uniforms)[None] for position in range(clips)])
    return op.resolve(u, side)


def is_within_three_sigma(count: int, of: int, share: float) -> bool:
    return abs(count - of * share) <= 3 * math.sqrt(of * share * (1 - share))


def test_odds_are_those_of_the_policy() -> None:
    rows = drawn()
    numbers = rows[..., 0].ravel()
    assert rows.shape == (CLIPS, 4, 2)
    assert is_within_three_sigma(int((numbers == NONE).sum()), numbers.size, 0.5)
    for number in range(len(OPERATIONS)):
        assert is_within_three_sigma(int((numbers == number).sum()), numbers.size, 0.5 / 15), OPERATIONS[number]
    pairs = (rows[:, 0, 0] == rows[:, 1, 0]) & (rows[:, 0, 0] != NONE)  # with replacement
    assert is_within_three_sigma(int(pairs.sum()), CLIPS, 0.25 / 15)


def test_magnitudes_are_normal_and_directions_even() -> None:
    rows = drawn().reshape(-1, 2)
    for name, largest in (("rotate", 30.0), ("shear_x", 0.3), ("translate_y", 45.0)):
        of = rows[rows[:, 0] == OPERATIONS.index(name), 1]
        magnitudes = np.abs(of) / largest * 10
        assert abs(magnitudes.mean() - 7) <= 3 * 0.5 / math.sqrt(len(of))
        assert abs(magnitudes.std() - 0.5) <= 3 * 0.5 / math.sqrt(2 * len(of))
        assert is_within_three_sigma(int((of < 0).sum()), len(of), 0.5)


@pytest.mark.parametrize(
    ("name", "weak", "strong"),
    [
        # Arguments at magnitudes 7 and 10 with inc1: timm's auto_augment.py, *_level_to_arg.
        ("rotate", 21.0, 30.0),
        ("posterize", 2, 0),
        ("solarize", 77, 0),
        ("solarize_add", 77, 110),
        ("saturation", 1.63, 1.9),
        ("contrast", 1.63, 1.9),
        ("brightness", 1.63, 1.9),
        ("sharpness", 1.63, 1.9),
        ("shear_x", 0.21, 0.3),
        ("translate_x", 31.5, 45.0),
        ("invert", 0, 0),
    ],
)
def test_arguments_grow_with_the_magnitude(name: str, weak: float, strong: float) -> None:
    u = np.array([[(OPERATIONS.index(name) + 0.5) / 15, 0.0, 0.5, 0.0]])
    for magnitude, expected in ((7, weak), (10, strong)):
        ((number, argument),) = RandAugment(rand_policy(f"rand-m{magnitude}-n1-inc1")).resolve(u, 100)[0]
        assert (OPERATIONS[int(number)], argument) == (name, pytest.approx(expected))


def test_the_other_direction_and_the_floor_of_enhancements() -> None:
    u = np.array([[(OPERATIONS.index("contrast") + 0.5) / 15, 0.0, 0.5, 0.75]])
    assert RandAugment(rand_policy("rand-m7-n1-inc1")).resolve(u, 100)[0, 0, 1] == pytest.approx(0.37)
    assert RandAugment(rand_policy("rand-m10-n1-inc1")).resolve(u, 100)[0, 0, 1] == pytest.approx(0.1)
    assert RandAugment(rand_policy("rand-m5-n1")).resolve(u, 100)[0, 0, 1] == pytest.approx(1.0), "without inc1"


def test_extreme_uniforms_stay_in_range() -> None:
    for value in (0.0, 1 - 2.0**-53):
        rows = RandAugment(rand_policy("rand-m7-n2-p1-mstd100")).resolve(np.full((3, 8), value), 32)
        assert np.isfinite(rows).all()
        assert set(rows[..., 0].ravel()) <= {0.0, float(len(OPERATIONS) - 1)}


def test_the_neutral_row_is_no_operation() -> None:
    assert (RandAugment(rand_policy(VIDEOMAE)).neutral == [[NONE, 0.0]] * 4).all()


def test_texts() -> None:
    assert rand_policy(VIDEOMAE) == RandPolicy(7, 4, 0.5, 0.5, 1)
    assert rand_policy("rand-m9") == RandPolicy(9, 2, 0.5, 0.0, 0)
    wrong = "rand rand- rand-m7-m8 rand-m11 rand-n0 rand-n1.5 rand-n17 rand-w0 augmix-m3 rand-tweights rand-mmax9"
    wrong += " rand-m7- rand-m7e3 rand-p1.5 rand-inc2 rand-m-7"
    for text in wrong.split():
        with pytest.raises(ValueError, match="must be a policy like rand-m7"):
            rand_policy(text)
