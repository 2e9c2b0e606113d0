"""Precise batch norm against a slow reference, on one and two ranks, and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from utils.dist import World
from utils.engine import precise_bn
from utils.shards import ShardPlan
from utils.sync_bn import BnStats, GroupBatchNorm, convert

BATCHES, ROWS = 5, 6


class Small(nn.Module):
    """Two layers that train, one that is frozen as partial BN freezes it, one that only runs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.bn2 = nn.BatchNorm2d(4)
        self.aux = nn.BatchNorm2d(4)

    def train(self, mode: bool = True) -> Small:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.frozen(self.bn1(self.conv(x)).relu()))
        if self.training:
            self.aux(x)
        return self.bn2(x)


def network() -> Small:
    torch.manual_seed(3)
    net = Small().double()
    for name, buffer in net.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(2.0)
    return net


def clips(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(ROWS, 3, 8, 8, generator=generator, dtype=torch.float64) * (1 + batch) + batch


def forwards(parts: list[list[torch.Tensor]]) -> Iterator[Callable[[nn.Module], object]]:
    for batch in parts:
        for rows in batch:
            yield lambda net, rows=rows: net(rows)


def reference(net: Small, pieces: int) -> dict[str, torch.Tensor]:
    """Written out: mean over the batches (and their BN groups) of the mean and the unbiased variance of each layer."""
    means: dict[str, list[torch.Tensor]] = {"bn1": [], "bn2": []}
    variances: dict[str, list[torch.Tensor]] = {"bn1": [], "bn2": []}

    def batch_norm(name: str, x: torch.Tensor) -> torch.Tensor:
        layer = getattr(net, name)
        mean, flat = x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1)
        count = flat.shape[1]
        variance = ((flat - mean[:, None]) ** 2).sum(1) / count
        means[name].append(mean)
        variances[name].append(variance * count / (count - 1))
        normal = (x - mean[:, None, None]) / (variance[:, None, None] + layer.eps).sqrt()
        return normal * layer.weight[:, None, None] + layer.bias[:, None, None]

    with torch.no_grad():
        for batch in range(BATCHES):
            for x in clips(batch).chunk(pieces):
                x = batch_norm("bn1", net.conv(x)).relu()
                batch_norm("bn2", net.frozen(x))
    return {
        f"{name}.running_{kind}": torch.stack(parts[name]).mean(0)
        for name in ("bn1", "bn2")
        for kind, parts in (("mean", means), ("var", variances))
    }


def assert_equal_statistics(statistics: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> None:
    assert statistics is not None
    assert statistics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(statistics[name], value, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pieces", [1, 2])
def test_equals_a_slow_reference(pieces: int) -> None:
    net = network().eval()
    expected = reference(copy.deepcopy(net), pieces)
    convert(net, ShardPlan(pieces, ROWS // pieces), sync_stats=True)
    parts = [list(clips(batch).chunk(pieces)) for batch in range(BATCHES)]
    assert_equal_statistics(precise_bn.averages(net, forwards(parts), World()), expected)


def test_the_model_and_its_training_state_are_as_before() -> None:
    net = network()
    shards = ShardPlan(1, ROWS)
    convert(net, shards, sync_stats=True)
    bn_stats = BnStats(net, shards, World())

    def step(number: int) -> None:
        net.train()
        torch.manual_seed(number)  # dropout of this little network is torch's own
        net(clips(number))
        bn_stats.after_micro_batch(0)
        bn_stats.after_step()

    step(0)
    with_detour, modes = copy.deepcopy(net.state_dict()), {name: m.training for name, m in net.named_modules()}
    generator = torch.get_rng_state()
    values = precise_bn.averages(net, forwards([[clips(7)], [clips(8)]]), World())
    assert values is not None
    with precise_bn.applied(net, values):
        assert net.bn1.running_mean is not None
        assert torch.equal(net.bn1.running_mean, values["bn1.running_mean"])
        assert not torch.equal(net.bn1.running_mean, with_detour["bn1.running_mean"])
    assert torch.equal(torch.get_rng_state(), generator)
    assert {name: m.training for name, m in net.named_modules()} == modes
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, with_detour[name]), name
    step(1)
    after = copy.deepcopy(net.state_dict())

    other = network()
    convert(other, shards, sync_stats=True)
    net, bn_stats = other, BnStats(other, shards, World())
    step(0)
    step(1)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, after[name]), name


def test_frozen_layers_and_auxiliary_heads_are_left_out() -> None:
    net = network()
    convert(net, ShardPlan(1, ROWS), sync_stats=True)
    values = precise_bn.averages(net, forwards([[clips(0)]]), World())
    assert values is not None
    assert {name.split(".")[0] for name in values} == {"bn1", "bn2"}


def test_an_agreed_stop_ends_it_and_leaves_nothing_behind() -> None:
    net = network()
    convert(net, ShardPlan(1, ROWS), sync_stats=True)
    net.train()

    def two_then_stop() -> Iterator[Callable[[nn.Module], object] | None]:
        yield lambda net: net(clips(0))
        yield None

    assert precise_bn.averages(net, two_then_stop(), World()) is None
    assert net.training
    assert not net.frozen.training
    assert not any(layer.ran for layer in net.modules() if isinstance(layer, GroupBatchNorm))


def on_a_rank(world: World, group: int) -> dict[str, torch.Tensor]:
    """Two shards of three clips on one or two ranks."""
    net = network()
    shards = ShardPlan(2, ROWS // 2, world.size, world.rank, group)
    convert(net, shards, sync_stats=False)
    parts = [
        [torch.cat([clips(batch).chunk(2)[shard] for shard in mine]) for mine in shards.micro_batches]
        for batch in range(BATCHES)
    ]
    values = precise_bn.averages(net, forwards(parts), world)
    assert values is not None
    return values


@pytest.mark.parametrize("group", [1, 2])
def test_two_ranks_give_the_same_on_both(group: int) -> None:
    """BN groups of one shard count as batches of their own; a group of two shards is one batch."""
    expected = reference(network().eval(), 2 // group)
    for statistics in run_ranks(__file__, "on_a_rank", 2, group=group):
        assert_equal_statistics(statistics, expected)
