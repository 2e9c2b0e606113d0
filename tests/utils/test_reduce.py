"""Averaged gradients: the right mean, the same bits whenever a process started, and words when a gradient lacks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from utils import dist, reduce
from utils.dist import World
from utils.errors import UserError

WIDTH = 24


class Net(nn.Module):
    """A shared layer, a frozen one, a channels_last kernel, and an order of use that is not the order of definition."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, 4)
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.conv(x).mean((2, 3)).relu())
        return self.last(self.shared(self.frozen(self.shared(y).relu()).relu()))


def batches(world: World, steps: int, pieces: int = 2) -> Iterator[list[torch.Tensor]]:
    """This rank's micro-batches of each step."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + world.rank)
        yield [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(pieces)]


def step(model: Any, optimizer: torch.optim.Optimizer, pieces: list[torch.Tensor]) -> None:
    optimizer.zero_grad(set_to_none=True)
    for piece in pieces[:-1]:
        with model.no_sync():
            model(piece).square().sum().backward()
    model(pieces[-1]).square().sum().backward()
    optimizer.step()


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)


# What the ranks run (tests/ranks.py calls these by name).


def starts(world: World) -> list[torch.Tensor]:
    """The weights after four steps of one process, and after the same steps with a new start before each of them."""
    torch.manual_seed(world.rank)  # other weights on every rank: rank 0's count
    reduce.FIRST_BUCKET = 4 * WIDTH
    reduce.BUCKET = 8 * WIDTH * WIDTH
    net, other = Net(), Net()
    model, optimizer = dist.data_parallel(net, world), sgd(net)
    other.load_state_dict(net.state_dict())
    for pieces in batches(world, 4):
        step(model, optimizer, pieces)
    for pieces in batches(world, 4):
        other = copy.deepcopy(other)  # as after a restart: nothing is known of an earlier backward pass
        step(dist.data_parallel(other, world), sgd(other), pieces)
    return [torch.cat([p.flatten() for p in each.parameters()]) for each in (net, other)]


def mean(world: World) -> list[float]:
    """Largest difference from the mean of the ranks' gradients computed by one process; strides; views."""
    torch.manual_seed(0)
    net = Net().double()
    alone = copy.deepcopy(net)
    model = dist.data_parallel(net, world)
    pieces = next(iter(batches(world, 1)))
    step(model, torch.optim.SGD(net.parameters(), lr=0.0), [piece.double() for piece in pieces])
    for rank in range(world.size):
        for piece in next(iter(batches(World(rank, world.size), 1))):
            (alone(piece.double()).square().sum() / world.size).backward()
    worst = 0.0
    for parameter, expected in zip(net.parameters(), alone.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None) == (not parameter.requires_grad)
        if parameter.grad is not None:
            assert expected.grad is not None
            assert parameter.grad.stride() == parameter.stride()
            worst = max(worst, (parameter.grad - expected.grad).abs().max().item())
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    storages = {grad.untyped_storage().data_ptr() for grad in grads}
    return [worst, float(len(storages)), float(len(grads))]


def lacking(world: World) -> list[str]:
    """Return the errors for a parameter without a gradient and for a rank with another model."""
    messages = []
    model = dist.data_parallel(Net(), world)
    x = torch.zeros(1, 3, 8, 8)
    model.module.get_submodule("conv")(x).sum().backward()
    try:
        model(x)
    except RuntimeError as error:
        messages.append(str(error))
    try:
        dist.data_parallel(nn.Linear(3, 4 + world.rank), world)
    except UserError as error:
        messages.append(str(error))
    return messages


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_new_start_changes_no_bit(ranks: int) -> None:
    for one, restarted in run_ranks(__file__, "starts", ranks):
        assert torch.equal(one, restarted)


def test_the_means_are_right_and_lie_in_one_piece_of_memory() -> None:
    for worst, storages, gradients in run_ranks(__file__, "mean", 2):
        assert worst < 1e-12
        assert storages == 1
        assert gradients == 8


def test_what_is_lacking_is_named() -> None:
    for no_gradient, other_model in run_ranks(__file__, "lacking", 2):
        assert "no gradient came for first.bias, first.weight, shared.bias, shared.weight, last.bias" in no_gradient
        assert "the ranks have built different models" in other_model


def test_buckets_follow_from_the_model_alone() -> None:
    members = [(str(size), nn.Parameter(torch.zeros(size))) for size in (2**18, 2**18, 2**22, 2**22, 5)]
    members.append(("double", nn.Parameter(torch.zeros(3).double())))
    cut = [[name for name, _ in bucket] for bucket in reduce._cut(members)]
    assert cut == [["262144"], ["262144", "4194304", "4194304"], ["5"], ["double"]]


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        dist.data_parallel(nn.Linear(2, 2).requires_grad_(False), World(0, 2))
