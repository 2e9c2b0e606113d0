"""ResNet-vd: deep stem, pooled shortcut with an odd edge, activation, timm's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import nn

from networks.resnet_vd import ResNetVd, resnet18_vd, resnet34_vd, resnet50_vd, resnet101_vd


@pytest.mark.parametrize(
    ("build", "params"),
    [(resnet18_vd, 11_400_944), (resnet34_vd, 21_509_104), (resnet50_vd, 24_346_864), (resnet101_vd, 43_338_992)],
)
def test_published_parameter_counts(build: Callable[..., ResNetVd], params: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(num_class=400).parameters()) == params


def test_names_are_those_of_timm() -> None:
    with torch.device("meta"):
        state = resnet50_vd(num_class=10).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["conv1.0.weight"] == (32, 3, 3, 3)
    assert shapes["conv1.3.weight"] == (32, 32, 3, 3)
    assert shapes["conv1.6.weight"] == (64, 32, 3, 3)
    assert shapes["bn1.weight"] == (64,)
    assert shapes["layer1.0.downsample.1.weight"] == (256, 64, 1, 1)
    assert shapes["layer2.0.downsample.2.running_mean"] == (512,)
    assert not any(".downsample.0." in name for name in shapes)


def reference_shortcut(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Average over the positions of each 2x2 window that lie inside, position by position, then 1x1 convolution."""
    n, c, height, width = x.shape
    out = torch.zeros(n, c, (height + 1) // 2, (width + 1) // 2, dtype=x.dtype)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            out[:, :, i, j] = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
    return torch.einsum("nchw,oc->nohw", out, weight[:, :, 0, 0])


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5)])
def test_shortcut_against_its_definition(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shortcut = resnet18_vd().layer2.get_submodule("0.downsample").double().eval()
    assert isinstance(shortcut, nn.Sequential)
    conv, norm = shortcut[1], shortcut[2]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    x = torch.randn(2, 64, *size, dtype=torch.float64)
    expected = reference_shortcut(x, conv.weight) / (1 + norm.eps) ** 0.5
    with torch.no_grad():
        torch.testing.assert_close(shortcut(x), expected, rtol=1e-12, atol=1e-12)


def test_stage_1_has_no_pooling_and_other_strides_are_kept() -> None:
    with torch.device("meta"):
        network: Any = resnet50_vd()
    assert isinstance(network.layer1[0].downsample[0], nn.Identity)
    for stage in (network.layer2, network.layer3, network.layer4):
        assert stage[0].downsample[1].stride == (1, 1)
        assert stage[0].conv2.stride == (2, 2)
        assert stage[1].downsample is None


@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("leaky_relu", nn.LeakyReLU)])
def test_activation_is_the_same_everywhere(activation: Literal["relu", "leaky_relu"], kind: type[nn.Module]) -> None:
    with torch.device("meta"):
        network = resnet50_vd(activation=activation)
    activations = [m for m in network.modules() if isinstance(m, nn.ReLU | nn.LeakyReLU)]
    assert len(activations) == 2 + 1 + 16
    assert all(isinstance(m, kind) for m in activations)
    assert {m.negative_slope for m in activations if isinstance(m, nn.LeakyReLU)} <= {0.01}


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        resnet18_vd(activation="gelu")  # pyright: ignore[reportArgumentType]
