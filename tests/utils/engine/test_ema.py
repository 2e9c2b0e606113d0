"""The moving average of the weights against its sum written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils.engine.ema import Ema, effective_decay


def test_effective_decay_grows_to_the_wanted_one() -> None:
    assert [effective_decay(0.9, n) for n in (0, 8, 80, 10_000)] == pytest.approx([0.1, 0.5, 0.9, 0.9])


def test_equals_the_recursion_written_out() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    ema = Ema(net, 0.5)
    expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for step in range(6):
        with torch.no_grad():
            for tensor in net.state_dict().values():
                tensor.add_(torch.randn(tensor.shape).to(tensor) if tensor.is_floating_point() else 1)
        ema.update(net, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in net.state_dict().items():
            is_count = not tensor.is_floating_point()
            expected[name] = tensor.clone() if is_count else decay * expected[name] + (1 - decay) * tensor
    for name, tensor in ema.net.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)


def test_the_average_is_another_model_that_does_not_train() -> None:
    net = nn.Linear(2, 2)
    ema = Ema(net, 0.9)
    assert not ema.net.training
    assert not any(parameter.requires_grad for parameter in ema.net.parameters())
    before = net.weight.clone()
    assert isinstance(ema.net, nn.Linear)
    with torch.no_grad():
        ema.net.weight.zero_()
    assert torch.equal(net.weight, before)
    assert net.weight.requires_grad
