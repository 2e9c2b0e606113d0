"""The measurements behind the rows of issue 03; each returns {"measured": ..., "holds": bool}."""

from __future__ import annotations

import concurrent.futures
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import checks01
from rows import ROOT, SHARED, command, copy_experiment, evaluate, train_cpu

# ---------------------------------------------------------------- published figures

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
    sys.path.insert(0, str(ROOT))
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
        found: dict[str, Any] = {"parameters": count_parameters(model), "tensors": len(model.state_dict())}
        for size in operations:
            shape = (1, 3, frames, size, size)
            macs = count_macs(model, shape, norms=norms) + (relu_and_pool(model, shape) if name in WITH_RELU else 0)
            found[f"gmacs@{size}"] = macs / 1e9
        wanted = {"parameters": parameters, "tensors": tensors}
        wanted |= {f"gmacs@{size}": value for size, value in operations.items()}
        for key, value in wanted.items():
            if value is None:
                continue
            same = found[key] == value if isinstance(value, int) else round(found[key], _digits(value)) == value
            equal[key.partition("@")[0]] += same
            wrong += [] if same else [f"{name} {key}: {found[key]} for {value}"]
        table.append({"model": name, **{key: _short(value) for key, value in found.items()}})
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
        found = (count_parameters(large), count_parameters(small), len(large.state_dict()))
        operations = count_macs(large, (1, 3, 224, 224)) / 1e9
        same = found == (with_1000, with_400, tensors) and abs(operations - gmac) < 0.6e-3
        equal += same
        wrong += [] if same else [f"{name}: {found}, {operations:.4f} GMAC for {FIGURES[name]}"]
    return {"equal": equal, "wrong": wrong}


def _digits(value: float) -> int:
    return len(str(value).partition(".")[2])


def _short(value: float) -> float:
    return round(value, 3) if isinstance(value, float) else value


# ---------------------------------------------------------------- training at small size

NOT_ZERO = "model.kwargs.zero_init_residual=false"  # blocks that start as identities need a longer run than this
# Overrides of the weizmann4 experiment of issue 01 (TSM ResNet-18, 8 frames of 56 pixels, batch 8, 300 steps).
WEIZMANN: dict[str, list[str]] = {
    "tsn": ["model.type=tsn"],
    "tsm": [],
    "slowonly": ["model.type=slowonly", NOT_ZERO],
    "slowfast": [
        "model.type=slowfast",
        "model.num_segments=16",
        "model.kwargs.alpha=4",
        "model.kwargs.fusion_kernel=5",
        NOT_ZERO,
    ],
    "tpn": ["model.type=tpn", "model.kwargs.base=tsm", "lr_scheduler.max_iter=250"],
    "pptsn": ["model.type=pptsn", "model.backbone=resnet18_vd"],
    "pptsm": ["model.type=pptsm", "model.backbone=resnet18_vd"],
}
# Overrides of exps/demo_exps/tsn_resnet18/motion8 (8 frames of 56 pixels; its number of steps where none is given).
ORDER: dict[str, list[str]] = {
    "tsn": [],
    "tsm": ["model.type=tsm"],
    "slowonly": ["model.type=slowonly", NOT_ZERO, "lr_scheduler.max_iter=450", "val_freq=450"],
    "slowfast": [
        "model.type=slowfast",
        "model.num_segments=16",
        "model.kwargs.alpha=4",
        "model.kwargs.fusion_kernel=5",
        NOT_ZERO,
        "lr_scheduler.max_iter=300",
        "val_freq=300",
    ],
    "tpn": ["model.type=tpn", "model.kwargs.base=tsm", "lr_scheduler.max_iter=300", "val_freq=300"],
}
BLIND = ("tsn",)  # methods that cannot see the order of frames


def chosen(names: Iterable[str]) -> list[str]:
    """The methods that $ZOETROPE_ACCEPT_ONLY names (a,b,c), else all."""
    only = os.environ.get("ZOETROPE_ACCEPT_ONLY")
    known = list(names)
    picked = only.split(",") if only else known
    if set(picked) - set(known):
        raise ValueError(f"ZOETROPE_ACCEPT_ONLY names {sorted(set(picked) - set(known))}; there are {known}")
    return picked


