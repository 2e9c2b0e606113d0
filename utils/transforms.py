"""What is done to a batch of clips on the training device: flip, colour jitter, erasing, normalising, cutting views.

Nothing here draws a random number: the plans have (datasets/plan/train.py). All of it is the same code on CPU and GPU,
and every clip comes out with the same bits whatever the other clips of its batch are. The drawn parameters stay on the
CPU: reading them from a GPU would make the host wait for it.

Axes: B clips, T frames, H, W, C = 3 channels RGB, F parameter sets per clip (1: one for the clip, T: one a frame).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from utils import transfer
from utils.faults import UserError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FILL = (152, 142, 127)  # what erasing paints, seed 004's, RGB of 0..255

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601 weights with the digits torchvision has
_NO_CHANGE = (1.0, 1.0, 1.0, 0.0)  # the jitter factors that leave a frame as it is


def augment(
    clips: Tensor,
    *,
    flip: Tensor | None = None,
    jitter: Tensor | None = None,
    erase: Tensor | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    fill: Sequence[int] = FILL,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Apply to a training batch what its plans drew, in the order flip, jitter, erasing, normalise.

    Args:
        clips: (B, T, H, W, C) uint8; not changed.
        flip: (B,) bool on the CPU, True mirrors left and right.
        jitter: (B, F, 8) on the CPU: factors of brightness, contrast, saturation and hue, then the four operations
            (0..3 in that sequence) in the order in which they are applied. Semantics of torchvision's ColorJitter on
            float images.
        erase: (B, F, 4) integers on the CPU, y, x, h, w of the rectangle that is painted; h = 0 for none.
        mean, std: per channel, of values on 0..1.
        fill: RGB of 0..255 that erasing paints.
        dtype: of the result; float64 is computed in float64, everything else in float32.

    Returns:
        (B, C, T, H, W) whose memory is laid out (B, T, H, W, C): channels_last for 2D and 3D networks without a copy.
    """
    if flip is not None:
        clips = _flipped(clips, flip)
    if jitter is None:
        out = _normalised(clips, mean, std, _compute_dtype(dtype))
    else:
        unit = clips.permute(0, 1, 4, 2, 3).to(_compute_dtype(dtype), memory_format=torch.contiguous_format).div_(255)
        _jitter(unit, jitter)  # planar (B, T, C, H, W), where long rows of one channel make the arithmetic fast
        scale, shift = _colour(mean, std, unit)
        out = unit.mul_(scale.view(-1, 1, 1)).add_(shift.view(-1, 1, 1)).permute(0, 1, 3, 4, 2).contiguous()
    if erase is not None:
        scale, shift = _colour(mean, std, out)
        colour = transfer.constant(tuple(fill), out.dtype, out.device) / 255 * scale + shift
        _paint(out, erase, colour)
    return out.to(dtype).permute(0, 4, 1, 2, 3)  # (B, T, H, W, C) -> (B, C, T, H, W)


