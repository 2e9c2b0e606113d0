"""A moving average of the weights (Polyak and Juditsky 1992), with which validation and evaluation run."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """A second copy of a model that follows it: ``average <- d * average + (1 - d) * weights`` after every step.

    Update n (from 0) uses ``d = min(decay, (1 + n) / (10 + n))``, so that the random start is soon forgotten (the rule
    of TensorFlow's ExponentialMovingAverage with num_updates). The running statistics of batch norm are averaged like
    the weights, counters are copied. With n the iteration, the state is the average alone, and resuming is exact.

    Args:
        net: the model, on its device, its batch norm converted (utils/sync_bn.py), `Statistics` not yet built.
        decay: d, 0..1; an average over the last 1 / (1 - d) steps or so.

    Attributes:
        net: the averaged model, in evaluation mode.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = copy.deepcopy(net).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step` (from 0)."""
        own, new = tensors(self.net), tensors(net)
        share = 1 - effective_decay(self.decay, step)
        floats = [i for i, tensor in enumerate(own) if tensor.is_floating_point()]
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]  one kernel for all, as swa_utils has it
        lerp([own[i] for i in floats], [new[i] for i in floats], share)
        counters = [i for i, tensor in enumerate(own) if not tensor.is_floating_point()]
        if counters:
            copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            copy([own[i] for i in counters], [new[i] for i in counters])


def effective_decay(decay: float, step: int) -> float:
    """The decay of update `step`, which counts from 0."""
    return min(decay, (1 + step) / (10 + step))


def tensors(net: nn.Module) -> list[torch.Tensor]:
    """Parameters, then buffers, in the order of the model."""
    return [*net.parameters(), *net.buffers()]
