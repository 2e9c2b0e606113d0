"""Mirror clips left and right."""

from __future__ import annotations

from torch import Tensor

from utils import transfer
from utils.ops import BYTES, Colour

STAGE = BYTES


def apply(clips: Tensor, drawn: Tensor, colour: Colour) -> Tensor:
    """Mirror the clips whose row is True, (B, 1, 1) bool, along W; do not change the input."""
    rows = drawn.flatten().nonzero().flatten()
    if len(rows) == 0:
        return clips
    if len(rows) == len(clips):
        return clips.flip(3)

    rows = transfer.to_device(rows, clips.device)
    out = clips.clone()
    out[rows] = clips[rows].flip(3)
    return out