def normalise(
    clips: Tensor,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `augment` does with nothing drawn: uint8 (B, T, H, W, C) -> (B, C, T, H, W) for evaluation."""
    return augment(clips, mean=mean, std=std, dtype=dtype)


def mirrored_classes(
    pairs: Sequence[Sequence[int | str]] | None, names: Sequence[str], device: torch.device | str = "cpu"
) -> Tensor | None:
    """What each class becomes in a mirror.

    Args:
        pairs: classes that exchange, by number or name (`data.flip_labels`).
        names: of the K classes.
        device: where labels are.

    Returns:
        (K,) int64, None without pairs.

    Raises:
        UserError: a name that no class has, or several have, or a class in two pairs.
    """
    if not pairs:
        return None
    table = torch.arange(len(names))
    for one, two in ([_class(name, names) for name in pair] for pair in pairs):
        twice = [number for number in (one, two) if one == two or table[number] != number]
        if twice:
            raise UserError(f"common.data.flip_labels: class {twice[0]} ({names[twice[0]]}) stands in it twice")
        table[one], table[two] = two, one
    return table.to(device)


def _class(name: int | str, names: Sequence[str]) -> int:
    if isinstance(name, int):
        return name
    found = [number for number, other in enumerate(names) if other == name]
    if len(found) != 1:
        there_is = f"{len(found)} classes are" if found else "no class is"
        raise UserError(f"common.data.flip_labels: {there_is} called {name!r}{did_you_mean(name, names)}")
    return found[0]


def mirrored_labels(labels: Tensor, flip: Tensor, classes: Tensor) -> Tensor:
    """The labels of clips of which some are mirrored.

    Args:
        labels: (B,) int64, or (B, K) with several labels per clip.
        flip: (B,) bool, on the CPU.
        classes: (K,) of `mirrored_classes`, an exchange of pairs.

    Returns:
        The same shape and type.
    """
    other = classes[labels] if labels.dim() == 1 else labels[:, classes]
    chosen = transfer.to_device(flip, labels.device)
    return torch.where(chosen if labels.dim() == 1 else chosen.unsqueeze(1), other, labels)


def cut_views(frames: Tensor, clip_rows: np.ndarray, boxes: np.ndarray, flips: np.ndarray) -> Tensor:
    """Cut the views of one video out of its frames.

    Args:
        frames: (F, H, W, C) uint8, the distinct frames of the video at test scale.
        clip_rows: (V, T) rows of `frames` that each view shows.
        boxes: (V, 4) x1, y1, x2, y2 in pixels, all of one size.
        flips: (V,) True mirrors left and right.

    Returns:
        (V, T, h, w, C) uint8.
    """
    rows = transfer.to_device(torch.as_tensor(np.asarray(clip_rows), dtype=torch.int64), frames.device)
    corners = np.asarray(boxes).tolist()
    x1, y1, x2, y2 = corners[0]
    out = frames.new_empty((rows.shape[0], rows.shape[1], y2 - y1, x2 - x1, frames.shape[3]))
    for view, ((x1, y1, x2, y2), mirrored) in enumerate(zip(corners, np.asarray(flips).tolist(), strict=True)):
        if not (0 <= x1 < x2 <= frames.shape[2] and 0 <= y1 < y2 <= frames.shape[1]):
            raise ValueError(f"box {(x1, y1, x2, y2)} is not inside frames of {frames.shape[2]}x{frames.shape[1]}")
        view_frames = frames[:, y1:y2, x1:x2].index_select(0, rows[view])  # (T, h, w, C)
        out[view] = view_frames.flip(2) if mirrored else view_frames
    return out


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _colour(mean: Sequence[float], std: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) per channel with (v - mean) / std = v * scale + shift."""
    scale = transfer.constant(tuple(1 / s for s in std), like.dtype, like.device)
    shift = transfer.constant(tuple(-m / s for m, s in zip(mean, std, strict=True)), like.dtype, like.device)
    return scale, shift


def _normalised(clips: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    batch, frames, height, width, channels = clips.shape
    out = clips.to(dtype, memory_format=torch.contiguous_format)
    scale, shift = _colour(mean, std, out)
    # A constant row as long as a row of pixels: broadcasting over three channels only is four times slower on a CPU.
    # Two plain passes, not one fused: a fused one rounds differently at the end of a vector register.
    rows = out.view(batch * frames * height, width * channels)
    rows.mul_((scale / 255).repeat(width)).add_(shift.repeat(width))
    return out


def _flipped(clips: Tensor, flip: Tensor) -> Tensor:
    rows = flip.nonzero().flatten()
    if len(rows) == 0:
        return clips
    if len(rows) == len(clips):
        return clips.flip(3)
    rows = transfer.to_device(rows, clips.device)
    out = clips.clone()
    out[rows] = clips[rows].flip(3)
    return out


def _jitter(unit: Tensor, jitter: Tensor) -> None:
    """Colour jitter in place on (B, T, C, H, W) of 0..1."""
    drawn = jitter.to(torch.float64)
    batch, sets, _ = drawn.shape
    frames, channels, height, width = unit.shape[1:]
    if batch != len(unit) or sets not in (1, frames):
        raise ValueError(f"jitter {tuple(jitter.shape)} does not fit {len(unit)} clips of {frames} frames")
    groups = unit.view(batch * sets, frames // sets, channels, height, width)  # (G, P, C, H, W)
    factors = drawn[..., :4].reshape(-1, 4)
    orders = drawn[..., 4:].reshape(-1, 4).to(torch.int64)
    operations = (_brightness, _contrast, _saturation, _hue)
    wanted = [bool((factors[:, number] != neutral).any()) for number, neutral in enumerate(_NO_CHANGE)]
    for place in range(4):
        for number, operation in enumerate(operations):
            chosen = (orders[:, place] == number).nonzero().flatten()
            if wanted[number] and len(chosen):
                _apply(operation, groups, chosen, factors[:, number])


def _apply(operation: Callable[[Tensor, Tensor], None], groups: Tensor, chosen: Tensor, factors: Tensor) -> None:
    """Run an in-place operation on some of the groups: on a copy of them, or directly if it is all."""
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
    # Rows first, then their sums: neither sum is ever split among threads, so that its bits do not depend on the batch.
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
    """(G, P, C, H, W) -> (G, P, 1, H, W)."""
    red, green, blue = unit.split(1, dim=2)
    return (red * _LUMA[0]).add_(green * _LUMA[1]).add_(blue * _LUMA[2])


def _paint(out: Tensor, erase: Tensor, colour: Tensor) -> None:
    """Paint the rectangles into (B, T, H, W, C), in place."""
    sets, frames = erase.shape[1], out.shape[1]
    if len(erase) != len(out) or sets not in (1, frames):
        raise ValueError(f"erase {tuple(erase.shape)} does not fit {len(out)} clips of {frames} frames")
    for clip, rectangles in enumerate(erase.tolist()):
        for number, (y, x, h, w) in enumerate(rectangles):
            if h > 0:
                shown = slice(None) if sets == 1 else slice(number, number + 1)
                out[clip, shown, y : y + h, x : x + w] = colour
