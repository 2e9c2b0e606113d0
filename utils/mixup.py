"""Apply mixup and CutMix between neighbours of the global batch.

Mixup (Zhang et al. 2018, arXiv:1710.09412, eq. 1 and 2) blends whole clips, CutMix (Yun et al. 2019, arXiv:1905.04899,
section 3.1) replaces a box in all frames. Clip 2j is mixed with clip 2j + 1, in the same way for the whole batch, so
the partner is the same on any number of ranks. The batch order is already random, so the pairs are as random as those
of a permutation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from utils import draws

# Two arbitrary constants ("mixup" and "cutmix" in ASCII) keep these draws apart from others of a seed and step.
_MIXUP = 0x6D69787570
_CUTMIX = 0x6375746D6978


@dataclass(frozen=True)
class Mix:
    """How the neighbours of one global batch are mixed.

    Attributes:
        lam: weight of a clip's own label, and with mixup of its pixels; 1: not mixed.
        box: CutMix: y1, y2, x1, x2 (end exclusive) of the pixels that come from the neighbour; None: mixup.
    """

    lam: float = 1.0
    box: tuple[int, int, int, int] | None = None


def draw(seed: int, step: int, *, mix_up: float | None, cutmix: float | None, switch: float, side: int) -> Mix:
    """Return how global batch `step` is mixed: a function of (seed, step).

    Args:
        mix_up, cutmix: alpha of the Beta distribution of each; None: off.
        switch: probability of CutMix if both are on.
        side: height and width of a clip in pixels.
    """
    if cutmix is not None:
        is_cut, area, y, x = cut(seed, step, cutmix)
        if mix_up is None or is_cut < switch:
            # The box has the drawn area around a centre anywhere in the frame; lam counts the part inside the frame.
            width = int(side * math.sqrt(1 - area))
            y1, y2, x1, x2 = (
                min(max(int(centre * side) + offset, 0), side)
                for centre in (y, x)
                for offset in (-(width // 2), (width + 1) // 2)
            )

            return Mix(1 - (y2 - y1) * (x2 - x1) / side**2, (y1, y2, x1, x2))

    return Mix(float(draws.generator(seed, step, _MIXUP).beta(mix_up, mix_up))) if mix_up is not None else Mix()


def cut(seed: int, step: int, alpha: float) -> tuple[float, float, float, float]:
    """Draw for CutMix of global batch `step`.

    Returns:
        (whether to cut, share of the area that stays, centre y, centre x): the share follows Beta(alpha, alpha), the
        others are uniform in [0, 1).
    """
    generator = draws.generator(seed, step, _CUTMIX)
    whether, y, x = generator.random(3).tolist()
    return whether, float(generator.beta(alpha, alpha)), y, x


def apply(clips: Tensor, how: Mix) -> Tensor:
    """Mix clips with their neighbours: ``lam * clip + (1 - lam) * neighbour``, or the neighbour's pixels in a box.

    Args:
        clips: (B, C, T, H, W) float, B even; not changed.
        how: from `draw`.

    Returns:
        The same shape, dtype and memory layout.

    Raises:
        ValueError: B is odd: the last clip has no neighbour.
    """
    if how.lam == 1.0:
        return clips
    if len(clips) % 2:
        raise ValueError(f"mixup needs an even number of clips, got {len(clips)}")

    if how.box is not None:
        y1, y2, x1, x2 = how.box
        mixed = clips.clone()
        mixed[0::2, ..., y1:y2, x1:x2] = clips[1::2, ..., y1:y2, x1:x2]
        mixed[1::2, ..., y1:y2, x1:x2] = clips[0::2, ..., y1:y2, x1:x2]
        return mixed

    # Both products first: the sums in place must not read rows that have already changed.
    mixed, other = clips * how.lam, clips * (1 - how.lam)
    mixed[0::2] += other[1::2]
    mixed[1::2] += other[0::2]
    return mixed


def partner(labels: Tensor) -> Tensor:
    """Return the neighbours' labels: (B, ...), B even -> (B, ...) with rows 2j and 2j + 1 exchanged."""
    return labels.view(-1, 2, *labels.shape[1:]).flip(1).view(labels.shape)  # (B, ...) -> (B/2, 2, ...) -> (B, ...)
