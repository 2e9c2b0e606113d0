"""Batch norm over groups of shards against torch's BatchNorm on each group's concatenated batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.ranks import run_ranks
from tests.utils import sync_bn_check as check
from utils.dist import World, data_parallel
from utils.errors import UserError
from utils.shards import ShardPlan
from utils.sync_bn import BnStats, GroupBatchNorm, convert

ONE = World()


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Convolution, BN (momentum .1), convolution, BN (momentum .3), pool, linear."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=0.3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    ).to(dtype)  # fmt: skip


def clips(step: int, rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)


# What the ranks run.


def several_steps(world: World, group: int, sync_stats: bool, total: int = 4) -> dict[str, Any]:
    """A few steps of SGD under DDP, V shards of 2 clips: final weights, statistics, last outputs by shard."""
    shards = ShardPlan(total, 2, world.size, world.rank, group)
    model = convert(net(), shards, sync_stats=sync_stats)
    bn_stats = BnStats(model, shards, world)
    ddp = model if world.size == 1 else data_parallel(model, world)
    optimiser = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    outputs = {}
    for step in range(4):
        optimiser.zero_grad()
        x = clips(step, shards.global_batch)
        for index, mine in enumerate(shards.micro_batches):
            out = ddp(torch.cat([x[2 * s : 2 * s + 2] for s in mine]))
            (out.square().sum() / shards.global_batch * world.size).backward()  # the ranks' mean is taken
            bn_stats.after_micro_batch(index)
            outputs |= {s: out.detach()[2 * k : 2 * k + 2].clone() for k, s in enumerate(mine)}
        bn_stats.after_step()
        optimiser.step()
    groups = bn_stats.group_state()
    bn_stats.for_evaluation()
    return {"outputs": outputs, "state": {k: v.clone() for k, v in model.state_dict().items()}, "groups": groups}


def large_mean(world: World) -> torch.Tensor:
    x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(0)) + 1e4
    shards = ShardPlan(2, 2048, world.size, world.rank, 2)
    model: Any = convert(nn.Sequential(nn.BatchNorm1d(2)), shards, sync_stats=True)
    norm = model[0]
    out = norm(x[world.rank * 2048 : (world.rank + 1) * 2048])
    return torch.stack([norm.batch_var.double(), x.double().var(0), out.double().var(0)])


def bfloat16(world: World) -> list[object]:
    """Under autocast, and without an input gradient: dtypes, and how far the statistics are from float32's."""
    shards = ShardPlan(2, 8, world.size, world.rank, 2)
    model: Any = convert(net(torch.float32), shards, sync_stats=True)
    x = clips(0, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model[1](model[0](x[8 * world.rank :][:8]))
        model(x[8 * world.rank :][:8]).float().sum().backward()
    exact = nn.Sequential(*list(net(torch.float32))[:1])(x)
    error = (model[1].batch_mean - exact.mean((0, 2, 3))).abs().max()
    return [str(hidden.dtype), str(model[1].weight.grad.dtype), float(error)]


LAYOUTS = {
    2: [
        (4, 2, False),
        (8, 4, True),
        (8, 4, False),
        (2, 1, False),
    ],  # (V, n, bn_sync_stats): micro-batches, n > W, n = 1
    4: [(4, 2, False), (4, 4, True)],
}
TRAININGS = [(4, True), (2, False)]  # (n, bn_sync_stats)


def everything(world: World, folder: str) -> dict[str, Any]:
    """All that the tests below need of these ranks, in one start."""
    arguments = {"kind": "2d", "batch": 3}
    layouts = [check.ours(world, total=v, group=n, sync_stats=s, **arguments) for v, n, s in LAYOUTS[world.size]]
    results_of: dict[str, Any] = {"layouts": layouts, "trainings": [several_steps(world, n, s) for n, s in TRAININGS]}
    if world.size == 2:
        results_of |= {"large_mean": large_mean(world), "bfloat16": bfloat16(world)}
        case = {"total": 4, "group": 2, "sync_stats": False, **arguments}
        results_of["continued"] = check.ours(world, load=f"{folder}/groups.pt", **case)
    return results_of


# On several ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    folder = tmp_path_factory.mktemp("groups")
    alone = check.ours(ONE, kind="2d", batch=3, total=4, group=2, sync_stats=False)
    torch.save(alone["groups"], folder / "groups.pt")
    return {size: run_ranks(__file__, "everything", size, timeout=120, folder=str(folder)) for size in LAYOUTS}


def test_four_ranks_in_two_groups_equal_batch_norm_on_the_concatenated_group() -> None:
    worst = check.measure()
    print(worst)
    assert {name.split("_", 1)[0] for name in worst} == {"2d", "3d"}
    assert max(worst.values()) <= 1e-12, worst


@pytest.mark.parametrize(("size", "index"), [(size, i) for size in LAYOUTS for i in range(len(LAYOUTS[size]))])
def test_other_layouts(ranks: dict[int, list[dict]], size: int, index: int) -> None:
    total, group, sync_stats = LAYOUTS[size][index]
    got = [rank["layouts"][index] for rank in ranks[size]]
    worst = check.differences(got, "2d", total, 3, group, sync_stats)
    assert max(worst.values()) <= 1e-12, worst


@pytest.mark.parametrize("index", range(len(TRAININGS)))
def test_one_two_and_four_ranks_train_the_same_under_ddp(ranks: dict[int, list[dict]], index: int) -> None:
    group, sync_stats = TRAININGS[index]
    alone = several_steps(ONE, group, sync_stats)
    for several in ([rank["trainings"][index] for rank in ranks[size]] for size in (2, 4)):
        outputs = {shard: out for rank in several for shard, out in rank["outputs"].items()}
        assert sorted(outputs) == [0, 1, 2, 3]
        for shard, out in outputs.items():
            torch.testing.assert_close(out, alone["outputs"][shard], rtol=0, atol=1e-12)
        for rank in several:
            for key, value in alone["state"].items():
                torch.testing.assert_close(rank["state"][key], value, rtol=0, atol=1e-12, msg=key)
            assert (rank["groups"] is None) == sync_stats
            if not sync_stats:
                assert torch.equal(rank["groups"], several[0]["groups"])
                torch.testing.assert_close(rank["groups"], alone["groups"], rtol=0, atol=1e-12)


def test_group_statistics_are_taken_up_on_another_number_of_ranks(ranks: dict[int, list[dict]], tmp_path: Path) -> None:
    case = {"kind": "2d", "total": 4, "batch": 3, "group": 2, "sync_stats": False}
    first = check.ours(ONE, **case)
    torch.save(first["groups"], tmp_path / "groups.pt")
    again = check.ours(ONE, **case, load=str(tmp_path / "groups.pt"))
    assert not torch.equal(first["groups"], again["groups"])
    for rank in ranks[2]:
        torch.testing.assert_close(rank["continued"]["groups"], again["groups"], rtol=0, atol=1e-12)
        torch.testing.assert_close(rank["continued"]["running"], again["groups"][0], rtol=0, atol=1e-12)


def test_variance_of_float32_input_with_a_large_mean(ranks: dict[int, list[dict]]) -> None:
    for got, expected, of_output in (rank["large_mean"] for rank in ranks[2]):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(of_output, torch.ones(2).double(), rtol=0.05, atol=0)


def test_autocast(ranks: dict[int, list[dict]]) -> None:
    for hidden, grad, error in (rank["bfloat16"] for rank in ranks[2]):
        assert (hidden, grad) == ("torch.bfloat16", "torch.float32")
        assert error < 5e-3


# On one rank.


def test_convert_keeps_names_values_flags_and_parameters() -> None:
    model = net()
    model.add_module("again", model[1])  # one layer in two places
    model[4].eval()
    model[1].weight.requires_grad_(False)
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    assert convert(model, ShardPlan(2, 2), sync_stats=True) is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert isinstance(model[1], GroupBatchNorm)
    assert isinstance(model[1], _BatchNorm)
    assert model.again is model[1]
    assert (model[4].momentum, model[4].training, model[1].training) == (0.3, False, True)
    assert not model[1].weight.requires_grad
    assert isinstance(convert(nn.BatchNorm3d(4), ShardPlan(2, 2), sync_stats=True), GroupBatchNorm)
    converted = convert(
        nn.Sequential(nn.BatchNorm1d(3, affine=False, track_running_stats=False)), ShardPlan(1, 2), sync_stats=True
    )
    BnStats(converted, ShardPlan(1, 2), ONE).after_step()
    assert converted(torch.randn(6, 3)).mean().abs() < 1e-6
    assert isinstance(copy.deepcopy(model)[1], GroupBatchNorm)


def test_a_layer_without_parameters_and_running_statistics() -> None:
    shards = ShardPlan(1, 2)
    layer = nn.Sequential(nn.BatchNorm1d(3, affine=False, track_running_stats=False))
    model = convert(layer, shards, sync_stats=True)
    BnStats(model, shards, ONE).after_step()
    assert model(torch.randn(6, 3)).mean().abs() < 1e-6


def test_momentum_none_and_wrong_input_are_refused() -> None:
    with pytest.raises(UserError, match="momentum None"):
        convert(nn.Sequential(nn.BatchNorm2d(3, momentum=None)), ShardPlan(1, 2), sync_stats=True)
    norm = convert(nn.BatchNorm2d(3), ShardPlan(1, 2), sync_stats=True)
    with pytest.raises(ValueError, match="expected"):
        norm(torch.zeros(2, 4, 5, 5))


def test_evaluation_mode_equals_torch_and_training_forward_leaves_running_statistics_alone() -> None:
    model = convert(net(), ShardPlan(1, 4), sync_stats=True)
    before = copy.deepcopy(model.state_dict())
    model(clips(0, 4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch_net = net()
    torch.testing.assert_close(model.eval()(clips(1, 4)), torch_net.eval()(clips(1, 4)), rtol=0, atol=0)


def test_one_rank_one_shard_follows_torch_exactly() -> None:
    torch_net, model = net(), convert(net(), ShardPlan(1, 4), sync_stats=False)
    bn_stats = BnStats(model, ShardPlan(1, 4), ONE)
    for step in range(5):
        assert torch.equal(torch_net(clips(step, 4)), model(clips(step, 4)))
        bn_stats.after_micro_batch(0)
        bn_stats.after_step()
    bn_stats.for_evaluation()
    for key, value in torch_net.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=1e-15, msg=key)


@pytest.mark.parametrize("sync_stats", [True, False])
def test_layers_in_eval_mode_keep_their_running_statistics(sync_stats: bool) -> None:
    """Partial BN (TSN): only the first layer trains."""
    shards = ShardPlan(2, 2)
    model = convert(net(), shards, sync_stats=sync_stats)
    bn_stats = BnStats(model, shards, ONE)
    model.get_submodule("4").eval()
    before = copy.deepcopy(model.state_dict())
    for index in (0, 1):
        model(clips(index, 2))
        bn_stats.after_micro_batch(index)
    bn_stats.after_step()
    bn_stats.for_evaluation()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert not torch.equal(model.state_dict()[f"1.{name}"], before[f"1.{name}"])
        assert torch.equal(model.state_dict()[f"4.{name}"], before[f"4.{name}"])


def test_loading_reaches_the_flat_statistics_and_moving_the_model_is_noticed() -> None:
    shards = ShardPlan(2, 2)
    model = convert(net(), shards, sync_stats=False)
    bn_stats = BnStats(model, shards, ONE)
    state = {key: torch.full_like(value, 7) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    bn_stats.load_group_state(None)
    groups = bn_stats.group_state()
    assert groups is not None
    assert torch.equal(groups, torch.full((2, 20), 7.0, dtype=torch.float64))
    model.to("cpu", torch.float64)  # changes nothing
    model(clips(0, 2))
    bn_stats.after_micro_batch(0)
    bn_stats.after_step()
    assert int(model.get_buffer("1.num_batches_tracked")) == 8
    model.float()
    with pytest.raises(RuntimeError, match="after BnStats was built"):
        bn_stats.after_step()


def test_group_statistics_of_another_model_are_refused() -> None:
    shards = ShardPlan(2, 2)
    split = BnStats(convert(net(), shards, sync_stats=False), shards, ONE)
    with pytest.raises(UserError, match=r"\(3, 20\)"):
        split.load_group_state(torch.zeros(3, 20))
    joint = BnStats(convert(net(), shards, sync_stats=True), shards, ONE)
    assert joint.group_state() is None
    joint.load_group_state(None)
    with pytest.raises(UserError, match="bn_sync_stats"):
        joint.load_group_state(torch.zeros(2, 20))


def test_a_model_without_batch_norm() -> None:
    shards = ShardPlan(2, 2)
    model = convert(nn.Sequential(nn.Linear(2, 2)), shards, sync_stats=True)
    bn_stats = BnStats(model, shards, ONE)
    bn_stats.after_micro_batch(0)
    bn_stats.after_step()
    bn_stats.for_evaluation()
    assert bn_stats.group_state() is None
