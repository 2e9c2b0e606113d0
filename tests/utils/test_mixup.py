from __future__ import annotations

from typing import Any

import pytest
import torch

from utils import mixup, transforms


def test_neighbours_are_mixed() -> None:
    clips = torch.rand(6, 3, 2, 4, 4, dtype=torch.float64)
    mixed = mixup.apply(clips, mixup.Mix(0.3))
    for i in range(6):
        assert torch.allclose(mixed[i], 0.3 * clips[i] + 0.7 * clips[i ^ 1], atol=1e-15, rtol=0)


def test_layout_and_input_are_kept() -> None:
    clips = transforms.normalise(torch.randint(0, 256, (4, 2, 8, 8, 3), dtype=torch.uint8))
    before = clips.clone()
    mixed = mixup.apply(clips, mixup.Mix(0.6))
    assert mixed.stride() == clips.stride()
    assert torch.equal(clips, before)
    assert torch.equal(mixup.apply(clips, mixup.Mix(1.0)), clips)


def test_a_pair_alone_gives_the_same_bits() -> None:
    clips = torch.rand(8, 3, 5, 7, 9)
    assert torch.equal(mixup.apply(clips, mixup.Mix(0.123))[2:4], mixup.apply(clips[2:4], mixup.Mix(0.123)))


def test_partner_and_odd_batches() -> None:
    assert mixup.partner(torch.tensor([5, 6, 7, 8])).tolist() == [6, 5, 8, 7]
    with pytest.raises(ValueError, match="even number of clips, got 3"):
        mixup.apply(torch.rand(3, 2), mixup.Mix(0.5))


# ---------------------------------------------------------------- CutMix, and the switch between both

RECIPE: dict[str, Any] = {"mix_up": 0.8, "cutmix": 1.0, "switch": 0.5, "side": 32}
STEPS = 10_000
BOX = mixup.Mix(0.5, (3, 9, 5, 16))


def within_three_sigma(count: int, of: int, share: float) -> bool:
    return abs(count - of * share) <= 3 * (of * share * (1 - share)) ** 0.5


def test_a_box_comes_from_the_neighbour_in_every_frame() -> None:
    clips = transforms.normalise(torch.randint(0, 256, (6, 2, 16, 16, 3), dtype=torch.uint8))
    before = clips.clone()
    cut = mixup.apply(clips, BOX)
    for i in range(6):
        for y in range(16):
            for x in range(16):
                source = i ^ 1 if 3 <= y < 9 and x >= 5 else i
                assert torch.equal(cut[i, ..., y, x], clips[source, ..., y, x])
    assert torch.equal(clips, before)
    assert cut.stride() == clips.stride()
    assert torch.equal(cut[2:4], mixup.apply(clips[2:4], BOX)), "a pair alone has the same bits"
    with pytest.raises(ValueError, match="even number of clips, got 3"):
        mixup.apply(clips[:3], BOX)


def test_draws_are_functions_of_seed_and_step() -> None:
    """The switch does not change what either one draws, and mixup alone draws what it drew before there was CutMix."""
    both = [mixup.draw(7, step, **RECIPE) for step in range(200)]
    assert both == [mixup.draw(7, step, **RECIPE) for step in range(200)]
    assert both != [mixup.draw(8, step, **RECIPE) for step in range(200)]
    for step, mix in enumerate(both):
        alone = {**RECIPE, "cutmix" if mix.box is None else "mix_up": None}
        assert mixup.draw(7, step, **alone) == mix
    assert mixup.draw(7, 3, **{**RECIPE, "mix_up": None, "cutmix": None}) == mixup.Mix()


def test_lam_is_the_share_of_own_pixels() -> None:
    for step in range(300):
        mix = mixup.draw(1, step, **{**RECIPE, "mix_up": None})
        clips = torch.zeros(2, 1, 1, 32, 32, dtype=torch.float64)
        clips[1] = 1
        assert mix.lam == 1 - mixup.apply(clips, mix)[0].mean().item()
        assert mix.box is not None
        assert all(0 <= edge <= 32 for edge in mix.box)


def test_mixup_draws_beta_once_a_step() -> None:
    alone = {**RECIPE, "mix_up": 0.2, "cutmix": None}
    values = torch.tensor([mixup.draw(3, step, **alone).lam for step in range(4000)], dtype=torch.float64)
    assert len(values.unique()) > 3900
    assert values.min() >= 0.0
    assert values.max() <= 1.0
    assert abs(float(values.mean()) - 0.5) < 0.02
    assert abs(float(values.var()) - 1 / (4 * (2 * 0.2 + 1))) < 0.01  # Var Beta(a, a) = 1 / (4 (2a + 1))


def test_known_values_of_mixup() -> None:
    """A change here changes what every stored run trains on after a resume: it must not happen."""
    assert [round(mixup.draw(3, step, **{**RECIPE, "cutmix": None}).lam, 6) for step in (0, 7)] == [0.439848, 0.253486]


@pytest.mark.parametrize("switch", [0.0, 0.3, 0.5, 1.0])
def test_odds_of_the_switch(switch: float) -> None:
    cuts = sum(mixup.draw(0, step, **{**RECIPE, "switch": switch}).box is not None for step in range(STEPS))
    assert within_three_sigma(cuts, STEPS, switch)


def test_distribution_of_boxes() -> None:
    """Alpha 1: the area that is cut is uniform before it is clipped; the centre lies anywhere."""
    drawn = torch.tensor([mixup.cut(0, step, 1.0) for step in range(STEPS)], dtype=torch.float64)
    for column in drawn.T:
        assert abs(column.mean() - 0.5) <= 3 * (1 / 12 / STEPS) ** 0.5
        assert within_three_sigma(int((column < 0.25).sum()), STEPS, 0.25)
    correlation = torch.corrcoef(drawn.T) - torch.eye(4)
    assert correlation.abs().max() < 4 / STEPS**0.5
    for alpha in (0.4, 5.0):
        areas = torch.tensor([mixup.cut(0, step, alpha)[1] for step in range(STEPS)], dtype=torch.float64)
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(areas.mean() - 0.5) <= 3 * (variance / STEPS) ** 0.5
        assert areas.var().item() == pytest.approx(variance, rel=0.05)


def test_a_box_without_pixels_mixes_nothing() -> None:
    clips = torch.rand(2, 3, 2, 8, 8)
    assert mixup.apply(clips, mixup.Mix(1.0, (4, 4, 0, 8))) is clips
