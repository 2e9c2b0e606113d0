"""A moving average of the weights (Polyak and Juditsky 1992); validation and evaluation use it."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """A second copy of a model that follows it: ``average <- d * average + (1 - d) * weights`` after every step.

    Update n (from 0) uses ``d = min(decay, (1 + n) / (10 + n))``, so that the random start is soon forgotten (the rule
    of TensorFlow's ExponentialMovingAverage with num_updates). The running statistics of batch norm are averaged like
    the weights; counters are copied. n is the iteration, so the average is all the state there is, and a resume is
    exact.

    Args:
        net: the model, on its device, its batch norm converted (utils/sync_bn.py), `BnStats` not yet built.
        decay: d, 0..1; an average over about the last 1 / (1 - d) steps.

    Attributes:
        net: the averaged model, in evaluation mode.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = copy.deepcopy(net).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Add the weights after optimiser step `step` (from 0) to the average."""
        averages, new = tensors(self.net), tensors(net)
        share = 1 - effective_decay(self.decay, step)

        # Weights and running statistics are averaged
        floats = [i for i, tensor in enumerate(averages) if tensor.is_floating_point()]
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]  one kernel for all, as in swa_utils
        lerp([averages[i] for i in floats], [new[i] for i in floats], share)

        # Integer buffers count batches: an average of counts means nothing
        counters = [i for i, tensor in enumerate(averages) if not tensor.is_floating_point()]
        if counters:
            copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            copy([averages[i] for i in counters], [new[i] for i in counters])


def effective_decay(decay: float, step: int) -> float:
    """Return the decay of update `step` (from 0)."""
    return min(decay, (1 + step) / (10 + step))


def tensors(net: nn.Module) -> list[torch.Tensor]:
    """Return the parameters, then the buffers, in the order of the model."""
    return [*net.parameters(), *net.buffers()]
