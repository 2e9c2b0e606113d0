"""What training sends over the network, and how well it should scale: arithmetic, and a count of real gloo runs.

    python -m tests.benchmarks.scaling                    tables for 8 .. 1024 GPUs (docs/scaling.md holds them)
    python -m tests.benchmarks.scaling --method tsm --step 0.25 --net 100 --group 16
    python -m tests.benchmarks.scaling --sizes            count parameters and batch-norm channels of every method
    torchrun --standalone --nproc-per-node 4 -m tests.benchmarks.scaling --count   bytes of real gloo steps

The tables need no torch; SIZES was written by --sizes and a test compares it with the models.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils import shards

if TYPE_CHECKING:
    from utils.dist import World

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
NUMBERS = 7  # float64 values of the per-step sum (main.NUMBERS)
BUCKET = 25 * 2**20  # bytes, utils/reduce.py: the last one cannot hide behind the backward pass
BACKWARD = 2 / 3  # of a step's computing time
# (method, backbone) -> parameters, batch-norm layers, channels of all of them; with 400 classes and 8 frames
SIZES = {
    ("tsn", "resnet50"): (24327632, 53, 26560),
    ("tsn", "mobilenetv2"): (2736272, 52, 17056),
    ("tsm", "resnet50"): (24327632, 53, 26560),
    ("slowonly", "resnet50"): (32454096, 53, 26560),
    ("slowfast", "resnet50"): (34566488, 110, 30344),
    ("tpn", "resnet50"): (91498336, 62, 40896),
    ("pptsn", "resnet50_vd"): (24346864, 55, 26624),
    ("pptsm", "resnet50_vd"): (24346864, 55, 26624),
}


@dataclass(frozen=True)
class StepTraffic:
    """Payload of one optimiser step, in bytes per rank, and how many blocking collectives there are.

    Attributes:
        gradients: summed over all ranks, once a step, mostly while the backward pass runs.
        groups: batch-norm statistics inside the groups, forward and backward, all micro-batches; as if summed.
        bn_stats: running statistics (bn_sync_stats), once a step.
        numbers: loss, accuracies, and the agreement to stop or save.
        blocking: collectives of `groups` that a rank waits for, one after the other.
        span: ranks of a BN group.
    """

    gradients: float
    groups: float
    bn_stats: float
    numbers: float
    blocking: int
    span: int


@dataclass(frozen=True)
class Links:
    """Stated speeds: bytes per second in each direction of one GPU inside its node and of one node's network.

    Attributes:
        inside: between the GPUs of a node.
        net: of a node to the others.
        per_node: GPUs in a node.
        latency_inside, latency_net: seconds until a small message is there.
    """

    inside: float = 200e9
    net: float = 100e9 / 8
    per_node: int = 8
    latency_inside: float = 5e-6
    latency_net: float = 15e-6


def traffic(
    sizes: tuple[int, int, int], plan: shards.ShardPlan, *, sync_stats: bool = True, gpu: bool = True, width: int = 4
) -> StepTraffic:
    """What one rank puts into the collectives of one step.

    Args:
        sizes: parameters, batch-norm layers, their channels.
        plan: shards of the global batch, ranks, and the BN groups.
        sync_stats: `bn_sync_stats`.
        gpu: torch's own sync-BN kernels (float32: an all-gather forward, a sum backward); else our CPU path (float64:
            two sums forward, one backward).
        width: bytes of a weight.
    """
    parameters, layers, channels = sizes
    span = min(plan.group_size, plan.world)
    runs = len(plan.micro_batches) if span > 1 else 0
    gathered = span / 2 * (2 * channels + layers)  # an all-gather of S sends as much as a sum of span / 2 * S
    once = 4 * (gathered + 2 * channels) if gpu else 8 * (channels + layers + channels + 2 * channels)
    return StepTraffic(
        gradients=float(width * parameters) if plan.world > 1 else 0.0,
        groups=float(runs * once),
        bn_stats=float(2 * width * channels) if sync_stats and plan.world > 1 else 0.0,
        numbers=8.0 * NUMBERS if plan.world > 1 else 0.0,
        blocking=runs * layers * (2 if gpu else 3),
        span=span,
    )


def sent(payload: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of `payload` bytes."""
    return 2 * (ranks - 1) / ranks * payload


def seconds(payload: float, ranks: int, links: Links) -> float:
    """Duration of an all-reduce: bandwidth of the slowest link of the ring, latency of a tree."""
    if ranks < 2:
        return 0.0
    beyond = ranks > links.per_node
    speed = links.net if beyond else links.inside
    hops = math.ceil(math.log2(min(ranks, links.per_node))) * links.latency_inside
    hops += math.ceil(math.log2(ranks / links.per_node)) * links.latency_net if beyond else 0.0
    return sent(payload, ranks) / speed + 2 * hops


def exposed(load: StepTraffic, ranks: int, step: float, links: Links) -> dict[str, float]:
    """Seconds of communication that a step of `step` computing seconds cannot hide.

    Args:
        load: of one step.
        ranks: W.
        step: computing time of a step of this many micro-batches.
    """
    gradients = seconds(load.gradients, ranks, links)
    last = seconds(min(load.gradients, BUCKET), ranks, links)
    each = seconds(load.groups / load.blocking, load.span, links) if load.blocking else 0.0
    return {
        "gradients": max(last, gradients - BACKWARD * step),
        "groups": load.blocking * each,
        "statistics": seconds(load.bn_stats, ranks, links),
        "numbers": 0.0,  # under way while the backward pass runs
    }


