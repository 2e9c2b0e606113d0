"""What the methods learn: real people, the order of frames, a teacher's answers.

$ZOETROPE_ACCEPT_ONLY=tsn,tsm trains these methods alone; such a row does not hold. $ZOETROPE_VIDEOMAE names a finished
experiment to probe, in place of half an hour of training.
"""

from __future__ import annotations

import concurrent.futures
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.experiments import weizmann_experiment
from tests.benchmarks.rows import SHARED, command, copy_experiment, evaluate, run_rows, train_cpu, workspace

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
        exp = weizmann_experiment(work / f"weizmann-{name}", SHARED, SHARED, "video")
        minutes = train_cpu(exp, 0, *WEIZMANN[name])
        sets = [word for item in WEIZMANN[name] for word in ("--set", item)]
        top1 = evaluate(exp, 0, "--checkpoint", "latest", *sets)["metrics"]["top1"] / 100
        return {"top1": top1, "cpu_minutes": round(minutes, 2)}

    names = chosen(WEIZMANN)
    runs = in_pairs(names, one)
    holds = all(run["top1"] >= 0.75 and run["cpu_minutes"] <= 8 and "error" not in run for run in runs.values())
    return {"measured": runs | {"of": list(WEIZMANN)}, "holds": holds and len(names) == len(WEIZMANN)}


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
    runs = in_pairs(names, one)
    right = [
        "error" not in run and (run["top1"] <= 0.60 if name in BLIND else run["top1"] >= 0.90)
        for name, run in runs.items()
    ]
    return {"measured": runs | {"of": list(ORDER)}, "holds": all(right) and len(names) == len(ORDER)}


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

    runs = in_pairs([f"{kind}-{seed}" for kind in kinds for seed in SEEDS], one)
    table = {}
    for kind in kinds:
        scores = [runs[f"{kind}-{seed}"]["top1"] for seed in SEEDS]
        table[kind] = {"mean": round(statistics.mean(scores), 4), "seeds": scores}
    errors = {name: run["error"] for name, run in runs.items() if "error" in run}
    measured = {"top1": top1 | table, "cpu_minutes": minutes | {n: r["cpu_minutes"] for n, r in runs.items()}}
    return {"measured": measured | ({"errors": errors} if errors else {}), "holds": not errors}


HEADS = ["model.kwargs.lr_mults=[3, 1, 0.3]", "model.kwargs.decays=[0.05]"]


def transformer(work: Path) -> dict:
    """VideoMAE from scratch on motion8 (6 blocks, width 192, tubelet 2, 16 frames), then probes on it, frozen."""
    data = motion8(work)
    shared = places(data)
    words = [word for item in shared for word in ("--set", item)]
    finished = os.environ.get("ZOETROPE_VIDEOMAE")
    exp = Path(finished) if finished else copy_experiment("demo_exps/videomae_vit3d/motion8", work / "videomae")
    runs: dict[str, dict[str, Any]] = {"videomae": {"cpu_minutes": "not measured in this run"}}
    if not finished:
        runs["videomae"]["cpu_minutes"] = round(train_cpu(exp, 2, *shared), 2)
    runs["videomae"]["top1"] = evaluate(exp, 2, "--checkpoint", "latest", *words)["metrics"]["top1"] / 100

    for head in ("linear", "attentive"):
        probe = copy_experiment("demo_exps/videomae_vit3d/motion8", work / f"probe-{head}")
        sets = [*shared, "model.type=probe", "model.kwargs.encoder=videomae", f"model.kwargs.head={head}", *HEADS]
        sets += [f"model.pretrained={exp / 'ckpt.pth.tar'}", "lr_scheduler.max_iter=300", "val_freq=300"]
        minutes = train_cpu(probe, 2, *sets)
        words = [word for item in sets for word in ("--set", item)]
        top1 = evaluate(probe, 2, "--checkpoint", "latest", *words)["metrics"]["top1"] / 100
        runs[f"{head} probe"] = {"top1": top1, "cpu_minutes": round(minutes, 2)}
    holds = all(run["top1"] >= 0.90 for run in runs.values())
    return {"measured": runs, "holds": holds and (bool(finished) or runs["videomae"]["cpu_minutes"] <= 50)}


ROWS = {
    "transformer": (
        "VideoMAE from scratch on motion8, and probes on it, frozen",
        "top-1 >= .90 each; VideoMAE <= 25 minutes of two cores",
        lambda: transformer(workspace()),
    ),
    "weizmann": (
        "every method from scratch on weizmann4",
        "top-1 of the last checkpoint >= .75, <= 8 CPU minutes each",
        lambda: weizmann(workspace()),
    ),
    "order": (
        "order-blind and order-aware on motion8",
        "TSN <= .60; TSM, SlowOnly, SlowFast, TPN >= .90",
        lambda: order(workspace()),
    ),
    "teacher": ("small student alone, with kd, with dml; 3 seeds", "measured table", lambda: teacher(workspace())),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
