"""SlowFast: frames of the Slow pathway, laterals, order of the classifier's input, published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from methods._non_local import NonLocal
from methods.slowfast import Lateral, slow_frames
from tests import golden, models
from utils.errors import UserError

MM = {"lateral_norm": False, "slow_index": "strided", "slow_first": False}
R4X16 = {"alpha": 8, "fusion_kernel": 5}


def build(**options: Any) -> models.Model:
    torch.manual_seed(0)
    arguments = {"type": "slowfast", "backbone": "resnet18", "num_class": 5, "num_segments": 8}
    return models.build(**(arguments | options))


@pytest.mark.parametrize(
    ("alpha", "rule", "expected"),
    [
        (8, "strided", [0, 8, 16, 24]),
        (8, "linspace", [0, 10, 20, 31]),
        (4, "strided", [0, 4, 8, 12, 16, 20, 24, 28]),
        (4, "linspace", [0, 4, 8, 13, 17, 22, 26, 31]),
        (32, "linspace", [0]),
        (1, "linspace", list(range(32))),
    ],
)
def test_slow_frames(alpha: int, rule: str, expected: list[int]) -> None:
    assert slow_frames(32, alpha, rule) == expected


def test_slow_frames_equal_the_peers_tables() -> None:
    for row in golden.rows("slow_pathway_indices"):
        assert slow_frames(row["T"], row["alpha"], "linspace") == row["psf"]
        assert slow_frames(row["T"], row["alpha"], "strided") == row["mma"]


@pytest.mark.parametrize(("alpha", "kernel"), [(8, 5), (4, 7), (2, 1)])
def test_lateral_against_its_definition(alpha: int, kernel: int) -> None:
    """Output t is the kernel centred on Fast frame alpha * t; frames outside the clip are zero."""
    lateral = Lateral(2, alpha=alpha, kernel=kernel, norm=False).double()
    fast = torch.randn(1, 2, 16, 2, 2, dtype=torch.float64)
    weight = lateral.conv.weight[..., 0, 0]  # (4, 2, k)
    out = torch.zeros(1, 4, 16 // alpha, 2, 2, dtype=torch.float64)
    for t in range(16 // alpha):
        for k in range(kernel):
            frame = alpha * t + k - kernel // 2
            if 0 <= frame < 16:
                out[:, :, t] += torch.einsum("oc,nchw->nohw", weight[:, :, k], fast[:, :, frame])
    with torch.no_grad():
        torch.testing.assert_close(lateral(fast), out, rtol=1e-12, atol=1e-12)


def test_shapes_of_the_laterals() -> None:
    with torch.device("meta"):
        model = build(backbone="resnet50", num_segments=32, **R4X16)
    convs = [lateral.conv for lateral in model.backbone.laterals]
    shapes = [(16, 8, 5, 1, 1), (64, 32, 5, 1, 1), (128, 64, 5, 1, 1), (256, 128, 5, 1, 1)]
    assert [tuple(conv.weight.shape) for conv in convs] == shapes
    assert {(conv.stride, conv.padding) for conv in convs} == {((8, 1, 1), (2, 0, 0))}
    slow = model.backbone.slow
    assert [slow.get_submodule(f"layer{i}.0.conv1").in_channels for i in range(1, 5)] == [80, 320, 640, 1280]
    assert model.classifier.in_features == 2304


@pytest.mark.parametrize(
    ("options", "params", "tensors"),
    [
        ({"backbone": "resnet50", **R4X16, **MM}, 34_479_288, 642),
        ({"backbone": "resnet50", **R4X16}, 34_480_216, 662),
        ({"backbone": "resnet50", **MM}, 34_565_560, 642),
        ({"backbone": "resnet50"}, 34_566_488, 662),
        ({"backbone": "resnet101", **MM}, 62_912_312, 1254),
        ({"backbone": "resnet101", "fusion_kernel": 5}, 62_826_968, 1274),
        ({"backbone": "resnet101", "fusion_kernel": 5, "res4_temporal_blocks": 6}, 53_774_808, 1274),
        ({"backbone": "resnet101", "fast_backbone": "resnet50", **R4X16, **MM}, 62_384_312, 948),
    ],
)
def test_published_parameter_counts(options: dict, params: int, tensors: int) -> None:
    with torch.device("meta"):
        model = build(num_class=400, num_segments=32, **options)
    assert sum(p.numel() for p in model.parameters()) == params
    assert len(model.state_dict()) == tensors


@pytest.mark.parametrize(
    ("options", "size", "gmac"),
    [
        ({"backbone": "resnet50", **R4X16, **MM}, 224, 27.82),
        ({"backbone": "resnet50", **R4X16}, 256, 36.34),
        ({"backbone": "resnet50"}, 224, 50.58),
        ({"backbone": "resnet50"}, 256, 66.07),
        ({"backbone": "resnet101", "fusion_kernel": 5}, 224, 96.79),
        ({"backbone": "resnet101", "fusion_kernel": 5}, 256, 126.42),
        ({"backbone": "resnet101", "fusion_kernel": 5, "res4_temporal_blocks": 6}, 224, 81.94),
        ({"backbone": "resnet101", "fusion_kernel": 5, "res4_temporal_blocks": 6}, 256, 107.03),
        ({"backbone": "resnet101", "fusion_kernel": 5, "res4_temporal_blocks": 6, "num_segments": 64}, 224, 163.89),
        ({"backbone": "resnet101", "fusion_kernel": 5, "res4_temporal_blocks": 6, "num_segments": 64}, 256, 214.06),
    ],
)
def test_published_operations(options: dict, size: int, gmac: float) -> None:
    """Convolutions, linear layers and BN (two operations per element), as fvcore counts."""
    total = 0

    def count(module: nn.Module, _args: object, out: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv3d):
            total += out.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += out.numel() * module.in_features
        elif isinstance(module, nn.BatchNorm3d):
            total += 2 * out.numel()

    with torch.device("meta"):
        model = build(**({"num_class": 400, "num_segments": 32} | options)).eval()
        for module in model.modules():
            module.register_forward_hook(count)
        with torch.inference_mode():
            model(torch.empty(1, 3, options.get("num_segments", 32), size, size))
    assert total / 1e9 == pytest.approx(gmac, abs=0.006)


def test_order_of_the_classifiers_input() -> None:
    slow_first, fast_first = build().double().eval(), build(slow_first=False).double().eval()
    fast_first.load_state_dict(slow_first.state_dict())
    columns = slow_first.classifier.weight
    with torch.no_grad():
        fast_first.classifier.weight.copy_(torch.cat([columns[:, 512:], columns[:, :512]], 1))
        x = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(fast_first(x), slow_first(x))


def test_slow_pathway_sees_its_frames() -> None:
    model = build(slow_index="linspace", alpha=2).eval()
    seen = {}
    for name in ("slow", "fast"):
        path = model.backbone.get_submodule(name)
        path.conv1.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
    x = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        model(x)
    assert torch.equal(seen["slow"], x[:, :, [0, 2, 4, 7]])
    assert torch.equal(seen["fast"], x)


def test_laterals_without_norm_are_bare() -> None:
    lateral = Lateral(4, alpha=2, kernel=3, norm=False)
    assert list(lateral.state_dict()) == ["conv.weight"]
    x = torch.randn(1, 4, 4, 2, 2)
    with torch.no_grad():
        expected = F.conv3d(x, lateral.conv.weight, stride=(2, 1, 1), padding=(1, 0, 0))
        assert torch.equal(lateral(x), expected)


def test_non_local_blocks_stand_in_the_slow_pathway() -> None:
    with torch.device("meta"):
        model = build(backbone="resnet50", num_segments=32, non_local="dot_product")
    names = [name for name, module in model.named_modules() if isinstance(module, NonLocal)]
    places = [f"backbone.slow.layer2.{i}_non_local" for i in (1, 3)]
    assert names == places + [f"backbone.slow.layer3.{i}_non_local" for i in (1, 3, 5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_segments": 6}, "multiple of alpha = 4"),
        ({"slow_index": "random"}, "slow_index is 'random'"),
        ({"fusion_kernel": 4}, "fusion_kernel is 4; it must be odd"),
        ({"beta_inv": 7}, "beta_inv is 7"),
        ({"backbone": "mobilenetv2"}, "no 3D form"),
        ({"non_local": "cosine"}, "non_local is 'cosine'"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


def test_a_clip_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="4 frames, this SlowFast was built for num_segments = 8"):
        build()(torch.zeros(1, 3, 4, 32, 32))


def test_the_fast_pathway_can_keep_the_temporal_kernels_that_the_slow_one_lacks() -> None:
    """PySlowFast's R101 "50-101": NUM_BLOCK_TEMP_KERNEL [6, 23] in res4."""
    options = {"backbone": "resnet101", "res4_temporal_blocks": 6, "fast_res4_temporal_blocks": 23}
    with torch.device("meta"):
        pathways = build(num_class=400, num_segments=32, **options).backbone
    counts = [sum(block.conv1.kernel_size[0] == 3 for block in path.layer3) for path in (pathways.slow, pathways.fast)]
    assert counts == [6, 23]
