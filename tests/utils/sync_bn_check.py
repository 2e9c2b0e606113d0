"""How far GroupBatchNorm on several ranks is from torch's BatchNorm on each group's concatenated batch (float64).

`python -m tests.utils.sync_bn_check` prints the largest differences as JSON; test_sync_bn.py asserts on them.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.ranks import run_ranks
from utils.dist import World
from utils.shards import ShardPlan
from utils.sync_bn import BnStats, convert

CHANNELS = 5
SHAPES = {"2d": (CHANNELS, 6, 7), "3d": (CHANNELS, 3, 4, 5)}
LAYERS = {"2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}
STEPS = 3


def data(kind: str, total: int, batch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output gradient of one global batch (V * B, C, ...), each channel with its own mean and scale."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (total * batch, *SHAPES[kind])
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    axes = [1, -1] + [1] * (x.dim() - 2)
    return x * torch.linspace(0.5, 3, CHANNELS).double().view(axes) + torch.arange(CHANNELS).double().view(axes), grad


def layer(kind: str) -> nn.BatchNorm2d | nn.BatchNorm3d:
    """A batch norm with parameters and running statistics that are not 0 and 1."""
    norm = LAYERS[kind](CHANNELS, eps=1e-4, momentum=0.2, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, CHANNELS))
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.fill_(0.3)
        norm.running_var.fill_(2.0)
    return norm


def ours(
    world: World, kind: str, total: int, batch: int, group: int, sync_stats: bool, load: str | None = None
) -> dict[str, Any]:
    """Some steps on this rank: the last one's outputs and gradients by shard, and the statistics."""
    shards = ShardPlan(total, batch, world.size, world.rank, group)
    model = convert(nn.Sequential(layer(kind)), shards, sync_stats=sync_stats)
    bn_stats = BnStats(model, shards, world)
    if load:
        bn_stats.load_group_state(torch.load(load, weights_only=True))
    outputs, input_grads = {}, {}
    for step in range(STEPS):
        model.zero_grad()
        x, grad = data(kind, total, batch, step)
        for index, mine in enumerate(shards.micro_batches):
            rows = torch.cat([torch.arange(shard * batch, (shard + 1) * batch) for shard in mine])
            clips = x[rows].requires_grad_()
            out = model(clips)
            out.backward(grad[rows])
            assert clips.grad is not None
            for k, shard in enumerate(mine):
                outputs[shard] = out.detach()[k * batch : (k + 1) * batch].clone()
                input_grads[shard] = clips.grad[k * batch : (k + 1) * batch].clone()
            bn_stats.after_micro_batch(index)
        bn_stats.after_step()
    groups = bn_stats.group_state()
    bn_stats.for_evaluation()
    assert isinstance(model, nn.Sequential)
    norm = model[0]
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    return {
        "output": outputs,
        "input_grad": input_grads,
        "weight_grad": {min(shards.micro_batches[0]): norm.weight.grad},
        "bias_grad": {min(shards.micro_batches[0]): norm.bias.grad},
        "running": torch.cat([norm.running_mean, norm.running_var]),
        "tracked": int(norm.num_batches_tracked),
        "groups": groups,
    }


def reference(kind: str, total: int, batch: int, group: int) -> list[dict[str, Any]]:
    """The same with torch's BatchNorm, one for each group, on the group's concatenated batch."""
    results_of = []
    for number in range(total // group):
        norm, out, clips = layer(kind), None, None
        rows = slice(number * group * batch, (number + 1) * group * batch)
        for step in range(STEPS):
            norm.zero_grad()
            x, grad = data(kind, total, batch, step)
            clips = x[rows].requires_grad_()
            out = norm(clips)
            out.backward(grad[rows])
        assert out is not None
        assert clips is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        running = torch.cat([norm.running_mean, norm.running_var])
        results_of.append({
            "output": out.detach(), "input_grad": clips.grad,
            "weight_grad": norm.weight.grad, "bias_grad": norm.bias.grad, "running": running,
        })  # fmt: skip
    return results_of


def all_ours(world: World, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`ours` for several cases, in one start of the ranks."""
    return [ours(world, **case) for case in cases]


def differences(
    got: list[dict[str, Any]], kind: str, total: int, batch: int, group: int, sync_stats: bool
) -> dict[str, float]:
    """Largest absolute differences between what the ranks got and the reference."""
    expected = reference(kind, total, batch, group)
    worst: dict[str, float] = {}

    def compare(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        worst[name] = max(worst.get(name, 0.0), float((a - b).abs().max()))

    for name in ("output", "input_grad"):
        by_shard = {shard: value for rank in got for shard, value in rank[name].items()}
        assert sorted(by_shard) == list(range(total))
        compare(name, torch.cat([by_shard[s] for s in range(total)]), torch.cat([w[name] for w in expected]))
    zero = torch.zeros((), dtype=torch.float64)
    for name in ("weight_grad", "bias_grad"):
        by_shard = {shard: value for rank in got for shard, value in rank[name].items()}
        if len(by_shard) == total:  # one micro-batch per rank: gradients can be told apart by group
            parts = torch.stack([by_shard[s] for s in range(total)]).view(total // group, group, -1).sum(1)
            compare(name, parts, torch.stack([w[name] for w in expected]))
        compare(name, sum(by_shard.values(), zero), sum((w[name] for w in expected), zero))
    mean = torch.stack([w["running"] for w in expected]).mean(0)  # linear: the mean of runs is the run of means
    for rank in got:
        compare("running", rank["running"], mean if sync_stats else expected[0]["running"])
        assert torch.equal(rank["running"], got[0]["running"])
        assert rank["tracked"] == STEPS
        if not sync_stats:
            compare("groups", rank["groups"], torch.stack([w["running"] for w in expected]))
    return worst


def measure() -> dict[str, float]:
    """4 ranks in 2 groups, 2D and 3D: the largest difference of each kind."""
    cases = [{"kind": kind, "total": 4, "batch": 3, "group": 2, "sync_stats": True} for kind in SHAPES]
    got = run_ranks(__file__, "all_ours", 4, cases=cases)
    return {
        f"{case['kind']}_{name}": value
        for number, case in enumerate(cases)
        for name, value in differences([rank[number] for rank in got], **case).items()
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
