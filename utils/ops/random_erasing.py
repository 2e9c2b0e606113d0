"""Paint a rectangle of a clip, or of each frame, in one colour."""

from __future__ import annotations

from torch import Tensor

from utils.ops import NORMALISED, Colour, check_sets

STAGE = NORMALISED
FILL = (152, 142, 127)  # RGB of 0..255


def apply(clips: Tensor, drawn: Tensor, colour: Colour) -> Tensor:
    """Paint in place; rows are y, x, h, w (B, F, 4) integers, h = 0 for none."""
    check_sets("random_erasing", drawn, clips)
    sets, paint = drawn.shape[1], colour(FILL)
    for clip, rectangles in enumerate(drawn.tolist()):
        for number, (y, x, h, w) in enumerate(rectangles):
            if h > 0:
                shown = slice(None) if sets == 1 else slice(number, number + 1)
                clips[clip, shown, y : y + h, x : x + w] = paint
    return clips
