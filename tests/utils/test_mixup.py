from __future__ import annotations

import pytest
import torch

from utils import mixup, transforms


def test_neighbours_are_mixed() -> None:
    clips = torch.rand(6, 3, 2, 4, 4, dtype=torch.float64)
    mixed = mixup.mix(clips, 0.3)
    for i in range(6):
        assert torch.allclose(mixed[i], 0.3 * clips[i] + 0.7 * clips[i ^ 1], atol=1e-15, rtol=0)


def test_layout_and_input_are_kept() -> None:
    clips = transforms.normalise(torch.randint(0, 256, (4, 2, 8, 8, 3), dtype=torch.uint8))
    before = clips.clone()
    mixed = mixup.mix(clips, 0.6)
    assert mixed.stride() == clips.stride()
    assert torch.equal(clips, before)
    assert torch.equal(mixup.mix(clips, 1.0), clips)


def test_a_pair_alone_gives_the_same_bits() -> None:
    clips = torch.rand(8, 3, 5, 7, 9)
    assert torch.equal(mixup.mix(clips, 0.123)[2:4], mixup.mix(clips[2:4], 0.123))


def test_partner_and_odd_batches() -> None:
    assert mixup.partner(torch.tensor([5, 6, 7, 8])).tolist() == [6, 5, 8, 7]
    with pytest.raises(ValueError, match="even number of clips, got 3"):
        mixup.mix(torch.rand(3, 2), 0.5)
