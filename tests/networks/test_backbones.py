"""Backbones against published figures: parameters, tensors, operations, names, and torchvision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import BACKBONES
from networks.mobilenet import InvertedResidual
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
    ratios = [b.conv[-2].in_channels // b.conv[0][0].in_channels for b in blocks]
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


@pytest.mark.parametrize("name", [name for name in FIGURES if not name.endswith("_vd")])
def test_same_numbers_as_torchvision(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(vision.load("torchvision.models"), TORCHVISION_NAMES.get(name, name))().eval()
    ours = BACKBONES[name](num_class=1000).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
