"""Measure the size and arithmetic of a network: its parameters, and the multiply-accumulates (MACs) of a forward pass.

One MAC is what papers and model zoos call one "FLOP". Only shapes are computed, so counting costs no memory and no
arithmetic, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable and frozen values of a model; a shared one counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, shape: Sequence[int], *, norms: bool = True) -> int:
    """Count the MACs of convolutions, linear layers, matrix products and attention in an evaluation pass.

    Args:
        model: any model on any device; it is not changed.
        shape: shape of the input, (1, 3, T, H, W) for one clip of a method, (1, 3, H, W) for one image of a backbone.
        norms: count batch normalisation too, two per element, as fvcore and most published tables do.
    """
    # modules in training mode would draw dropout and update statistics
    modes = [(module, module.training) for module in model.modules()]
    total = 0

    def count(x: Tensor) -> Tensor:
        nonlocal total
        total += 2 * x.numel()
        return x

    # On the meta device PyTorch splits a batch norm into 20 operations, half of the time; `count` replaces them.
    replaced = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    shapes_only = {name: torch.empty_like(value, device="meta") for name, value in model.state_dict().items()}
    shapes_only |= {name: torch.empty_like(value, device="meta") for name, value in model.named_buffers()}

    try:
        for module, _ in modes:
            module.training = False
        # an attribute of the instance hides the method of its class
        for module in replaced:
            vars(module)["forward"] = count
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, shapes_only, (torch.empty(tuple(shape), device="meta"),))
    finally:
        for module in replaced:
            vars(module).pop("forward", None)
        for module, mode in modes:
            module.training = mode

    # the counter counts a multiplication and an addition as two
    return (total if norms else 0) + counter.get_total_flops() // 2
