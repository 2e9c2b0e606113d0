"""Colour jitter: brightness, contrast, saturation and hue, as in torchvision's ColorJitter on float images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from utils import transfer
from utils.ops import UNIT, Colour, check_sets

STAGE = UNIT

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601 weights, with torchvision's digits
_NO_CHANGE = (1.0, 1.0, 1.0, 0.0)  # the factors that leave a frame as it is


def apply(clips: Tensor, drawn: Tensor, colour: Colour) -> Tensor:
    """Jitter the colours in place.

    Args:
        clips: (B, T, C, H, W) of 0..1: long rows of one channel make the arithmetic fast.
        drawn: (B, F, 8): factors of brightness, contrast, saturation and hue, then the numbers 0..3 of these four
            operations in the order in which they are applied.
        colour: not used.
    """
    check_sets("colorjitter", drawn, clips)
    drawn = drawn.to(torch.float64)
    batch, sets, _ = drawn.shape
    frames, channels, height, width = clips.shape[1:]

    # A group is the P frames that share a row of `drawn`: a whole clip, or one frame
    groups = clips.view(batch * sets, frames // sets, channels, height, width)  # (G, P, C, H, W)
    factors = drawn[..., :4].reshape(-1, 4)
    orders = drawn[..., 4:].reshape(-1, 4).to(torch.int64)
    operations = (_brightness, _contrast, _saturation, _hue)

    # Each group has its own order of operations: at each place, run an operation on the groups that have it there
    has_effect = [bool((factors[:, number] != neutral).any()) for number, neutral in enumerate(_NO_CHANGE)]
    for place in range(4):
        for number, operation in enumerate(operations):
            chosen = (orders[:, place] == number).nonzero().flatten()
            if has_effect[number] and len(chosen):
                _run(operation, groups, chosen, factors[:, number])
    return clips


def _run(operation: Callable[[Tensor, Tensor], None], groups: Tensor, chosen: Tensor, factors: Tensor) -> None:
    """Run an in-place operation on some of the groups: on a copy of them, or directly if all are chosen."""
    factor = transfer.to_device(factors[chosen].to(groups.dtype), groups.device).view(-1, 1, 1, 1, 1)
    if len(chosen) == len(groups):
        operation(groups, factor)
        return

    index = transfer.to_device(chosen, groups.device)
    part = groups[index]
    operation(part, factor)
    groups[index] = part


def _brightness(unit: Tensor, factor: Tensor) -> None:
    unit.mul_(factor).clamp_(0, 1)


def _contrast(unit: Tensor, factor: Tensor) -> None:
    grey = _grey(unit)
    # Rows first, then their sums: neither sum is ever split among threads, so its bits do not depend on the batch
    average = grey.sum(4, keepdim=True).sum(3, keepdim=True).div_(grey.shape[3] * grey.shape[4])
    unit.mul_(factor).add_(average.mul_(1 - factor)).clamp_(0, 1)


def _saturation(unit: Tensor, factor: Tensor) -> None:
    grey = _grey(unit)
    unit.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 1)


def _hue(unit: Tensor, factor: Tensor) -> None:
    """Turn the hue by `factor` of a full circle, at constant value and chroma (HSV)."""
    red, green, blue = unit.unbind(2)
    high, low = unit.amax(2), unit.amin(2)
    chroma = high - low

    # Hue in sixths of the circle, from the channel that is largest
    divisor = torch.where(chroma == 0, 1, chroma)
    sixths = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sixths.add_(6 * factor.squeeze(2))
    sixths.sub_((sixths / 6).floor_().mul_(6))  # onto the circle 0..6

    # Hexcone model (Smith 1978): along the circle each channel is a trapezoid between the lowest and the highest value.
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        height = (sixths - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)
        torch.add(low, height.mul_(chroma), out=unit[:, :, channel])
    unit.clamp_(0, 1)


def _grey(unit: Tensor) -> Tensor:
    """Return the grey image: (G, P, C, H, W) -> (G, P, 1, H, W)."""
    red, green, blue = unit.split(1, dim=2)
    return (red * _LUMA[0]).add_(green * _LUMA[1]).add_(blue * _LUMA[2])
