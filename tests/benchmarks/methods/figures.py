"""Parameters, tensors and multiply-adds of every model with published figures."""

from __future__ import annotations

import sys
from typing import Any

from tests.benchmarks.rows import run_rows

# K = 400 unless given.
MM = {"lateral_norm": False, "slow_index": "strided", "slow_first": False}


R4X16 = {"alpha": 8, "fusion_kernel": 5}


FIFTY = {"fusion_kernel": 5, "res4_temporal_blocks": 6}


Figure = tuple[str, dict[str, Any], int | None, int | None, dict[int, float]]


# name, arguments of methods.build, parameters, tensors, {input size: GMACs of one clip}. K = 400 unless given.
METHODS: list[Figure] = [
    ("tsn resnet50", {"type": "tsn"}, 24_327_632, 320, {}),
    ("tsm resnet50 8f", {"type": "tsm"}, 24_327_632, 320, {224: 32.88}),
    ("tsm resnet101 8f", {"type": "tsm", "backbone": "resnet101"}, 43_319_760, 626, {224: 62.66}),
    ("tsm mobilenetv2 8f", {"type": "tsm", "backbone": "mobilenetv2"}, 2_736_272, 314, {224: 2.51}),
    ("tsm resnet50 gaussian", {"type": "tsm", "non_local": "gaussian"}, 28_007_888, None, {}),
    ("tsm resnet50 dot product", {"type": "tsm", "non_local": "dot_product"}, 31_682_000, None, {}),
    ("tsm resnet50 embedded", {"type": "tsm", "non_local": "embedded_gaussian"}, 31_682_000, None, {}),
    ("slowonly resnet50 4x16", {"type": "slowonly", "num_segments": 4}, 32_454_096, 320, {224: 20.96, 256: 27.38}),
    ("slowonly resnet50 8x8", {"type": "slowonly"}, 32_454_096, 320, {224: 41.92, 256: 54.75}),
    ("slowonly resnet101 8x8", {"type": "slowonly", "backbone": "resnet101"}, 60_359_120, 626, {224: 85.67}),
    ("slowfast resnet50 4x16, MMAction2", {**R4X16, **MM}, 34_479_288, 642, {224: 27.82}),
    ("slowfast resnet50 4x16, PySlowFast", {**R4X16}, 34_480_216, 662, {256: 36.34}),
    ("slowfast resnet50 8x8, MMAction2", {**MM}, 34_565_560, 642, {}),
    ("slowfast resnet50 8x8, PySlowFast", {}, 34_566_488, 662, {224: 50.58, 256: 66.07}),
    ("slowfast resnet101 8x8, MMAction2", {"backbone": "resnet101", **MM}, 62_912_312, 1254, {}),
    (
        "slowfast resnet101 8x8, PySlowFast",
        {"backbone": "resnet101", "fusion_kernel": 5},
        62_826_968,
        1274,
        {224: 96.79, 256: 126.42},
    ),
    (
        "slowfast resnet101 8x8 50-50",
        {"backbone": "resnet101", **FIFTY},
        53_774_808,
        1274,
        {224: 81.94, 256: 107.03},
    ),
    (
        "slowfast resnet101 16x8 50-50",
        {"backbone": "resnet101", "num_segments": 64, **FIFTY},
        53_774_808,
        1274,
        {224: 163.89, 256: 214.06},
    ),
    (
        "slowfast resnet101-resnet50 4x16, MMAction2",
        {"backbone": "resnet101", "fast_backbone": "resnet50", **R4X16, **MM},
        62_384_312,
        948,
        {256: 65.04},
    ),
    ("tpn slowonly resnet50 8x8", {"type": "tpn"}, 91_498_336, 379, {224: 50.28, 256: 65.67}),
    ("tpn slowonly resnet50 32x2", {"type": "tpn", "num_segments": 32}, None, None, {224: 198.2}),
    ("tpn slowonly resnet101 8x8", {"type": "tpn", "backbone": "resnet101"}, 119_403_360, None, {224: 93.95}),
    ("tpn tsm resnet50 8f", {"type": "tpn", "base": "tsm", "num_class": 174}, 82_445_724, None, {224: 41.23}),
    ("pptsn resnet50_vd", {"type": "pptsn", "backbone": "resnet50_vd"}, 24_346_864, 332, {}),
    ("pptsm resnet50_vd", {"type": "pptsm", "backbone": "resnet50_vd"}, 24_346_864, 332, {}),
    ("pptsm resnet101_vd", {"type": "pptsm", "backbone": "resnet101_vd"}, 43_338_992, 638, {}),
]


