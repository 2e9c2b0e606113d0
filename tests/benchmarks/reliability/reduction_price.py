"""What averaging gradients in a fixed order costs, against plain DistributedDataParallel and against two other ways.

TSM ResNet-50, 8 x 64 x 64, one clip and one thread a rank, on gloo. Two copies of the model train in the same ranks,
a step of one and a step of the other in turn. CPU seconds are the operating system's, of all threads of all ranks;
bytes are what the ranks write (Linux counts sockets in `wchar` of /proc/self/io).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import resource
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import methods
from tests.benchmarks.reliability.pairs import compare
from tests.ranks import run_ranks
from utils import dist
from utils.dist import World

FRAMES, SIZE, CLASSES = 8, 64, 400
WARM_UP = 3  # plain DDP arranges its buckets after the first step
PAIRS = 24


def as_before(net: nn.Module, world: World, **more: Any) -> nn.Module:
    """Wrap a model as this repository did before."""
    known = inspect.signature(DistributedDataParallel).parameters
    more["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
    return DistributedDataParallel(net, gradient_as_bucket_view=True, **more)


def unused(net: nn.Module, world: World) -> nn.Module:
    """Keep DDP from arranging its buckets again: it never does so where it looks for unused parameters."""
    return as_before(net, world, find_unused_parameters=True)


def in_rank_order(net: nn.Module, world: World) -> nn.Module:
    """Add every element in the order of the ranks, wherever it lies: all-to-all, add, all-gather."""
    model = as_before(net, world)
    assert isinstance(model, DistributedDataParallel)
    model.register_comm_hook(world, _ordered_sum)
    return model


def _ordered_sum(world, bucket):  # noqa: ANN001, ANN202  DDP refuses annotations that are text
    summed = bucket.buffer()
    padded = nn.functional.pad(summed, (0, -summed.numel() % world.size))
    parts = torch.empty_like(padded)
    torch_dist.all_to_all_single(parts, padded)
    total = parts.view(world.size, -1)[0].clone()
    for part in parts.view(world.size, -1)[1:]:
        total += part
    gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
    gather(padded, total.div_(world.size))
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(padded[: summed.numel()])
    return future


WAYS = {"fixed": dist.data_parallel, "plain": as_before, "unused": unused, "ordered": in_rank_order}


class Trainee:
    """A model, its optimiser, and what its steps took."""

    def __init__(self, way: str, world: World) -> None:
        torch.manual_seed(0)
        net = methods.build(type="tsm", backbone="resnet50", num_class=CLASSES, num_segments=FRAMES).train()
        self.model = WAYS[way](net, world)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
        self.seconds: list[float] = []
        self.bytes: list[float] = []

    def step(self, world: World) -> None:
        """Train on one clip and take down the cost; nothing of another step is under way before or after."""
        clip, label = torch.randn(1, 3, FRAMES, SIZE, SIZE), torch.zeros(1, dtype=torch.int64)
        world.barrier()
        seconds, written = _cpu_seconds(), _written()
        self.optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(self.model(clip), label).backward()
        self.optimizer.step()
        self.seconds.append(_cpu_seconds() - seconds)
        self.bytes.append(_written() - written)


def train_in_turn(world: World, ways: list[str], pairs: int) -> dict[str, list[list[float]]]:
    """For each way the CPU seconds and the bytes of this rank in each step. Every rank calls it."""
    torch.set_num_threads(1)
    trainees = [Trainee(way, world) for way in ways]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DDP's remarks about strides and unused parameters
        for number in range(WARM_UP + pairs):
            for trainee in trainees if number % 2 else reversed(trainees):
                trainee.step(world)
    return {way: [each.seconds[WARM_UP:], each.bytes[WARM_UP:]] for way, each in zip(ways, trainees, strict=True)}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _written() -> float:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("wchar")))


def price(way: str, ranks: int, pairs: int) -> dict[str, Any]:
    """Return CPU seconds and bytes of a way over those of plain DDP, summed over the ranks."""
    results = run_ranks(__file__, "train_in_turn", ranks, timeout=3000, ways=[way, "plain"], pairs=pairs)
    seconds, sent = (
        {name: [sum(each) for each in zip(*(rank[name][kind] for rank in results), strict=True)] for name in results[0]}
        for kind in (0, 1)
    )
    costs: dict[str, Any] = {"cpu": compare(seconds[way], seconds["plain"])}
    costs["cpu"]["plain_seconds"] = round(statistics.median(seconds["plain"]), 3)
    costs["bytes"] = round(statistics.median(sent[way]) / statistics.median(sent["plain"]), 4)
    print(json.dumps({"way": way, "ranks": ranks, **costs}), file=sys.stderr, flush=True)  # it takes minutes
    return costs


def row(pairs: int = PAIRS, other_pairs: int = 8) -> dict[str, Any]:
    """Measure at 2 and 4 ranks; the ways that were not chosen with fewer pairs, at 4 ranks."""
    chosen = {f"{ranks} ranks": price("fixed", ranks, pairs) for ranks in (2, 4)}
    others = {way: price(way, 4, other_pairs) for way in ("unused", "ordered") if other_pairs}
    holds = all(each["cpu"]["median"] <= 1.03 and each["bytes"] <= 1.00 for each in chosen.values())
    return {"measured": {"fixed": chosen, **others}, "holds": holds}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        numbers = [int(word) for word in sys.argv[1:]]
        print(json.dumps(row(*numbers)))
