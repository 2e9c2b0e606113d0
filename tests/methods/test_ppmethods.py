"""PP-TSN and PP-TSM: TSN and TSM on ResNet-vd, with PaddleVideo's choices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from methods.tsm import TemporalShift
from networks.resnet_vd import ResNetVd
from tests import models
from utils.errors import UserError


def build(method: str, **options: Any) -> models.Model:
    torch.manual_seed(0)
    arguments = {"type": method, "backbone": "resnet18", "num_class": 5, "num_segments": 4}
    return models.build(**(arguments | options))


@pytest.mark.parametrize("method", ["pptsn", "pptsm"])
@pytest.mark.parametrize("backbone", ["resnet50", "resnet50_vd"])
def test_published_figures(method: str, backbone: str) -> None:
    with torch.device("meta"):
        model = build(method, backbone=backbone, num_class=400)
    assert isinstance(model.backbone, ResNetVd)
    assert sum(p.numel() for p in model.parameters()) == 24_346_864
    assert len(model.state_dict()) == 332
    assert model.fc_lr5


@pytest.mark.parametrize(("method", "kind"), [("pptsn", nn.ReLU), ("pptsm", nn.LeakyReLU)])
def test_activations(method: str, kind: type[nn.Module]) -> None:
    kinds = {type(m) for m in build(method).backbone.modules() if isinstance(m, nn.ReLU | nn.LeakyReLU)}
    assert kinds == {kind}


@pytest.mark.parametrize("frames", [2, 4, 16])
def test_pptsm_shifts_as_paddle_does(frames: int) -> None:
    with torch.device("meta"):
        shifts = [m for m in build("pptsm", num_segments=frames).modules() if isinstance(m, TemporalShift)]
    assert {(m.shift_div, m.direction, m.num_segments) for m in shifts} == {(frames, "paddle", frames)}
    assert len(shifts) == 8


def test_every_block_of_resnet101_shifts() -> None:
    with torch.device("meta"):
        model = build("pptsm", backbone="resnet101")
    assert sum(isinstance(m, TemporalShift) for m in model.modules()) == 33


def test_pptsn_averages_features_and_order_does_not_matter() -> None:
    model = build("pptsn").double().eval()
    assert model.consensus == "features"
    x = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), model(x.flip(2)))


@pytest.mark.parametrize("method", ["pptsn", "pptsm"])
@pytest.mark.parametrize("backbone", ["mobilenetv2", "resnet152"])
def test_wrong_backbone(method: str, backbone: str) -> None:
    with pytest.raises(UserError, match="resnet18, 34, 50 or 101 in the vd form"):
        build(method, backbone=backbone)
