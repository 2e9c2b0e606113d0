"""A video of which some frames do not decode, in an evaluation: each of them is replaced by its nearest neighbour.

Only under `data.on_bad: substitute`, and only if most frames are there. Which frames stand in is a function of the file
alone, the video is named as repaired in the results, and what the model saw is what `frames.npy` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from utils.faults import MediaError

if TYPE_CHECKING:
    from datasets.plan.views import VideoPlan
    from datasets.readers.spec import Reader

MOST_MISSING = 0.5  # share of the frames that may be replaced
_ATTEMPTS = 40  # reads that may fail while the missing frames are searched for


def read_what_decodes(reader: Reader, plan: VideoPlan, out: np.ndarray, error: MediaError) -> NDArray[np.int64]:
    """Read the frames of a plan that decode, and show the nearest of them where one does not.

    Args:
        reader: whose read of the whole plan failed.
        plan: its frames are sorted.
        out: (F, h, w, 3) uint8, filled.
        error: how it failed.

    Returns:
        (F,) ordinals of the frames that are shown.

    Raises:
        MediaError: `error`, when too much is missing.
    """
    good = np.zeros(len(plan.frames), bool)
    failures = 0
    parts = [(0, len(good))]
    while parts:
        start, stop = parts.pop()
        try:
            reader.read(plan.sample, plan.frames[start:stop], None, plan.size, out[start:stop])
            good[start:stop] = True
        except MediaError:
            failures += 1
            if failures > _ATTEMPTS:
                raise error from None
            middle = (start + stop) // 2
            parts += [(start, middle), (middle, stop)] if stop - start > 1 else []
    if (~good).sum() > MOST_MISSING * len(good):
        raise error
    there = np.flatnonzero(good)
    distance = np.abs(plan.frames[:, None] - plan.frames[there])  # (F, frames that are there)
    nearest = there[distance.argmin(axis=1)]
    for row in np.flatnonzero(~good):
        out[row] = out[nearest[row]]
    return plan.frames[nearest]