def table(
    sizes: tuple[int, int, int],
    step: float,
    links: Links,
    *,
    group: int,
    total: int | None = None,
    per_step: bool = True,
) -> list[dict[str, float]]:
    """One row for each number of GPUs.

    Args:
        sizes: of the model.
        step: computing seconds of one micro-batch (one shard).
        group: bn_group_size.
        total: shards of the global batch; None: one for each GPU.
    """
    rows = []
    for ranks in WORLDS:
        if total is not None and (ranks > total or ranks not in shards.legal_ranks(total, group)):
            continue
        plan = shards.ShardPlan(total or ranks, 1, ranks, 0, min(group, total or ranks))
        load = traffic(sizes, plan)
        work = step * plan.total / ranks
        waits = exposed(load, ranks, work, links)
        rows.append(
            {
                "gpus": ranks,
                "micro_batches": len(plan.micro_batches),
                "gradients_MB": sent(load.gradients, ranks) / 1e6,
                "groups_MB": sent(load.groups, load.span) / 1e6,
                "statistics_MB": sent(load.bn_stats, ranks) / 1e6,
                "exposed_ms": 1e3 * sum(waits.values()),
                "efficiency": work / (work + sum(waits.values())),
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, float]]) -> str:
    """The rows of `table` as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---:|" * len(names)]
    for row in rows:
        texts = [f"{row[name]:.0f}" if name in ("gpus", "micro_batches") else f"{row[name]:.3g}" for name in names]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def measure_sizes(method: str, backbone: str) -> tuple[int, int, int]:
    """Parameters, batch-norm layers and their channels of a model with 400 classes."""
    import methods
    from utils import sync_bn

    net = methods.build(type=method, backbone=backbone, num_class=400, num_segments=8)
    net = sync_bn.convert(net.train(), shards.ShardPlan(1, 1), sync_stats=True)
    norms = [layer for layer in net.modules() if isinstance(layer, sync_bn.GroupBatchNorm)]
    parameters = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    return parameters, len(norms), sum(layer.num_features for layer in norms)


def count(world: World, steps: int = 3, group: int = 2) -> dict[str, float]:
    """Bytes that this rank's gloo writes in real training steps, against the prediction. Every rank calls it.

    Linux counts what a process writes, sockets included (`wchar` of /proc/self/io); nothing else is written meanwhile.

    Returns:
        The predicted and the counted bytes of a step, and their ratio.
    """
    import torch

    import methods
    from utils import dist, sync_bn

    plan = shards.ShardPlan(4, 2, world.size, world.rank, group)
    torch.manual_seed(0)
    net = sync_bn.convert(
        methods.build(type="tsn", backbone="resnet18", num_class=8, num_segments=2), plan, sync_stats=True
    )
    bn_stats = sync_bn.BnStats(net, plan, world)
    model: Any = dist.data_parallel(net, world) if world.size > 1 else net
    norms = bn_stats.layers
    sizes = (sum(p.numel() for p in net.parameters()), len(norms), sum(layer.num_features for layer in norms))
    rows = plan.batch_size * plan.shards_per_micro_batch
    written = []
    for _ in range(steps + 2):  # the first ones are not counted
        world.barrier()
        before = _written()
        totals = torch.zeros(NUMBERS, dtype=torch.float64)
        for index in range(len(plan.micro_batches)):
            is_last = index == len(plan.micro_batches) - 1
            with contextlib.nullcontext() if is_last or world.size == 1 else model.no_sync():
                model(torch.randn(rows, 3, 2, 32, 32)).sum().backward()
            bn_stats.after_micro_batch(index)
        pending = world.sum_async(totals)
        pending.read()
        bn_stats.after_step()
        written.append(_written() - before)
    load = traffic(sizes, plan, gpu=False)
    predicted = sent(load.gradients + load.bn_stats + load.numbers, world.size) + sent(load.groups, load.span)
    counted = sorted(written[2:])[len(written[2:]) // 2]
    ratio = counted / predicted if predicted else float(counted == 0)
    return {"ranks": world.size, "predicted": predicted, "counted": counted, "ratio": round(ratio, 4)}


def _written() -> int:
    import psutil

    return psutil.Process().io_counters().write_chars


def main(argv: Sequence[str]) -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(prog="scaling", description="Communication and efficiency at scale.")
    parser.add_argument("--method", help="this method only")
    parser.add_argument("--step", type=float, default=0.25, help="computing seconds of a micro-batch on one GPU")
    parser.add_argument("--net", type=float, default=100.0, help="network of a node, Gbit/s in each direction")
    parser.add_argument("--inside", type=float, default=200.0, help="between GPUs of a node, GB/s in each direction")
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--group", type=int, default=8, help="bn_group_size")
    parser.add_argument("--shards", type=int, help="shards of the global batch (default: one for each GPU)")
    parser.add_argument("--sizes", action="store_true", help="count the models")
    parser.add_argument("--count", action="store_true", help="count the bytes of real gloo steps (under torchrun)")
    args = parser.parse_args(argv)
    if args.count:
        from utils import dist

        world = dist.join(device="cpu")
        bytes_written = count(world)
        world.barrier()
        dist.leave()
        if world.is_main:
            print(bytes_written)
        return 0
    links = Links(inside=args.inside * 1e9, net=args.net * 1e9 / 8, per_node=args.per_node)
    for (method, backbone), sizes in SIZES.items():
        if args.method not in (None, method):
            continue
        if args.sizes:
            print(f'    ("{method}", "{backbone}"): {measure_sizes(method, backbone)},')
            continue
        title = f"{method} {backbone}: {sizes[0] / 1e6:.1f} M parameters, {sizes[1]} batch norms, {sizes[2]} channels"
        print(f"### {title}\n\n{markdown(table(sizes, args.step, links, group=args.group, total=args.shards))}\n")
    return 0


if __name__ == "__main__":
    if "RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    sys.exit(main(sys.argv[1:]))
