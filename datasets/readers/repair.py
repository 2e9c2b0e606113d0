"""Replace frames that do not decode by their nearest neighbours, in an evaluation.

This happens only under `data.on_bad: substitute`, and only if most frames decode. The choice depends on the file alone.
The results mark the video as repaired, and `frames.npy` has the frames that the model saw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from utils.errors import MediaError

if TYPE_CHECKING:
    from datasets.plan.views import VideoPlan
    from datasets.readers.spec import Reader

MOST_MISSING = 0.5  # largest share of the frames that may be replaced
_ATTEMPTS = 40  # reads that may fail during the search for missing frames


def read_what_decodes(reader: Reader, plan: VideoPlan, out: np.ndarray, error: MediaError) -> NDArray[np.int64]:
    """Read the frames of a plan that decode, and show the nearest of them in place of the others.

    Args:
        reader: its read of the whole plan failed.
        plan: its frames are sorted.
        out: (F, h, w, 3) uint8, filled.
        error: the error of that read.

    Returns:
        (F,) ordinals of the frames that are shown.

    Raises:
        MediaError: `error`, if too many frames are missing.
    """
    good = np.zeros(len(plan.frames), bool)
    failures = 0
    # Bisect: a read of a part shows if all its frames decode.
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
    distance = np.abs(plan.frames[:, None] - plan.frames[there])  # (F, frames that decode)
    nearest = there[distance.argmin(axis=1)]
    for row in np.flatnonzero(~good):
        out[row] = out[nearest[row]]

    return plan.frames[nearest]
