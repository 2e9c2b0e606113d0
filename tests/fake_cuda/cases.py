"""Training steps, validations and more of methods on a fake GPU, in one process; prints a JSON line per case.

python -m tests.fake_cuda.cases LIBRARY METHOD[=CASE] ...
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_VIT = {"width": 24, "depth": 2, "heads": 2}
METHODS: dict[str, dict[str, Any]] = {  # method -> options of its smallest network
    "tsn": {},
    "tsm": {},
    "slowonly": {},
    "slowfast": {"alpha": 4},
    "tpn": {},
    "pptsn": {},
    "pptsm": {},
    "videomae": _VIT | {"drop_path": 0.2},
    "vjepa2": _VIT | {"drop_path": 0.2, "pooler_layers": 1},
    "probe": _VIT | {"encoder": "videomae", "pooler_layers": 1},
}
TRANSFORMERS = ("videomae", "vjepa2", "probe")
# The recipe of the transformers in every one of their cases: what VideoMAE fine-tunes with.
RECIPE = ["optimizer.type=adamw", "nesterov=false", "optimizer.layer_decay=0.75", "no_wd=false"]
RECIPE += ["augmentation.cutmix=1", "augmentation.randaugment=rand-m7-n4-mstd0.5-inc1"]
WITHOUT_COLOURS = ["common.augmentation.colorjitter=null", "common.augmentation.random_erasing=null"]
WITHOUT_COLOURS += ["common.augmentation.mix_up=0"]
BESIDE_TRAINING = ("validation fp32", "validation bf16, measured", "precise BN and distillation")
CLIPPED = ["common.clip_grad=40", "common.ema=0.999"]


def cases_of(method: str) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `train`."""
    cases: dict[str, dict[str, Any]] = {
        "fp32 plain": {"precision": "fp32", "sets": WITHOUT_COLOURS},
        "fp32": {"precision": "fp32", "sets": CLIPPED},
        "bf16": {"precision": "bf16", "sets": CLIPPED},
        "fp16": {"precision": "fp16", "sets": CLIPPED},
        "bf16 4 micro-batches": {"precision": "bf16", "micro": 4},
        "bf16 group of 4 ranks": {"precision": "bf16", "ranks": 4, "group": 4},
    }
    more: dict[str, dict[str, dict[str, Any]]] = {
        "tsn": {
            "fp64": {"precision": "fp64"},
            "partial BN": {"precision": "bf16", "sets": ["common.model.kwargs.partial_bn=true"]},
            "several labels": {"precision": "fp16", "sets": ["common.loss=bce"], "multi_label": True},
            "2 micro-batches": {"precision": "fp32", "micro": 2},
            "groups of 2 ranks": {"precision": "fp32", "ranks": 4, "group": 2},
            "own statistics": {"precision": "bf16", "sets": ["common.model.kwargs.bn_sync_stats=false"]},
        },
        "tsm": {
            "mobilenetv2": {"precision": "bf16", "backbone": "mobilenetv2"},
            "non-local": {
                "precision": "bf16",
                "backbone": "resnet50",
                "sets": ["common.model.kwargs.non_local=embedded_gaussian"],
            },
            "temporal pool": {"precision": "fp16", "sets": ["common.model.kwargs.temporal_pool=true"]},
        },
        "slowonly": {"fp64": {"precision": "fp64"}},
        "tpn": {"on tsm": {"precision": "bf16", "sets": ["common.model.kwargs.base=tsm"]}},
    }
    return cases | more.get(method, {})


def smallest(method: str) -> dict[str, Any]:
    """Arguments of `methods.build` for a network of 8 frames and 8 classes; transformers take clips of 32 x 32."""
    backbone = "vit3d" if method in TRANSFORMERS else "resnet18"
    return {"type": method, "backbone": backbone, "num_class": 8, "num_segments": 8} | METHODS[method]


