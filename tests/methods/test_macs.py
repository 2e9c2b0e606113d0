"""The counter against the published figures is in the tests of the networks and methods; here what is its own."""

from __future__ import annotations

import pytest
import torch

import methods
from methods.macs import count_macs, count_parameters
from networks import BACKBONES


def test_a_published_figure_and_batch_norm() -> None:
    with torch.device("meta"):
        model = BACKBONES["resnet50"](num_class=1000)
    assert count_parameters(model) == 25_557_032
    with_norms = count_macs(model, (1, 3, 224, 224))
    assert with_norms / 1e9 == pytest.approx(4.112, abs=0.6e-3)
    assert with_norms - count_macs(model, (1, 3, 224, 224), norms=False) == 2 * 11_113_984


def test_attention_counts() -> None:
    """Scores and their use: 2 N M D for each of the five blocks (positions N, pooled positions M, inner channels D)."""
    build = {"type": "tsm", "backbone": "resnet50", "num_class": 400, "num_segments": 8}
    shape = (1, 3, 8, 64, 64)
    with torch.device("meta"):
        without = count_macs(methods.build(**build), shape, norms=False)
        model = methods.build(**build, non_local="embedded_gaussian")
    convolutions = attention = 0
    for blocks, channels, side in ((2, 512, 8), (3, 1024, 4)):
        places, pooled, inner = 8 * side**2, 8 * (side // 2) ** 2, channels // 2
        convolutions += blocks * places * 4 * channels * inner
        attention += blocks * 2 * places * pooled * inner
    assert count_macs(model, shape, norms=False) == without + convolutions + attention


def test_the_model_is_not_changed() -> None:
    model = methods.build(type="tsn", backbone="resnet18", num_class=5, num_segments=2, partial_bn=True)
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert count_macs(model, (1, 3, 2, 64, 64)) > 0
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError):
        count_macs(model, (1, 4, 2, 64, 64))
    assert modes == {name: module.training for name, module in model.named_modules()}
