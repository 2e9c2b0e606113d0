"""3D ResNets: temporal kernels per stage, shapes, zero initialisation, inflation of 2D weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import BACKBONES
from networks.resnet3d import KERNELS_FAST, BasicBlock3d, Bottleneck3d, ResNet3d, inflate


def temporal_kernels(network: nn.Module, prefix: str = "") -> list[int]:
    return [m.kernel_size[0] for n, m in network.named_modules() if isinstance(m, nn.Conv3d) and n.startswith(prefix)]


def temporal_extent(network: nn.Module, layer: str) -> int:
    conv = network.get_submodule(layer)
    assert isinstance(conv, nn.Conv3d)
    return conv.kernel_size[0]


def test_temporal_kernels_of_slow_and_fast() -> None:
    with torch.device("meta"):
        slow, fast = ResNet3d("resnet50"), ResNet3d("resnet50", width=8, kernels=KERNELS_FAST)
    assert temporal_kernels(slow, "conv1") == [1]
    assert set(temporal_kernels(slow, "layer1") + temporal_kernels(slow, "layer2")) == {1}
    for layer, depth in (("layer3", 6), ("layer4", 3)):
        first = [slow.get_submodule(f"{layer}.{i}.conv1").kernel_size for i in range(depth)]
        assert first == [(3, 1, 1)] * depth
        assert sorted(temporal_kernels(slow, layer))[:-depth] == [1] * (2 * depth + 1)
    assert temporal_kernels(fast, "conv1") == [5]
    assert [temporal_extent(fast, f"layer{i}.0.conv1") for i in range(1, 5)] == [3, 3, 3, 3]
    assert fast.out_channels == (8, 32, 64, 128, 256)
    assert slow.out_channels == (64, 256, 512, 1024, 2048)


def test_temporal_extent_of_res4_can_be_limited() -> None:
    with torch.device("meta"):
        network = ResNet3d("resnet101", res4_temporal_blocks=6)
    kernels = [temporal_extent(network, f"layer3.{i}.conv1") for i in range(23)]
    assert kernels == [3] * 6 + [1] * 17
    assert [temporal_extent(network, f"layer4.{i}.conv1") for i in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("layout", ["resnet18", "resnet50"])
@pytest.mark.parametrize("frames", [1, 5])
def test_time_is_never_strided(layout: str, frames: int) -> None:
    with torch.device("meta"):
        network = ResNet3d(layout)
        x = torch.empty(2, 3, frames, 64, 96)
        assert network.stem(x).shape == (2, 64, frames, 16, 24)
        assert network.res4(x).shape == (2, network.out_channels[3], frames, 4, 6)
        assert network(x).shape == (2, network.feature_dim, frames, 2, 3)


def test_published_figures() -> None:
    """Backbone and a classifier of 400 classes: 32,454,096 and 60,359,120 parameters, 320 and 626 tensors."""
    with torch.device("meta"):
        for layout, params, tensors in (("resnet50", 31_634_496, 318), ("resnet101", 59_539_520, 624)):
            network = ResNet3d(layout)
            assert sum(p.numel() for p in network.parameters()) == params
            assert len(network.state_dict()) == tensors


@pytest.mark.parametrize("layout", ["resnet18", "resnet50"])
def test_blocks_start_as_identities(layout: str) -> None:
    torch.manual_seed(0)
    network = ResNet3d(layout)
    block = network.layer1[1].eval()
    x = torch.rand(1, network.out_channels[1], 2, 4, 4)
    with torch.no_grad():
        assert torch.equal(block(x), x)
    ones = [m for m in ResNet3d(layout, zero_init_residual=False).modules() if isinstance(m, nn.BatchNorm3d)]
    assert all((norm.weight == 1).all() for norm in ones)
    blocks = [m for m in network.modules() if isinstance(m, BasicBlock3d | Bottleneck3d)]
    zeros = [m for m in network.modules() if isinstance(m, nn.BatchNorm3d) and not m.weight.any()]
    assert len(zeros) == len(blocks)


@pytest.mark.parametrize("layout", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_same_names_as_the_2d_network(layout: str) -> None:
    with torch.device("meta"):
        assert list(ResNet3d(layout).state_dict()) == list(BACKBONES[layout]().state_dict())


def test_inflated_network_answers_a_constant_clip_like_the_2d_network() -> None:
    """Away from the first and last frames, where zero padding shows."""
    torch.manual_seed(0)
    flat = BACKBONES["resnet50"]().double().eval()
    for module in flat.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    network = ResNet3d("resnet50").double().eval()
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    network.load_state_dict(inflate(flat.state_dict(), shapes))
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        maps = network(image.unsqueeze(2).expand(-1, -1, 21, -1, -1)).mean((3, 4))  # (1, D, 21)
        expected = flat(image)
    middle = maps[:, :, 10]  # 9 convolutions of extent 3 reach 9 frames to each side
    torch.testing.assert_close(middle, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(maps[:, :, 0], expected, rtol=1e-3)


def test_inflate_leaves_what_is_not_a_3d_kernel() -> None:
    state = {"conv": torch.ones(2, 3, 1, 1), "other": torch.ones(2, 3, 1, 1), "bn": torch.arange(3.0)}
    shapes = {"conv": torch.Size((2, 3, 3, 1, 1)), "bn": torch.Size((3,))}
    out = inflate(state, shapes)
    assert out["conv"].shape == (2, 3, 3, 1, 1)
    torch.testing.assert_close(out["conv"].sum(2), state["conv"])
    assert out["other"] is state["other"]
    assert out["bn"] is state["bn"]


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="no 3D form of 'mobilenetv2'; choose one of resnet18"):
        ResNet3d("mobilenetv2")
