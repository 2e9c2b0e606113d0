"""Device-side random numbers: functions of (seed, step, shard, layer) and of nothing else."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from utils import draws
from utils.draws import Dropout, DropPath
from utils.shards import ShardPlan


def model(p: float = 0.5) -> nn.Sequential:
    net = draws.prepare(nn.Sequential(Dropout(p), nn.Identity(), Dropout(p)))
    assert isinstance(net, nn.Sequential)
    return net


def masks(world: int, group: int, rows_per_clip: int = 1, step: int = 3, seed: int = 9) -> list[torch.Tensor]:
    """The output for ones of every shard of V = 4 shards of 2 clips, run on `world` ranks."""
    by_shard = {}
    for rank in range(world):
        net = model()
        for mine in ShardPlan(4, 2, world, rank, group).micro_batches:
            with draws.rng_scope(seed, step, mine, 2):
                out = net[0](torch.ones(len(mine) * 2 * rows_per_clip, 50))
            by_shard |= dict(zip(mine, out.chunk(len(mine)), strict=True))
    return [by_shard[shard] for shard in range(4)]


@pytest.mark.parametrize("rows_per_clip", [1, 3])
def test_same_masks_on_one_two_and_four_ranks(rows_per_clip: int) -> None:
    alone = masks(1, 4, rows_per_clip)
    assert not torch.equal(alone[0], alone[1])
    for world, group in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 1), (4, 4)):
        for a, b in zip(alone, masks(world, group, rows_per_clip), strict=True):
            assert torch.equal(a, b)


def test_masks_depend_on_seed_step_and_layer() -> None:
    net, x = model(), torch.ones(2, 100)
    with draws.rng_scope(1, 5, (0,), 2):
        first, again, other_layer = net[0](x), net[0](x), net[2](x)
    assert torch.equal(first, again)
    assert not torch.equal(first, other_layer)
    for seed, step in ((1, 6), (2, 5), (1 + 2**40, 5), (-1, 5)):
        with draws.rng_scope(seed, step, (0,), 2):
            assert not torch.equal(net[0](x), first)


def test_values_rate_and_gradient() -> None:
    x = torch.ones(4, 10000, dtype=torch.float64, requires_grad=True)
    with draws.rng_scope(0, 0, (0, 1), 2):
        out = model(0.8)[0](x)
    assert set(out.unique().tolist()) == {0.0, 1 / (1 - 0.8)}
    assert abs(float((out == 0).double().mean()) - 0.8) < 0.01
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_does_not_change_the_mask(dtype: torch.dtype) -> None:
    net = model()
    with draws.rng_scope(0, 0, (3,), 2):
        a, b = net[0](torch.ones(2, 64)), net[0](torch.ones(2, 64, dtype=dtype))
    assert b.dtype == dtype
    assert torch.equal(a, b.float())


def test_torch_generator_is_neither_used_nor_moved() -> None:
    net, x = model(), torch.ones(2, 8)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with draws.rng_scope(0, 0, (0,), 2):
        a = net[0](x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    with draws.rng_scope(0, 0, (0,), 2):
        assert torch.equal(net[0](x), a)


def test_evaluation_extremes_and_outside_of_a_context() -> None:
    x = torch.rand(4, 6)
    with draws.rng_scope(0, 0, (0, 1), 2):
        assert torch.equal(model().eval()(x), x)
        assert torch.equal(model(0.0)(x), x)
        assert torch.equal(model(1.0)(x), torch.zeros(4, 6))
    torch.manual_seed(0)
    a = model()[0](x)
    torch.manual_seed(0)
    assert torch.equal(a, nn.functional.dropout(x, 0.5))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="probability"):
        Dropout(1.5)
    with draws.rng_scope(0, 0, (0, 1), 2):
        with pytest.raises(RuntimeError, match="prepare"):
            Dropout()(torch.ones(4, 2))
        with pytest.raises(ValueError, match="6 rows"):
            model()(torch.ones(6, 2))


def test_contexts_nest_and_end_after_an_error() -> None:
    net, x = model(), torch.ones(2, 64)
    with draws.rng_scope(0, 0, (0,), 2):
        outer = net[0](x)
        with pytest.raises(KeyError), draws.rng_scope(0, 1, (0,), 2):
            raise KeyError
        assert torch.equal(net[0](x), outer)
    assert draws._current.get() is None


def test_keys_come_from_names_and_survive_a_copy() -> None:
    net = model()
    assert net[0].key != net[2].key
    assert net[0].key == model()[0].key
    with draws.rng_scope(0, 0, (0,), 2):
        net(torch.ones(2, 2))
        assert torch.equal(copy.deepcopy(net)(torch.ones(2, 9)), net(torch.ones(2, 9)))


def test_drop_path_drops_whole_rows_at_its_rate() -> None:
    net = draws.prepare(nn.Sequential(DropPath(0.3)))
    x = torch.rand(2000, 3, 5, dtype=torch.float64) + 1
    x.requires_grad_()
    with draws.rng_scope(0, 0, (0, 1), 1000):
        out = net(x)
        again = net(x)
    assert torch.equal(out, again)
    kept = out[:, 0, 0] > 0
    assert torch.equal(out, x * (kept.double() / (1 - 0.3))[:, None, None])
    assert abs(int(kept.sum()) - 1400) < 3 * math.sqrt(2000 * 0.3 * 0.7)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[:, 1, 2] > 0, kept)


def test_drop_path_without_a_step_draws_whole_rows_too() -> None:
    torch.manual_seed(0)
    rows = DropPath(0.5)(torch.ones(100, 4, 4)).flatten(1)
    assert set(rows.sum(1).tolist()) == {0.0, 32.0}
    assert torch.equal(DropPath(0.5).eval()(rows), rows)


def test_drop_path_is_the_same_on_any_number_of_ranks() -> None:
    net = draws.prepare(nn.Sequential(DropPath(0.5)))
    with draws.rng_scope(1, 2, (0, 1, 2, 3), 8):
        alone = net(torch.ones(32, 1, 6)).chunk(4)
    for shards in ((0, 2), (1, 3), (3,)):
        with draws.rng_scope(1, 2, shards, 8):
            parts = net(torch.ones(8 * len(shards), 1, 6)).chunk(len(shards))
        assert all(torch.equal(part, alone[shard]) for part, shard in zip(parts, shards, strict=True))