# TPN's published figures leave batch norm out, all others were counted with it; MMAction2's own counter adds an
# operation for each element that leaves a ReLU or enters a max-pooling.
WITHOUT_NORMS = "tpn"


WITH_RELU = {"slowfast resnet101-resnet50 4x16, MMAction2"}


def figures() -> dict:
    """Build every model of the fact sheet on the meta device and compare parameters, tensors and GMACs."""
    import torch

    import methods
    from methods.macs import count_macs, count_parameters

    shared = {"type": "slowfast", "backbone": "resnet50", "num_class": 400}
    table, wrong, equal = [], [], {"parameters": 0, "tensors": 0, "gmacs": 0}
    for name, given, parameters, tensors, operations in METHODS:
        arguments = shared | given
        frames = arguments.setdefault("num_segments", 32 if arguments["type"] == "slowfast" else 8)
        with torch.device("meta"):
            model = methods.build(**arguments)
        norms = arguments["type"] != WITHOUT_NORMS
        counted: dict[str, Any] = {"parameters": count_parameters(model), "tensors": len(model.state_dict())}
        for size in operations:
            shape = (1, 3, frames, size, size)
            macs = count_macs(model, shape, norms=norms) + (relu_and_pool(model, shape) if name in WITH_RELU else 0)
            counted[f"gmacs@{size}"] = macs / 1e9
        expected = {"parameters": parameters, "tensors": tensors}
        expected |= {f"gmacs@{size}": value for size, value in operations.items()}
        for key, value in expected.items():
            if value is None:
                continue
            same = counted[key] == value if isinstance(value, int) else round(counted[key], _digits(value)) == value
            equal[key.partition("@")[0]] += same
            wrong += [] if same else [f"{name} {key}: {counted[key]} for {value}"]
        table.append({"model": name, **{key: _short(value) for key, value in counted.items()}})
    backbones = _backbones()
    wrong += backbones["wrong"]
    measured = {"equal": equal, "backbones_equal": backbones["equal"], "different": wrong, "table": table}
    return {"measured": measured, "holds": not wrong}


def relu_and_pool(model: Any, shape: tuple[int, ...]) -> int:
    """Elements that leave a ReLU and elements that enter a max-pooling, in one pass over shapes."""
    import torch
    from torch import nn

    total = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        nonlocal total
        total += out.numel() if isinstance(module, nn.ReLU) else inputs[0].numel()

    kinds = (nn.ReLU, nn.MaxPool2d, nn.MaxPool3d)
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, kinds)]
    with torch.inference_mode():
        model.eval()(torch.empty(shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return total


def _backbones() -> dict[str, Any]:
    """The image networks: the tests' own table of published figures, compared here too."""
    import torch

    from methods.macs import count_macs, count_parameters
    from networks import BACKBONES
    from tests.networks.test_backbones import FIGURES

    equal, wrong = 0, []
    for name, (with_1000, with_400, tensors, gmac, _) in FIGURES.items():
        with torch.device("meta"):
            large, small = BACKBONES[name](num_class=1000), BACKBONES[name](num_class=400)
        counted = (count_parameters(large), count_parameters(small), len(large.state_dict()))
        operations = count_macs(large, (1, 3, 224, 224)) / 1e9
        same = counted == (with_1000, with_400, tensors) and abs(operations - gmac) < 0.6e-3
        equal += same
        wrong += [] if same else [f"{name}: {counted}, {operations:.4f} GMAC for {FIGURES[name]}"]
    return {"equal": equal, "wrong": wrong}


def _digits(value: float) -> int:
    return len(str(value).partition(".")[2])


def _short(value: float) -> float:
    return round(value, 3) if isinstance(value, float) else value


ROWS = {"figures": ("parameters, tensors, GMACs of every model on the fact sheet", "equal", figures)}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
