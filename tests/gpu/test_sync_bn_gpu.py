"""The CUDA path of GroupBatchNorm (torch's own SyncBatchNorm kernels) against BatchNorm on the concatenated group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.ranks import run_ranks
from tests.utils import sync_bn_check as check
from utils.dist import World
from utils.shards import ShardPlan
from utils.sync_bn import BnStats, convert

pytestmark = pytest.mark.gpu


def on_gpu(world: World, kind: str, total: int, batch: int) -> dict[str, Any]:
    """One step over a group of all shards, each rank on a GPU of its own, with the ranks' rows channels-last."""
    shards = ShardPlan(total, batch, world.size, world.rank, total)
    model = convert(nn.Sequential(check.layer(kind)).to(world.device), shards, sync_stats=True)
    bn_stats = BnStats(model, shards, world)
    x, grad = (t.to(world.device) for t in check.data(kind, total, batch, 0))
    rows = torch.cat([torch.arange(s * batch, (s + 1) * batch) for s in shards.micro_batches[0]])
    form = torch.channels_last if kind == "2d" else torch.channels_last_3d
    clips = x[rows].contiguous(memory_format=form).requires_grad_()
    out = model(clips)
    out.backward(grad[rows])
    bn_stats.after_micro_batch(0)
    bn_stats.after_step()
    assert clips.grad is not None
    assert isinstance(model, nn.Sequential)
    norm = model[0]
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.weight.grad is not None
    running = torch.cat([norm.running_mean, norm.running_var])
    tensors = {"output": out.detach(), "input_grad": clips.grad, "weight_grad": norm.weight.grad, "running": running}
    return {"rows": rows} | {name: value.cpu() for name, value in tensors.items()}


def expected(kind: str, total: int, batch: int) -> dict[str, torch.Tensor]:
    norm = check.layer(kind)
    x, grad = check.data(kind, total, batch, 0)
    x.requires_grad_()
    out = norm(x)
    out.backward(grad)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert x.grad is not None
    assert norm.weight.grad is not None
    running = torch.cat([norm.running_mean, norm.running_var])
    return {"output": out.detach(), "input_grad": x.grad, "weight_grad": norm.weight.grad, "running": running}


@pytest.mark.parametrize("kind", ["2d", "3d"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_group_on_gpus_equals_batch_norm_on_the_concatenated_batch(kind: str, ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA GPUs")
    env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(ranks)))}
    group_expected = expected(kind, 2, 3)
    if ranks == 1:
        got = [on_gpu(World(device=torch.device("cuda", 0)), kind, 2, 3)]
    else:
        got = run_ranks(__file__, "on_gpu", ranks, timeout=120, env=env, kind=kind, total=2, batch=3)
    for rank in got:
        for name in ("output", "input_grad"):
            torch.testing.assert_close(rank[name], group_expected[name][rank["rows"]], rtol=0, atol=1e-10)
        torch.testing.assert_close(rank["running"], group_expected["running"], rtol=0, atol=1e-10)
    summed = sum(rank["weight_grad"] for rank in got)
    torch.testing.assert_close(summed, group_expected["weight_grad"], rtol=0, atol=1e-10)
