"""Change clips on the training device: apply the draws of their plans, normalise, mirror labels, crop views.

No code here draws a random number: the plans hold them (datasets/plan/train.py). CPU and GPU run the same code, and a
clip gets the same bits whatever the other clips of its batch are. The drawn parameters stay on the CPU: reading them
from a GPU would make the host wait for it.

Axes: B clips, T frames, H, W, C = 3 channels RGB, F rows per clip (1: one for the clip, T: one per frame).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from utils import ops, transfer
from utils.errors import UserError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def augment(
    clips: Tensor,
    drawn: Mapping[str, Tensor] | None = None,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Apply the draws of its plans to a training batch, and normalise it.

    Args:
        clips: (B, T, H, W, C) uint8; not changed.
        drawn: name of an augmentation (`utils/ops/`) -> (B, F, ...) on the CPU, in the order of application.
        mean, std: per channel, of values on 0..1.
        dtype: dtype of the result; float64 is computed in float64, everything else in float32.

    Returns:
        (B, C, T, H, W) with the memory layout (B, T, H, W, C): channels_last for 2D and 3D networks without a copy.
    """
    parts = [(*ops.part(name), rows) for name, rows in (drawn or {}).items()]  # (stage, apply, rows)
    number = torch.float64 if dtype == torch.float64 else torch.float32

    # (v - mean) / std = v * scale + shift, with v on 0..1
    scale = transfer.constant(tuple(1 / s for s in std), number, clips.device)
    shift = transfer.constant(tuple(-m / s for m, s in zip(mean, std, strict=True)), number, clips.device)

    def colour(rgb: Sequence[int]) -> Tensor:
        # A colour such as grey padding in normalised units, so that it can be written into a finished clip.
        return transfer.constant(tuple(rgb), number, clips.device) / 255 * scale + shift

    def apply_all(stage: str, clips: Tensor) -> Tensor:
        for part_stage, apply, rows in parts:
            if part_stage == stage:
                clips = apply(clips, rows, colour)
        return clips

    # Stages in order: bytes 0..255, unit values 0..1, normalised values.
    clips = apply_all(ops.BYTES, clips)
    if any(stage == ops.UNIT for stage, _, _ in parts):
        # Operations on colours want channels in front: (B, T, H, W, C) -> (B, T, C, H, W), and back at the end.
        unit = clips.permute(0, 1, 4, 2, 3).to(number, memory_format=torch.contiguous_format).div_(255)
        unit = apply_all(ops.UNIT, unit)  # (B, T, C, H, W)
        out = unit.mul_(scale.view(-1, 1, 1)).add_(shift.view(-1, 1, 1)).permute(0, 1, 3, 4, 2).contiguous()
    else:
        out = _normalised(clips, scale, shift)

    out = apply_all(ops.NORMALISED, out)
    return out.to(dtype).permute(0, 4, 1, 2, 3)  # (B, T, H, W, C) -> (B, C, T, H, W)


def normalise(
    clips: Tensor,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Normalise a batch for evaluation, without any draws: uint8 (B, T, H, W, C) -> (B, C, T, H, W)."""
    return augment(clips, mean=mean, std=std, dtype=dtype)


def mirrored_classes(
    pairs: Sequence[Sequence[int | str]] | None, names: Sequence[str], device: torch.device | str = "cpu"
) -> Tensor | None:
    """Return the class that each class becomes in a mirror.

    Args:
        pairs: classes that are exchanged, by number or name (`data.flip_labels`).
        names: names of the K classes.
        device: the device of the labels.

    Returns:
        (K,) int64, or None without pairs.

    Raises:
        UserError: a name fits no class or several, or a class is in two pairs.
    """
    if not pairs:
        return None

    table = torch.arange(len(names))  # a class without a partner stays itself
    for one, two in ([_class(name, names) for name in pair] for pair in pairs):
        twice = [number for number in (one, two) if one == two or table[number] != number]
        if twice:
            raise UserError(f"common.data.flip_labels: class {twice[0]} ({names[twice[0]]}) occurs twice")
        table[one], table[two] = two, one

    return table.to(device)


def _class(name: int | str, names: Sequence[str]) -> int:
    if isinstance(name, int):
        return name
    matches = [number for number, other in enumerate(names) if other == name]

    if len(matches) != 1:
        there_is = f"{len(matches)} classes are" if matches else "no class is"
        raise UserError(f"common.data.flip_labels: {there_is} called {name!r}{did_you_mean(name, names)}")
    return matches[0]


def mirrored_labels(labels: Tensor, flip: Tensor, classes: Tensor) -> Tensor:
    """Return the labels of clips, some of which are mirrored.

    Args:
        labels: (B,) int64, or (B, K) with several labels per clip.
        flip: (B,) bool, on the CPU.
        classes: (K,) from `mirrored_classes`, an exchange of pairs.

    Returns:
        The same shape and type.
    """
    # An exchange is its own inverse, so both kinds of labels are indexed by the same table.
    other = classes[labels] if labels.dim() == 1 else labels[:, classes]
    chosen = transfer.to_device(flip, labels.device)
    return torch.where(chosen if labels.dim() == 1 else chosen.unsqueeze(1), other, labels)


def crop_views(frames: Tensor, clip_rows: np.ndarray, boxes: np.ndarray, flips: np.ndarray) -> Tensor:
    """Cut the views of one video out of its frames.

    Args:
        frames: (F, H, W, C) uint8, the distinct frames of the video at test scale.
        clip_rows: (V, T) the rows of `frames` in each view.
        boxes: (V, 4) x1, y1, x2, y2 in pixels, all of the same size.
        flips: (V,) True mirrors left and right.

    Returns:
        (V, T, h, w, C) uint8.
    """
    rows = transfer.to_device(torch.as_tensor(np.asarray(clip_rows), dtype=torch.int64), frames.device)

    corners = np.asarray(boxes).tolist()
    x1, y1, x2, y2 = corners[0]
    out = frames.new_empty((rows.shape[0], rows.shape[1], y2 - y1, x2 - x1, frames.shape[3]))

    # Into one allocated result: stacking the views would need the memory twice.
    for view, ((x1, y1, x2, y2), mirrored) in enumerate(zip(corners, np.asarray(flips).tolist(), strict=True)):
        if not (0 <= x1 < x2 <= frames.shape[2] and 0 <= y1 < y2 <= frames.shape[1]):
            raise ValueError(f"box {(x1, y1, x2, y2)} is not inside frames of {frames.shape[2]}x{frames.shape[1]}")
        view_frames = frames[:, y1:y2, x1:x2].index_select(0, rows[view])  # (T, h, w, C)
        out[view] = view_frames.flip(2) if mirrored else view_frames

    return out


def _normalised(clips: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    batch, frames, height, width, channels = clips.shape
    out = clips.to(scale.dtype, memory_format=torch.contiguous_format)

    # A constant row as long as a row of pixels: broadcasting over three channels only is four times slower on a CPU.
    # Two plain passes, not one fused: a fused one rounds differently at the end of a vector register.
    rows = out.view(batch * frames * height, width * channels)
    rows.mul_((scale / 255).repeat(width)).add_(shift.repeat(width))
    return out
