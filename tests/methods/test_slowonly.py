"""SlowOnly: published figures, any T, inflation through `pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from networks import BACKBONES
from tests import models
from utils.errors import UserError


def build(**options: Any) -> models.Model:
    torch.manual_seed(0)
    arguments = {"type": "slowonly", "backbone": "resnet18", "num_class": 5, "num_segments": 4}
    return models.build(**(arguments | options))


def count_macs(model: nn.Module, x: torch.Tensor, *, norms: bool = True) -> float:
    """Giga multiply-accumulates of convolutions and linear layers, and two per element for BN as fvcore has it."""
    total = 0

    def count(module: nn.Module, _args: object, out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            total += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += out.numel() * module.in_features
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) and norms:
            total += 2 * out.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    with torch.inference_mode():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return total / 1e9


@pytest.mark.parametrize(
    ("backbone", "frames", "params", "tensors", "gmac_224", "gmac_256"),
    [
        ("resnet50", 4, 32_454_096, 320, 20.96, 27.38),
        ("resnet50", 8, 32_454_096, 320, 41.92, 54.75),
        ("resnet101", 8, 60_359_120, 626, 85.67, 111.9),
    ],
)
def test_published_figures(
    backbone: str, frames: int, params: int, tensors: int, gmac_224: float, gmac_256: float
) -> None:
    with torch.device("meta"):
        model = build(backbone=backbone, num_class=400, num_segments=frames)
        assert sum(p.numel() for p in model.parameters()) == params
        assert len(model.state_dict()) == tensors
        assert count_macs(model, torch.empty(1, 3, frames, 224, 224)) == pytest.approx(gmac_224, abs=0.006)
        assert count_macs(model, torch.empty(1, 3, frames, 256, 256)) == pytest.approx(gmac_256, abs=0.006)


def test_other_lengths_at_evaluation() -> None:
    model = build().eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 9, 32, 32)).shape == (1, 5)


def test_order_of_frames_matters() -> None:
    model = build(zero_init_residual=False).double().eval()
    x = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        assert not torch.allclose(model(x), model(x.flip(2)), rtol=1e-6)


def test_image_weights_are_inflated(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = BACKBONES["resnet18"](num_class=1000).state_dict()
    torch.save(state, tmp_path / "image.pth")
    model = build(pretrained=str(tmp_path / "image.pth"))
    backbone_state = model.backbone.state_dict()
    torch.testing.assert_close(backbone_state["layer4.1.conv1.weight"].sum(2), state["layer4.1.conv1.weight"])
    assert torch.equal(backbone_state["layer1.0.conv1.weight"][:, :, 0], state["layer1.0.conv1.weight"])
    assert torch.equal(backbone_state["layer2.0.bn2.weight"], state["layer2.0.bn2.weight"])
    assert "its classifier is left out" in model.pretrained_note


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backbone": "mobilenetv2"}, "no 3D form of 'mobilenetv2'"), ({"num_segments": 0}, "num_segments is 0")],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


@pytest.mark.parametrize(
    ("form", "places", "pool_first"),
    [("mmaction2", [0, 2, 0, 2, 4], False), ("pyslowfast", [1, 3, 1, 3, 5], True)],
)
def test_non_local_blocks_stand_where_each_tool_puts_them(form: str, places: list[int], pool_first: bool) -> None:
    with torch.device("meta"):
        model = build(backbone="resnet50", num_class=400, non_local="dot_product", non_local_form=form)
    blocks = {name: module for name, module in model.named_modules() if name.endswith("_non_local")}
    assert [int(name.split(".")[-1].partition("_")[0]) for name in blocks] == places
    assert {module.pool_first for module in blocks.values()} == {pool_first}
    assert sum(p.numel() for p in model.parameters()) == 39_808_464, "as MMAction2 1.2.0 builds it"


def test_an_unknown_non_local_form_is_named() -> None:
    with pytest.raises(UserError, match="non_local_form"):
        build(non_local="dot_product", non_local_form="caffe2")
