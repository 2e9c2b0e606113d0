"""Apply augmentations on the training device. `datasets/plan/ops/NAME.py` draws the numbers, NAME.py here applies them.

Each file has a `STAGE` and `apply(clips, drawn, colour)`, which returns clips of the same shape. `drawn` is (B, F, ...)
on the CPU: F = 1 row for a clip, or one for each of its T frames. `apply` draws no random number.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

from torch import Tensor

#: (B, T, H, W, C) uint8; return new memory if anything changes.
BYTES = "bytes"
#: (B, T, C, H, W) float of 0..1; may change in place.
UNIT = "unit"
#: (B, T, H, W, C) float, normalised; may change in place. `colour` turns RGB of 0..255 into a normalised (C,).
NORMALISED = "normalised"

Colour = Callable[[Sequence[int]], Tensor]
Apply = Callable[[Tensor, Tensor, Colour], Tensor]


@functools.cache
def part(name: str) -> tuple[str, Apply]:
    """Return the stage and the `apply` of the augmentation called `name`."""
    module = importlib.import_module(f"{__name__}.{name}")
    return module.STAGE, module.apply


def check_sets(name: str, drawn: Tensor, clips: Tensor) -> None:
    """Raise ValueError unless there is one row for each clip, or one for each of its frames."""
    if len(drawn) != len(clips) or drawn.shape[1] not in (1, clips.shape[1]):
        raise ValueError(f"{name} {tuple(drawn.shape)} does not fit {len(clips)} clips of {clips.shape[1]} frames")