class Gpu:
    """A fake GPU and what the cases share."""

    def __init__(self, library: str) -> None:
        from tests.fake_cuda import mode

        mode.load_guard(library)
        self.mode = mode.make()
        import torch

        self.device = torch.device("cuda", 0)
        gc.freeze()  # `fresh` looks for what cases have left, not at all that is imported

    def fresh(self) -> Any:
        """Forget what earlier cases left."""
        from utils import transfer

        transfer.constant.cache_clear()
        self.mode.pinned.clear()
        gc.collect()
        self.mode.forget()
        return self.mode


@contextlib.contextmanager
def ranks_joined(size: int) -> Any:
    """A process group of which the other ranks exist by name only."""
    if size == 1:
        yield
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def build(gpu: Gpu, folder: Path, method: str, sets: list[str], shards: Any, world: Any) -> Any:
    """A `Learner`, built by the code that training uses."""
    from tests import experiment
    from utils import config
    from utils.engine import learner

    cfg = config.load(experiment.make(folder / "exp", folder), sets)
    return learner.build(cfg, world, shards, None, lambda text: None)


def batch_of(gpu: Gpu, cfg: Any, shards: tuple[int, ...], *, multi_label: bool) -> Any:
    """A micro-batch as `TrainLoader` hands it over."""
    import torch

    from datasets.loading.train import Batch
    from utils import transfer

    frames, side = cfg.model.num_segments * cfg.data.clip_len, cfg.augmentation.input_size
    count = cfg.batch_size * len(shards)
    to = functools.partial(transfer.to_device, device=gpu.device)
    jitter = torch.tensor([1.1, 0.9, 1.2, 0.05, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64).repeat(count, 1, 1)
    jitter[::2, :, 4:] = torch.arange(4.0)
    drawn = {"flip": (torch.arange(count) % 2 == 0).view(-1, 1, 1)}
    if cfg.augmentation.colorjitter is not None:
        drawn["colorjitter"] = jitter
    if cfg.augmentation.random_erasing is not None:
        drawn["random_erasing"] = torch.tensor([[[1, 1, 5, 5]]]).repeat(count, 1, 1)
    if cfg.augmentation.randaugment is not None:
        drawn["randaugment"] = every_operation(side).repeat(count, 1, 1, 1)
    return Batch(
        clips=to(torch.zeros(count, frames, side, side, 3, dtype=torch.uint8)),
        labels=to(torch.zeros(count, 8)) if multi_label else to(torch.arange(count) % 8),
        weights=to(torch.ones(count)),
        samples=list(range(count)),
        drawn=drawn,
        shards=shards,
        positions=list(range(count)),
    )


def every_operation(side: int) -> Any:
    """Each operation of RandAugment once, as `Batch.drawn` has it: (1, 1, operations, 2)."""
    import numpy as np
    import torch

    from datasets.plan.ops.randaugment import OPERATIONS, RandAugment
    from utils.config.kinds import RandPolicy

    count = len(OPERATIONS)
    op = RandAugment(RandPolicy(m=7, n=count, mstd=0.5, inc=1, p=1.0))
    which = (np.arange(count) + 0.5) / count
    u = np.stack([which, np.zeros(count), np.full(count, 0.5), np.zeros(count)], 1)
    return torch.from_numpy(op.resolve(u.reshape(1, -1), side)[None])


@contextlib.contextmanager
def started(
    gpu: Gpu,
    method: str,
    *,
    precision: str,
    backbone: str = "resnet18",
    sets: Sequence[str] = (),
    micro: int = 1,
    ranks: int = 1,
    group: int = 1,
    multi_label: bool = False,
) -> Iterator[tuple[Any, Callable[[int], dict[str, Any]]]]:
    """Give a run on the fake GPU, and what does a training step of it and returns its figures."""
    import main
    from utils import dist
    from utils.shards import ShardPlan

    mode = gpu.fresh()
    overrides = [f"model.type={method}", f"model.backbone={backbone}", f"precision={precision}", "model.num_segments=8"]
    overrides += ["augmentation.input_size=32", "augmentation.test_resize=36", "batch_size=2"]
    overrides += [f"model.kwargs.bn_group_size={group}", "print_freq=10"]  # no step counted here has a progress line
    overrides += [f"model.kwargs.{key}={value}" for key, value in METHODS[method].items()]
    if method in TRANSFORMERS:
        overrides += ["model.backbone=vit3d", *RECIPE]
    words = [f"common.{word}" for word in overrides] + list(sets)
    with tempfile.TemporaryDirectory() as folder, ranks_joined(ranks), mode:
        world = dist.World(0, ranks, 0, gpu.device, "nccl" if ranks > 1 else None)
        shards = ShardPlan(total=micro * ranks, batch_size=2, world=ranks, rank=0, group_size=group)
        run = build(gpu, Path(folder), method, words, shards, world)

        def one(step: int) -> dict[str, Any]:
            batches = [batch_of(gpu, run.cfg, part, multi_label=multi_label) for part in shards.micro_batches]
            mode.forget()
            main.train_step(
                run, step, batches, stop=False, save=False, meanwhile=lambda: mode.note("ahead", waits=False)
            )
            return figures(mode)

        yield run, one


def train(gpu: Gpu, method: str, **arguments: Any) -> dict[str, Any]:
    """Two training steps; the figures are those of the second, and of a report of the stragglers after it."""
    import torch

    with started(gpu, method, **arguments) as (run, step):
        step(0)
        result = step(1)
        gpu.mode.forget()
        norm_and_scale = [torch.ones((), device=gpu.device)] * 2
        run.stragglers.report(data=0.0, step=1.0, figures=norm_and_scale)
        result["waits_of_a_log_line"] = [f"{entry.what} at {entry.where}" for entry in gpu.mode.waits]
        return result


def figures(mode: Any) -> dict[str, Any]:
    """What a case has shown, for JSON."""
    order = [entry.what for entry in mode.log]
    return {
        "waits": [f"{entry.what} at {entry.where}" for entry in mode.waits],
        "kernels": sum(mode.kernels.values()),
        "strides": mode.strides,
        "layouts": mode.layouts,
        "collectives": len(mode.collectives),
        "ahead_first": "ahead" in order and order.index("ahead") < order.index("an event is waited for")
        if "an event is waited for" in order
        else None,
    }


def validate(gpu: Gpu, method: str, *, precision: str, at_once: int | None) -> dict[str, Any]:
    """Five videos of six views through `evaluate`, one that failed, and padding; their scores are kept."""
    import numpy as np
    import torch

    import methods
    from anal_tools.evaluate.result_parts import PartWriter
    from datasets.loading.eval import VideoItem
    from datasets.plan.views import VideoPlan
    from utils import dist, transfer, transforms
    from utils.engine.evaluate import evaluate
    from utils.engine.network import autocast, dtype_of, place

    mode, views = gpu.fresh(), 6
    with tempfile.TemporaryDirectory() as folder, mode:
        net = place(methods.build(**smallest(method)), gpu.device, precision)
        boxes, flips = np.array([[0, 0, 32, 32]] * views), np.arange(views) % 2 == 0
        plan = VideoPlan(
            sample=0,
            frames=np.arange(16),
            size=(36, 40),
            clip_rows=np.stack([np.arange(8)] * views),
            boxes=boxes,
            flips=flips,
        )
        frames = transfer.to_device(torch.zeros(16, 36, 40, 3, dtype=torch.uint8), gpu.device)
        items = [VideoItem(number, number % 8, frames, plan, None) for number in range(5)]
        items += [VideoItem(5, 0, None, None, "bad"), VideoItem(-1, -1, None, None, None)]

        class Videos(list):
            records = types.SimpleNamespace(labels=np.arange(6) % 8, multi_label=False, targets=None)
            spec = types.SimpleNamespace(views=views)

        videos: Any = Videos(items)
        mode.forget()
        evaluate(
            net,
            videos,
            world=dist.World(device=gpu.device),
            num_class=8,
            normalise=functools.partial(transforms.normalise, dtype=dtype_of(precision)),
            autocast=lambda: autocast(precision, gpu.device),
            clips_per_forward=at_once,
            keep=(writer := PartWriter(Path(folder), 0)).keep,
        )
        result = figures(mode)
        writer.flush()
        return result


def beside(gpu: Gpu, method: str) -> dict[str, Any]:
    """Precise batch norm, a teacher, mutual learning and the statistics of groups."""
    import torch

    import methods
    from utils import dist, draws, sync_bn, transfer, transforms
    from utils.engine import distill, precise_bn
    from utils.engine.network import autocast, place
    from utils.shards import ShardPlan

    mode, world = gpu.fresh(), dist.World(device=gpu.device)
    with mode:

        def network(kind: str) -> Any:
            return place(methods.build(**smallest(kind)), gpu.device, "bf16")

        shards = ShardPlan(1, 2, 1, 0, 1)
        net = sync_bn.convert(network(method), shards, sync_stats=False)
        bn_stats = sync_bn.BnStats(net, shards, world)
        frames = int(net.frames_per_clip)  # pyright: ignore[reportArgumentType]
        to = functools.partial(transfer.to_device, device=gpu.device)
        clips = to(torch.zeros(2, frames, 32, 32, 3, dtype=torch.uint8))
        labels, weights = to(torch.arange(2)), to(torch.ones(2))
        with autocast("bf16", gpu.device):
            x = transforms.normalise(clips)

        def forward(module: Any) -> None:
            with autocast("bf16", gpu.device):
                module(transforms.normalise(clips))

        values = precise_bn.averages(net, [forward, forward], world)
        assert values is not None
        with precise_bn.applied(net, values):
            pass
        colours = ((0.5,) * 3, (0.5,) * 3), ((0.4,) * 3, (0.2,) * 3)
        teacher = distill.Teacher(
            network(method),
            temperature=2.0,
            weight=0.5,
            recolour=distill.recolour(*colours, gpu.device),
            autocast=lambda: autocast("bf16", gpu.device),
        )
        targets = {"kind": "ce", "label_smooth": 0.1, "weights": weights, "lam": 0.7}
        mutual = distill.Mutual(network("tsn"), weight=0.5, arguments={})
        pair = distill.Pair(net, draws.prepare(mutual.peer)) if frames == 8 else None
        mode.forget()
        net.train()
        with draws.rng_scope(0, 0, (0,), 2), autocast("bf16", gpu.device):
            answer = net(x)
        teacher.loss(answer, x, labels, **targets)[0].backward()
        if pair is not None:
            pair.train()
            with draws.rng_scope(0, 0, (0,), 2), autocast("bf16", gpu.device):
                both = pair(x)
            mutual.loss(both, x, labels, **targets)[0].backward()
        bn_stats.after_micro_batch(0)
        bn_stats.after_step()
        result = figures(mode)
        bn_stats.group_state()
        bn_stats.for_evaluation()
        return result


def all_of(gpu: Gpu, method: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every case of a method."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        name: functools.partial(train, gpu, method, **arguments) for name, arguments in cases_of(method).items()
    }
    cases["validation fp32"] = functools.partial(validate, gpu, method, precision="fp32", at_once=4)
    cases["validation bf16, measured"] = functools.partial(validate, gpu, method, precision="bf16", at_once=None)
    cases["precise BN and distillation"] = functools.partial(beside, gpu, method)
    return cases


def main_of(argv: list[str]) -> None:
    """Run all cases of a method, or the named ones."""
    library, *words = argv
    gpu = Gpu(library)
    for method in dict.fromkeys(word.partition("=")[0] for word in words):
        for name, case in all_of(gpu, method).items():
            if not {method, f"{method}={name}"} & set(words):
                continue
            began = time.process_time()
            result = case()
            seconds = round(time.process_time() - began, 2)
            print(json.dumps({"method": method, "case": name, "cpu_seconds": seconds, **result}), flush=True)


if __name__ == "__main__":
    main_of(sys.argv[1:])
    # Not through the teardown of torch, whose autograd thread for the fake device can abort the process there
    sys.stdout.flush()
    os._exit(0)