def in_pairs(names: Sequence[str], one: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Two runs at a time, one thread each; what a run measured, or how it broke, by its name."""

    def guarded(name: str) -> dict[str, Any]:
        try:
            return one(name)
        except Exception as error:  # noqa: BLE001  one broken run does not hide the others
            return {"top1": 0.0, "cpu_minutes": 0.0, "error": f"{type(error).__name__}: {str(error)[-400:]}"}

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(guarded, names), strict=True))


def weizmann(work: Path) -> dict:
    """Every method from scratch on real people through train.sh; val top-1 of the last checkpoint."""

    def one(name: str) -> dict[str, Any]:
        exp = checks01.weizmann_experiment(work / f"weizmann-{name}", SHARED, SHARED, "video")
        minutes = train_cpu(exp, 0, *WEIZMANN[name])
        sets = [word for item in WEIZMANN[name] for word in ("--set", item)]
        top1 = evaluate(exp, 0, "--checkpoint", "latest", *sets)["metrics"]["top1"] / 100
        return {"top1": top1, "cpu_minutes": round(minutes, 2)}

    names = chosen(WEIZMANN)
    found = in_pairs(names, one)
    holds = all(run["top1"] >= 0.75 and run["cpu_minutes"] <= 8 and "error" not in run for run in found.values())
    return {"measured": found | {"of": list(WEIZMANN)}, "holds": holds and len(names) == len(WEIZMANN)}


def order(work: Path) -> dict:
    """Who can tell a motion from its reverse: top-1 on motion8 after a short run from scratch."""
    data = motion8(work)

    def one(name: str) -> dict[str, Any]:
        exp = copy_experiment("demo_exps/tsn_resnet18/motion8", work / f"order-{name}")
        sets = [*places(data), "common.shards=2", *ORDER[name]]
        minutes = train_cpu(exp, 0, *sets)
        words = [word for item in sets for word in ("--set", item)]
        top1 = evaluate(exp, 0, "--checkpoint", "latest", *words)["metrics"]["top1"] / 100
        return {"top1": top1, "cpu_minutes": round(minutes, 2)}

    names = chosen(ORDER)
    found = in_pairs(names, one)
    right = [
        "error" not in run and (run["top1"] <= 0.60 if name in BLIND else run["top1"] >= 0.90)
        for name, run in found.items()
    ]
    return {"measured": found | {"of": list(ORDER)}, "holds": all(right) and len(names) == len(ORDER)}


def motion8(work: Path) -> Path:
    """The demo's data, made once in this folder."""
    data = work / "motion8"
    if not (data / "lists/val.txt").exists():
        command("main.py", "demo-data", "--out", data)
    return data


def places(data: Path) -> list[str]:
    """Overrides that lead to the demo's data elsewhere."""
    lists = data / "lists"
    return [
        f"common.train_root={data}",
        f"common.train_source={lists}/train.txt",
        f"common.val_root={data}",
        f"common.val_source={lists}/val.txt",
        f"common.data.class_names={lists}/classInd.txt",
    ]


# ---------------------------------------------------------------- a student and its teacher

STEPS = 100  # of 16 clips: too few for the small student on its own
STUDENT = ["model.type=tsm", "model.backbone=mobilenetv2", f"lr_scheduler.max_iter={STEPS}", f"val_freq={STEPS}"]
SEEDS = (0, 1, 2)


def teacher(work: Path) -> dict:
    """TSM MobileNetV2 alone, with a frozen TSM ResNet-18 (kd), and learning together with one (dml); three seeds."""
    data = motion8(work)
    source = "demo_exps/tsn_resnet18/motion8"
    shared = [*places(data), "common.shards=2"]
    master = copy_experiment("demo_exps/tsm_resnet18/motion8", work / "teacher")
    minutes = {"teacher": round(train_cpu(master, 0, *shared), 2)}
    words = [word for item in shared for word in ("--set", item)]
    top1 = {"teacher": evaluate(master, 0, "--checkpoint", "latest", *words)["metrics"]["top1"] / 100}
    kinds = {
        "alone": [],
        "kd": [f"distill.teacher={master}", "distill.kind=kd"],
        "dml": [f"distill.teacher={master}", "distill.kind=dml"],
    }

    def one(name: str) -> dict[str, Any]:
        kind, _, seed = name.partition("-")
        exp = copy_experiment(source, work / f"student-{name}")
        sets = [*shared, *STUDENT, *kinds[kind], f"common.seed={seed}"]
        spent = train_cpu(exp, 0, *sets)
        words = [word for item in sets for word in ("--set", item)]
        score = evaluate(exp, 0, "--checkpoint", "latest", *words)["metrics"]["top1"] / 100
        return {"top1": score, "cpu_minutes": round(spent, 2)}

    found = in_pairs([f"{kind}-{seed}" for kind in kinds for seed in SEEDS], one)
    table = {}
    for kind in kinds:
        scores = [found[f"{kind}-{seed}"]["top1"] for seed in SEEDS]
        table[kind] = {"mean": round(statistics.mean(scores), 4), "seeds": scores}
    errors = {name: run["error"] for name, run in found.items() if "error" in run}
    measured = {"top1": top1 | table, "cpu_minutes": minutes | {n: r["cpu_minutes"] for n, r in found.items()}}
    return {"measured": measured | ({"errors": errors} if errors else {}), "holds": not errors}


# ---------------------------------------------------------------- tests that are rows

T = "tests/methods"
OPERATORS: dict[str, list[str]] = {
    "shift on a ramp and by its definition": [
        f"{T}/test_tsm.py::test_shift_on_a_ramp_in_time",
        f"{T}/test_tsm.py::test_shift_equals_its_definition",
        f"{T}/test_tsm.py::test_shift_gradients",
    ],
    "lateral strides": [f"{T}/test_slowfast.py::test_lateral_against_its_definition"],
    "frames of the Slow pathway": [f"{T}/test_slowfast.py::test_slow_frames"],
    "TPN modulation": [f"{T}/test_tpn.py::test_temporal_modulation_against_its_definition"],
    "TPN flow": [f"{T}/test_tpn.py::test_where_the_bottom_up_flow_starts"],
    "TPN fusion and tempos": [
        f"{T}/test_tpn.py::test_level_fusion_pools_the_faster_level",
        f"{T}/test_tpn.py::test_tempos_of_the_levels",
        f"{T}/test_tpn.py::test_shapes_of_the_necks_weights",
    ],
    "ResNet-vd shortcut": ["tests/networks/test_resnet_vd.py::test_shortcut_against_its_definition"],
    "non-local attention": [f"{T}/test_non_local.py::test_against_the_definition"],
    "inflation": ["tests/networks/test_resnet3d.py::test_inflated_network_answers_a_constant_clip_like_the_2d_network"],
    "precise-BN": ["tests/utils/test_precise_bn.py::test_equals_a_slow_reference"],
    "KD and DML losses": [
        "tests/utils/test_distill.py::test_kd_equals_its_closed_form",
        "tests/utils/test_distill.py::test_kd_gradient_is_that_of_hinton_2015_equation_2",
        "tests/utils/test_distill.py::test_mutual_equals_its_closed_form_and_paddlevideos",
    ],
}


def operators() -> dict:
    """The tests that hold each operator against a closed form or a slow reference: passed of run, by operator."""
    wanted = [test for tests in OPERATORS.values() for test in tests]
    argv = ("-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *wanted)
    done = command(*argv, check=False, env={"OMP_NUM_THREADS": "1"})
    results = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (\S+)", done.stdout, re.MULTILINE)
    found, holds = {}, done.returncode == 0
    for name, tests in OPERATORS.items():
        own = [word for word, test in results if re.split(r"[\[]", test)[0].startswith(tuple(tests))]
        found[name] = f"{own.count('PASSED')} of {len(own)}"
        holds &= bool(own) and set(own) == {"PASSED"}
    return {"measured": found | ({} if holds else {"output": done.stdout[-1500:]}), "holds": holds}


def passed(*tests: str) -> str:
    """The last line of pytest: `4 passed in 1.20s`; a name that is not there is an error in it."""
    argv = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    done = command(*argv, check=False, env={"OMP_NUM_THREADS": "1"})
    lines = (done.stdout + done.stderr).strip().splitlines()
    summary = next((line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)|no tests", line)), "")
    clean = done.returncode == 0 and "skipped" not in summary
    return summary.strip("= ") if clean else f"failed: {summary or lines[-1:]}"


def by_test(*tests: str) -> dict:
    """A row that is one test file."""
    line = passed(*tests)
    return {"measured": line, "holds": not line.startswith("failed")}
