"""Fold batch normalisation into the convolutions before it: fewer passes over memory in evaluation, same logits.

In evaluation BN is y = (x - mean) / sqrt(var + eps) * weight + bias with constants. So a convolution that feeds nothing
but a BN layer can absorb it: scale the kernel per output channel and add a bias.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold(model: nn.Module) -> int:
    """Fold the BN layers of a model in evaluation mode into their convolutions, in place.

    A pair is two neighbours of an `nn.Sequential`, or attributes named conv1 and bn1, conv and bn, ... of one module.
    All networks and methods here use these names for a convolution that only this BN layer reads. For other models,
    compare the outputs before and after (`anal_tools/evaluate/network.py` does).

    Args:
        model: float32 or float64; it cannot be trained afterwards.

    Returns:
        The number of folded BN layers.
    """
    count = 0
    # a list, since the loop replaces modules
    for parent in list(model.modules()):
        for conv, name in _pairs(parent):
            _fold(conv, getattr(parent, name))
            # the name stays, so that the forward pass needs no change
            setattr(parent, name, nn.Identity())
            count += 1
    return count


def _pairs(parent: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return convolutions of a module, each with the name of the BN layer that alone reads it."""
    children = dict(parent.named_children())
    names = list(children)
    if isinstance(parent, nn.Sequential):
        candidates = list(zip(names, names[1:], strict=False))
    else:
        candidates = [(name, re.sub(r"^conv", "bn", name)) for name in names if re.fullmatch(r"conv\d*", name)]

    pairs = [(_last(children[conv]), norm) for conv, norm in candidates]
    return [(conv, norm) for conv, norm in pairs if isinstance(conv, _CONVS) and _can_fold(conv, children.get(norm))]


def _last(module: nn.Module) -> nn.Module:
    """Return the layer that makes a module's output: in a stem of several convolutions the last one, which BN reads."""
    return _last(module[-1]) if isinstance(module, nn.Sequential) and len(module) else module


def _can_fold(conv: nn.Module, norm: nn.Module | None) -> bool:
    # without running statistics BN depends on the batch
    return (
        isinstance(norm, _BatchNorm)
        and norm.running_mean is not None
        and norm.num_features == getattr(conv, "out_channels", None)
    )


@torch.no_grad()
def _fold(conv: nn.Module, norm: _BatchNorm) -> None:
    """Change the convolution; in float64, so that the product is rounded once instead of twice."""
    assert isinstance(conv, _CONVS)
    assert norm.running_mean is not None
    assert norm.running_var is not None

    # BN as y = scale * x + shift.
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale

    # One scale per output channel: (O,) -> (O, 1, 1, ...).
    kernel = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.dim() - 1))
    weight = torch.empty_like(conv.weight).copy_(kernel)  # keeps the memory format
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
