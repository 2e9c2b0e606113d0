"""RandAugment: apply the operations that `datasets/plan/ops/randaugment.py` has drawn.

The pixels equal those of torchvision's functions on uint8 tensors with the same arguments, bilinear, with grey 128
outside. Most operations are a table from byte to byte, one for all pixels or one for each channel of each frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from utils import transfer
from utils.ops import BYTES, Colour, check_sets

STAGE = BYTES

_FILL = 128.0  # the grey that moves in from outside
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601 weights, with torchvision's digits


def apply(clips: Tensor, drawn: Tensor, colour: Colour) -> Tensor:
    """Apply to each clip, or to each of its frames, its operations one after the other; do not change the input.

    Args:
        clips: (B, T, H, W, C) uint8.
        drawn: (B, F, n, 2): number and argument of each operation, a negative number for none.
        colour: not used.
    """
    check_sets("randaugment", drawn, clips)
    if not bool((drawn[..., 0] >= 0).any()):
        return clips

    out, sets = clips.clone(), drawn.shape[1]
    for clip, rows in enumerate(drawn.tolist()):
        for place, operations in enumerate(rows):
            shown = slice(None) if sets == 1 else slice(place, place + 1)  # all frames, or the one of this row
            steps = [(int(number), argument) for number, argument in operations if number >= 0]
            if not steps:
                continue

            frames = out[clip, shown].permute(0, 3, 1, 2).contiguous()  # (T, H, W, C) -> (T, C, H, W)
            for number, argument in steps:
                frames = _OPERATIONS[number](frames, argument)
            out[clip, shown] = frames.permute(0, 2, 3, 1)
    return out


# ---------------------------------------------------------------- operations: (T, C, H, W) uint8 -> the same


def _autocontrast(frames: Tensor, _: float) -> Tensor:
    """Stretch each channel of each frame to 0..255."""
    flat = frames.flatten(2)  # (T, C, H*W)
    low, high = (bound.unsqueeze(2).float() for bound in (flat.amin(2), flat.amax(2)))
    scale = 255 / (high - low)
    is_flat = high == low

    # A flat channel has no contrast to stretch: it stays as it is
    low, scale = low.masked_fill(is_flat, 0), scale.masked_fill(is_flat, 1)
    return _looked_up(frames, _bytes((_levels(frames) - low) * scale))


def _equalize(frames: Tensor, _: float) -> Tensor:
    """Spread the histogram of each channel of each frame evenly, as PIL does."""
    flat = frames.flatten(2).long()  # (T, C, H*W)
    histogram = torch.zeros((*flat.shape[:2], 256), dtype=torch.int64, device=flat.device)
    histogram.scatter_add_(2, flat, torch.ones((), dtype=torch.int64, device=flat.device).expand_as(flat))

    # PIL's rule: a value becomes the number of darker pixels, in steps of 1/255 of all pixels but the brightest
    below = histogram.cumsum(2) - histogram  # pixels darker than each value
    step = below.gather(2, flat.amax(2, keepdim=True)) // 255
    spread = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)

    identity = torch.arange(256, device=flat.device)
    return _looked_up(frames, torch.where(step == 0, identity, spread).to(torch.uint8))


def _rotate(frames: Tensor, degrees: float) -> Tensor:
    # The map leads from the result to the source, so it turns against the rotation
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return _moved(frames, (cosine, -sine, 0.0), (sine, cosine, 0.0))


def _shear_x(frames: Tensor, factor: float) -> Tensor:
    return _moved(frames, (1.0, factor, factor * frames.shape[2] / 2), (0.0, 1.0, 0.0))  # the top row does not move


def _shear_y(frames: Tensor, factor: float) -> Tensor:
    return _moved(frames, (1.0, 0.0, 0.0), (factor, 1.0, factor * frames.shape[3] / 2))


def _translate_x(frames: Tensor, pixels: float) -> Tensor:
    return _moved(frames, (1.0, 0.0, pixels), (0.0, 1.0, 0.0))


def _translate_y(frames: Tensor, pixels: float) -> Tensor:
    return _moved(frames, (1.0, 0.0, 0.0), (0.0, 1.0, pixels))


def _invert(frames: Tensor, _: float) -> Tensor:
    return 255 - frames


def _posterize(frames: Tensor, bits: float) -> Tensor:
    """Keep the upper bits."""
    return frames & (256 - 2 ** (8 - int(bits))) % 256


def _solarize(frames: Tensor, threshold: float) -> Tensor:
    """Invert the values at or above a threshold."""
    return torch.where(frames >= threshold, 255 - frames, frames)


def _solarize_add(frames: Tensor, added: float) -> Tensor:
    """Add a number to values below 128."""
    return torch.where(frames < 128, frames + int(added), frames)  # at most 127 + 128: no byte overflows


def _brightness(frames: Tensor, factor: float) -> Tensor:
    return _blended(frames, None, factor)


def _contrast(frames: Tensor, factor: float) -> Tensor:
    grey = _grey(frames)
    # The sum of integers: its bits depend neither on the number of threads nor on the device
    mean = grey.sum((1, 2, 3), dtype=torch.int64).float() / grey[0].numel()
    return _blended(frames, mean.view(-1, 1, 1, 1), factor)


def _saturation(frames: Tensor, factor: float) -> Tensor:
    return _blended(frames, _grey(frames), factor)


def _sharpness(frames: Tensor, factor: float) -> Tensor:
    """Blend with a smoothed image: weight 5 on a pixel, 1 on each of its eight neighbours; keep the border."""
    if min(frames.shape[2:]) <= 2:
        return frames
    wide = frames.to(torch.int16)  # 13 * 255 overflows a byte
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[:, :, 1:-1, 1:-1]

    smooth = frames.clone()
    smooth[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)  # rounded; 13 is odd, so there are no ties
    return _blended(frames, smooth, factor)


# The number of an operation is its place here; `datasets/plan/ops/randaugment.py` has the same order
_OPERATIONS: tuple[Callable[[Tensor, float], Tensor], ...] = (
    *(_autocontrast, _equalize, _invert, _rotate, _posterize, _solarize, _solarize_add, _saturation),
    *(_contrast, _brightness, _sharpness, _shear_x, _shear_y, _translate_x, _translate_y),
)


# ---------------------------------------------------------------- what they share


def _levels(frames: Tensor) -> Tensor:
    """Return the 256 values of a byte, float32."""
    return torch.arange(256, dtype=torch.float32, device=frames.device)


def _looked_up(frames: Tensor, table: Tensor) -> Tensor:
    """Replace each value by its entry in the table of its channel, (T, C, 256)."""
    return table.gather(2, frames.flatten(2).long()).view_as(frames)


def _bytes(values: Tensor) -> Tensor:
    """Clamp to 0..255 and truncate to whole numbers."""
    return values.clamp_(0, 255).to(torch.uint8)


def _blended(frames: Tensor, other: Tensor | None, factor: float) -> Tensor:
    """Return ``factor * frames + (1 - factor) * other``; other None is black."""
    mixed = frames * factor
    return _bytes(mixed if other is None else mixed.add_(other * (1.0 - factor)))


def _grey(frames: Tensor) -> Tensor:
    """Return the grey image, truncated to whole numbers: (T, C, H, W) -> (T, 1, H, W) uint8."""
    red, green, blue = frames.split(1, dim=1)
    return (red * _LUMA[0]).add_(green * _LUMA[1]).add_(blue * _LUMA[2]).to(torch.uint8)


def _moved(frames: Tensor, x: tuple[float, float, float], y: tuple[float, float, float]) -> Tensor:
    """Replace each pixel (u, v) by the value at (x . (u, v, 1), y . (u, v, 1)), in pixels from the centre; bilinear."""
    # Centres of the pixels, with the origin in the centre of the image
    count, channels, height, width = frames.shape
    device = frames.device
    across, down = (torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2 for size in (width, height))
    places = torch.ones((height, width, 3), device=device)  # (u, v, 1)
    places[..., 0], places[..., 1] = across, down.unsqueeze(1)

    # The map in halves of the image: grid_sample takes -1..1 from edge to edge
    columns = transfer.to_device(
        torch.tensor((x, y), dtype=torch.float32).t() / torch.tensor((width / 2, height / 2)), device
    )
    grid = places.view(1, -1, 3).bmm(columns.unsqueeze(0)).view(1, height, width, 2).expand(count, -1, -1, -1)

    # A channel of ones is sampled too: it becomes the share of each pixel that comes from inside
    inside = torch.ones((count, 1, height, width), device=device)
    sampled = F.grid_sample(torch.cat((frames.float(), inside), 1), grid, "bilinear", "zeros", align_corners=False)
    seen, share = sampled[:, :channels], sampled[:, channels:]
    return seen.mul(share).add_((1 - share).mul_(_FILL)).round_().to(torch.uint8)
