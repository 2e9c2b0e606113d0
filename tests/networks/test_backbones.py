"""Backbones against published figures: parameters, tensors, operations, names, and torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from networks import BACKBONES
from networks.mobilenet import InvertedResidual
from networks.mobileone import Unit
from utils import vision

# name: (parameters with 1000 classes, with 400, state-dict tensors, GMAC per image at 224, feature channels)
FIGURES = {
    "resnet18": (11_689_512, 11_381_712, 122, 1.819, 512),
    "resnet34": (21_797_672, 21_489_872, 218, 3.671, 512),
    "resnet50": (25_557_032, 24_327_632, 320, 4.112, 2048),
    "resnet101": (44_549_160, 43_319_760, 626, 7.834, 2048),
    "resnet152": (60_192_808, 58_963_408, 932, 11.559, 2048),
    "resnet18_vd": (11_708_744, 11_400_944, 134, 2.060, 512),
    "resnet34_vd": (21_816_904, 21_509_104, 230, 3.912, 512),
    "resnet50_vd": (25_576_264, 24_346_864, 332, 4.353, 2048),
    "resnet101_vd": (44_568_392, 43_338_992, 638, 8.075, 2048),
    "resnext101_32x4d": (44_177_704, 42_948_304, 626, 8.012, 2048),
    "densenet161": (28_681_000, 27_355_600, 967, 7.787, 2208),
    "mobileone_s4": (14_951_248, 13_721_848, 610, 3.041, 2048),  # timm's in training form
    "mobilenetv2": (3_504_872, 2_736_272, 314, 0.314, 1280),
}
TORCHVISION_NAMES = {"mobilenetv2": "mobilenet_v2"}


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-accumulates of convolutions and linear layers; BN counts two operations per element, as fvcore does."""
    total = 0

    def count(module: nn.Module, _args: object, out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += out.numel() * module.in_features
        elif isinstance(module, nn.BatchNorm2d):
            total += 2 * out.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    with torch.inference_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", FIGURES)
def test_parameters_tensors_and_operations(name: str) -> None:
    params_1000, params_400, tensors, gmac, feature_dim = FIGURES[name]
    with torch.device("meta"):  # shapes only: no memory, no arithmetic
        model = BACKBONES[name](num_class=1000)
        assert count_parameters(model) == params_1000
        assert count_parameters(BACKBONES[name](num_class=400)) == params_400
        assert len(model.state_dict()) == tensors
        macs = count_macs(model.eval(), torch.empty(1, 3, 224, 224))
        assert macs / 1e9 == pytest.approx(gmac, abs=0.6e-3)
        headless = BACKBONES[name]()
        assert headless.feature_dim == feature_dim
        assert headless(torch.empty(2, 3, 64, 64)).shape == (2, feature_dim)
        assert len(headless.state_dict()) == tensors - 2


def test_resnet_key_names() -> None:
    keys = set(BACKBONES["resnet50"](num_class=10).state_dict())
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.downsample.0.weight",
        "layer3.5.conv3.weight",
        "fc.bias",
    } <= keys
    assert not any("branch_input" in key or "before_layer2" in key for key in keys)
    assert "layer1.0.downsample.0.weight" not in BACKBONES["resnet18"]().state_dict()


def test_mobilenet_key_names() -> None:
    keys = set(BACKBONES["mobilenetv2"](num_class=10).state_dict())
    expected = {
        "features.0.0.weight",
        "features.1.conv.0.1.running_mean",
        "features.1.conv.1.weight",
        "features.1.conv.2.bias",
        "features.2.conv.1.0.weight",
        "features.2.conv.3.num_batches_tracked",
        "features.18.1.weight",
        "classifier.1.weight",
    }
    assert expected <= keys


def test_mobilenet_t_acts_on_the_first_block_of_each_later_stage() -> None:
    model = BACKBONES["mobilenetv2"](t=3)
    blocks = [m for m in model.modules() if isinstance(m, InvertedResidual)]
    convs: list[Any] = [block.conv for block in blocks]
    ratios = [conv[-2].in_channels // conv[0][0].in_channels for conv in convs]
    assert ratios == [1, 3, 6, 3, 6, 6, 3, 6, 6, 6, 3, 6, 6, 3, 6, 6, 3]
    assert not [m for m in BACKBONES["mobilenetv2"](t=1).modules() if isinstance(m, InvertedResidual)][1].expands
    with pytest.raises(ValueError, match="at least 1"):
        BACKBONES["mobilenetv2"](t=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2"])
def test_initial_weights_keep_the_scale_of_the_signal(name: str) -> None:
    """Kaiming fan-out: std of a convolution weight is sqrt(gain / fan_out)."""
    torch.manual_seed(0)
    for module in BACKBONES[name]().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def torchvision_model(name: str) -> nn.Module:
    """torchvision's network of our name; it has ResNeXt-101 only of 8 and 64 groups."""
    models = vision.load("torchvision.models")
    if name == "resnext101_32x4d":
        return models.ResNet(models.resnet.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
    return getattr(models, TORCHVISION_NAMES.get(name, name))()


OF_TORCHVISION = [name for name in FIGURES if not name.endswith("_vd") and name != "mobileone_s4"]
LARGE = ("densenet161", "resnext101_32x4d")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in OF_TORCHVISION]
)
def test_same_numbers_as_torchvision(name: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision_model(name).eval()
    ours = BACKBONES[name](num_class=1000).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_the_branches_of_mobileone_are_one_convolution() -> None:
    """A convolution, a 1x1 convolution and the identity, each with its BN, are one convolution with a bias."""
    torch.manual_seed(0)
    unit: Any = Unit(8, 8, 3, groups=8).double().eval()
    for norm in (module for module in unit.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            nn.init.uniform_(tensor, 0.5, 1.5)
    kernel, bias = torch.zeros(8, 1, 3, 3).double(), torch.zeros(8).double()
    centre = torch.zeros(8, 1, 3, 3).double()
    centre[:, :, 1, 1] = 1
    branches = ((unit.conv[0].weight, unit.conv[1]), (unit.scale[0].weight * centre, unit.scale[1]))
    for weight, norm in (*branches, (centre, unit.identity)):
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        kernel, bias = kernel + weight * factor[:, None, None, None], bias + norm.bias - norm.running_mean * factor
    x = torch.randn(2, 8, 9, 7).double()
    joined = torch.relu(nn.functional.conv2d(x, kernel, bias, padding=1, groups=8))
    torch.testing.assert_close(unit(x), joined)
