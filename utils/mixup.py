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
        is_cut, area, y, x = draws.cut(seed, step, cutmix)
        if mix_up is None or is_cut < switch:
            # The box has the drawn area around a centre anywhere in the frame; lam counts the part inside the frame.
            width = int(side * math.sqrt(1 - area))
            y1, y2, x1, x2 = (
                min(max(int(centre * side) + offset, 0), side)
                for centre in (y, x)
                for offset in (-(width // 2), (width + 1) // 2)
            )

            return Mix(1 - (y2 - y1) * (x2 - x1) / side**2, (y1, y2, x1, x2))

    return Mix(draws.beta(seed, step, mix_up)) if mix_up is not None else Mix()


def apply(clips: Tensor, how: Mix) -> Tensor:
    """Return clips (B, C, T, H, W), B even, mixed with their neighbours; the input is not changed."""
    if how.lam == 1.0:
        return clips
    return mix(clips, how.lam) if how.box is None else exchange(clips, how.box)


def exchange(clips: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Exchange a box (y1, y2, x1, x2) of all frames with the neighbour's; keep shape, dtype and memory layout."""
    _require_pairs(clips)
    y1, y2, x1, x2 = box
    out = clips.clone()
    out[0::2, ..., y1:y2, x1:x2] = clips[1::2, ..., y1:y2, x1:x2]
    out[1::2, ..., y1:y2, x1:x2] = clips[0::2, ..., y1:y2, x1:x2]
    return out


def mix(clips: Tensor, lam: float) -> Tensor:
    """Return ``lam * clip + (1 - lam) * neighbour``.

    Args:
        clips: (B, ...) float, B even; not changed.
        lam: weight of a clip itself, 0..1.

    Returns:
        The same shape, dtype and memory layout.
    """
    _require_pairs(clips)
    # Both products first: the sums in place must not read rows that have already changed.
    mixed, other = clips * lam, clips * (1 - lam)
    mixed[0::2] += other[1::2]
    mixed[1::2] += other[0::2]
    return mixed


def partner(labels: Tensor) -> Tensor:
    """Return the neighbours' labels: (B, ...) -> (B, ...) with rows 2j and 2j + 1 exchanged."""
    _require_pairs(labels)
    return labels.view(-1, 2, *labels.shape[1:]).flip(1).view(labels.shape)  # (B, ...) -> (B/2, 2, ...) -> (B, ...)


def _require_pairs(rows: Tensor) -> None:
    # An odd clip has no neighbour.
    if len(rows) % 2:
        raise ValueError(f"mixup needs an even number of clips, got {len(rows)}")
