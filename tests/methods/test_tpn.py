"""TPN: shapes of modulation, flow and fusion, cascade against parallel, auxiliary head, published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from methods._output import Output
from methods.tpn import TPN, LevelFusion, Neck, TemporalModulation
from methods.tsm import TemporalShift, temporal_shift
from tests import models
from utils.errors import UserError


def build(**options: Any) -> models.Model:
    torch.manual_seed(0)
    arguments = {"type": "tpn", "backbone": "resnet18", "num_class": 5, "num_segments": 4}
    return models.build(**(arguments | options))


def clips(frames: int = 4, size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, frames, size, size, generator=torch.Generator().manual_seed(1))


def test_published_figures() -> None:
    with torch.device("meta"):
        model = build(backbone="resnet50", num_class=400, num_segments=8)
        parts = [
            sum(p.numel() for p in part.parameters())
            for part in (model, model.backbone, model.neck, model.aux_head, model.classifier)
        ]
        assert parts == [91_498_336, 31_634_496, 59_044_240 - 19_698_064, 19_698_064, 819_600]
        assert len(model.state_dict()) == 379
        deep = build(backbone="resnet101", num_class=400, num_segments=8)
        assert sum(p.numel() for p in deep.parameters()) == 119_403_360
        tsm = build(backbone="resnet50", num_class=174, num_segments=8, base="tsm")
        assert sum(p.numel() for p in tsm.parameters()) == 82_445_724


@pytest.mark.parametrize(
    ("options", "frames", "size", "gmac"),
    [
        ({"backbone": "resnet50"}, 8, 224, 50.28),
        ({"backbone": "resnet50"}, 8, 256, 65.67),
        ({"backbone": "resnet50"}, 32, 224, 198.2),
        ({"backbone": "resnet101"}, 8, 224, 93.95),
        ({"backbone": "resnet50", "base": "tsm", "num_class": 174}, 8, 224, 41.23),
    ],
)
def test_published_operations(options: dict, frames: int, size: int, gmac: float) -> None:
    """Convolutions and linear layers, without the auxiliary head."""
    total = 0

    def count(module: nn.Module, _args: object, out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            total += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += out.numel() * module.in_features

    with torch.device("meta"):
        model = build(**({"num_class": 400, "num_segments": frames} | options)).eval()
        for module in model.modules():
            module.register_forward_hook(count)
        with torch.inference_mode():
            model(torch.empty(1, 3, frames, size, size))
    assert total / 1e9 == pytest.approx(gmac, abs=0.05 if gmac > 100 else 0.006)


def test_shapes_of_the_necks_weights() -> None:
    with torch.device("meta"):
        model = build(backbone="resnet50", num_segments=8)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name.endswith("conv.weight")}
    for level in (0, 1):
        assert shapes[f"neck.temporal_modulation.{level}.conv.weight"] == (1024, 64, 3, 1, 1)
        assert shapes[f"neck.top_down_fusion.levels.{level}.conv.weight"] == (1024, 32, 1, 1, 1)
    assert shapes["neck.bottom_up.conv.weight"] == (1024, 1024, 3, 1, 1)
    assert shapes["neck.bottom_up_fusion.fusion.conv.weight"] == (2048, 2048, 1, 1, 1)
    assert shapes["neck.spatial_modulation.conv.weight"] == (2048, 1024, 1, 3, 3)
    assert shapes["neck.pyramid_fusion.conv.weight"] == (2048, 4096, 1, 1, 1)
    assert shapes["aux_head.conv.conv.weight"] == (2048, 1024, 1, 3, 3)


@pytest.mark.parametrize(
    ("scales", "frames", "tempos"),
    [((8, 8), 8, (1, 1)), ((16, 32), 32, (2, 1)), ((2, 4), 8, (4, 2)), ((4, 4), 6, (2, 2)), ((1, 1), 3, (3, 3))],
)
def test_tempos_of_the_levels(scales: tuple[int, int], frames: int, tempos: tuple[int, int]) -> None:
    seen: dict[int, tuple[int, ...]] = {}
    with torch.device("meta"):
        neck = Neck(128, scales=scales, flow="cascade")
        for level, module in enumerate(neck.temporal_modulation):

            def note(_module: nn.Module, _args: object, out: torch.Tensor, level: int = level) -> None:
                seen[level] = tuple(out.shape)

            module.register_forward_hook(note)
        out = neck(torch.empty(2, 64, frames, 8, 6), torch.empty(2, 128, frames, 4, 3))
    assert seen == {level: (2, 64, tempos[level], 4, 3) for level in (0, 1)}
    assert out.shape == (2, 128, tempos[1], 4, 3)


def test_temporal_modulation_against_its_definition() -> None:
    """Grouped convolution over time, then the maximum of each run of `scale` frames, the last one shorter."""
    module = TemporalModulation(64, 32, scale=2, groups=32).double()
    x = torch.randn(1, 64, 5, 2, 2, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 0, 1, 1))
    conv = torch.zeros(1, 32, 5, 2, 2, dtype=torch.float64)
    for out in range(32):  # group `out` reads channels 2*out and 2*out + 1
        for t in range(5):
            window = padded[0, 2 * out : 2 * out + 2, t : t + 3]
            conv[0, out, t] = (window * module.conv.weight[out, :, :, 0, 0].view(2, 3, 1, 1)).sum((0, 1))
    expected = torch.stack([conv[:, :, 0:2].amax(2), conv[:, :, 2:4].amax(2), conv[:, :, 4]], 2)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_level_fusion_pools_the_faster_level() -> None:
    fusion = LevelFusion(32, 64, ratio=2).double().eval()
    low = torch.randn(1, 32, 4, 2, 2, dtype=torch.float64)
    high = torch.randn(1, 32, 2, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        pooled = low.unflatten(2, (2, 2)).amax(3)
        expected = fusion.fusion(torch.cat([fusion.levels[0](pooled), fusion.levels[1](high)], 1))
        assert fusion(low, high).shape == (1, 64, 2, 2, 2)
        torch.testing.assert_close(fusion(low, high), expected)


@pytest.mark.parametrize("flow", ["cascade", "parallel"])
def test_where_the_bottom_up_flow_starts(flow: str) -> None:
    torch.manual_seed(0)
    neck = Neck(64, scales=(2, 4), flow=flow).double().eval()
    res4 = torch.randn(1, 32, 4, 4, 4, dtype=torch.float64)
    res5 = torch.randn(1, 64, 4, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        low, high = neck.temporal_modulation[0](neck.spatial_modulation(res4)), neck.temporal_modulation[1](res5)
        fed = low + high.repeat_interleave(2, 2)
        start = fed if flow == "cascade" else low
        up = high + neck.bottom_up.conv(start).unflatten(2, (1, 2)).amax(3)
        maps = [neck.top_down_fusion(fed, high), neck.bottom_up_fusion(start, up)]
        torch.testing.assert_close(neck(res4, res5), neck.pyramid_fusion(torch.cat(maps, 1)))


def test_cascade_is_not_parallel() -> None:
    cascade, parallel = build().eval(), build(flow="parallel").eval()
    assert all(torch.equal(a, b) for a, b in zip(cascade.parameters(), parallel.parameters(), strict=True))
    with torch.inference_mode():
        assert not torch.allclose(cascade(clips()), parallel(clips()), rtol=1e-3)


def test_auxiliary_head_in_training_only() -> None:
    model = build(dropout=0.0)
    out = model(clips())
    assert isinstance(out, Output)
    assert out.logits.shape == out.aux.shape == (2, 5)
    assert out.aux_weight == 0.5
    res4 = model.backbone.res4(clips())
    torch.testing.assert_close(out.aux, model.aux_head(res4), rtol=1e-4, atol=1e-5)
    assert isinstance(model.eval()(clips()), torch.Tensor)


def test_weight_0_means_no_auxiliary_head() -> None:
    model = build(aux_weight=0.0)
    assert not any(name.startswith("aux_head") for name in model.state_dict())
    assert isinstance(model(clips()), torch.Tensor)


def test_fully_convolutional_test_averages_windows() -> None:
    without, fcn = build().double().eval(), build(fcn_pool=2).double().eval()
    assert isinstance(without, TPN)
    x = clips(size=96).double()  # the last map is 3x3: four windows of 2x2
    with torch.inference_mode():
        pyramid = without.neck(*without._levels(x))
        windows = [pyramid[..., i : i + 2, j : j + 2].mean((2, 3, 4)) for i in (0, 1) for j in (0, 1)]
        expected = torch.stack([without.classifier(window) for window in windows]).mean(0)
        torch.testing.assert_close(fcn(x), expected)
        assert not torch.allclose(fcn(x), without(x))
        small = clips(size=64).double()  # a 2x2 map is one window
        torch.testing.assert_close(fcn(small), without(small))


@pytest.mark.parametrize("shift_shortcut", [True, False])
def test_shift_before_the_shortcut(shift_shortcut: bool) -> None:
    model = build(base="tsm", shift_shortcut=shift_shortcut).eval()
    assert sum(isinstance(m, TemporalShift) for m in model.modules()) == 8
    assert list(model.state_dict()) == list(build(base="tsm").state_dict())
    block = model.backbone.layer2[0]
    x = torch.randn(4, 64, 8, 8)
    shifted = temporal_shift(x, num_segments=4)
    with torch.no_grad():
        y = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(shifted)))))
        conv, norm = list(block.downsample)[-2:]
        torch.testing.assert_close(block(x), F.relu(y + norm(conv(shifted if shift_shortcut else x))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "tsn"}, "base is 'tsn'"),
        ({"flow": "both"}, "flow is 'both'"),
        ({"scales": (2, 3)}, "the first must divide the second"),
        ({"scales": (8, 8)}, "there are only 4 frames"),
        ({"backbone": "mobilenetv2", "base": "tsm"}, "of a ResNet, not of mobilenetv2"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)
