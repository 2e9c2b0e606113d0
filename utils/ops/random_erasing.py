"""Paint a rectangle of a clip, or of each frame, in one colour or with noise."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.ops import NORMALISED, Colour, check_sets

STAGE = NORMALISED
FILL = (152, 142, 127)  # RGB of 0..255; the paint without noise


def apply(clips: Tensor, drawn: Tensor, colour: Colour) -> Tensor:
    """Paint rectangles in place.

    Args:
        clips: (B, T, H, W, C), normalised.
        drawn: (B, F, 4) integers y, x, h, w, with h = 0 for none; or (B, F, 5), with the seed of the noise last. The
            noise is standard normal for each pixel, channel and frame, and follows from the seed alone.
        colour: turns RGB into normalised values.
    """
    check_sets("random_erasing", drawn, clips)
    sets, paint, generator = drawn.shape[1], colour(FILL), torch.Generator(clips.device)

    for clip, rectangles in enumerate(drawn.tolist()):
        for number, (y, x, h, w, *noise) in enumerate(rectangles):
            if h == 0:
                continue
            shown = slice(None) if sets == 1 else slice(number, number + 1)
            place = clips[clip, shown, y : y + h, x : x + w]
            if noise:
                # float32 whatever the clips, so that the precision of a run does not change its noise
                values = torch.empty(place.shape, device=clips.device)
                paint = values.normal_(generator=generator.manual_seed(noise[0]))
            place.copy_(paint)
    return clips
