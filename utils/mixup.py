"""Mixup (Zhang et al. 2018, arXiv:1710.09412, eq. 1 and 2) between neighbours of the global batch.

Clip 2j is mixed with clip 2j + 1, with one lambda for the whole batch: the partner is then the same on any number of
ranks. The batch order is random already, so this draws the same pairs as a permutation would.
"""

from __future__ import annotations

from torch import Tensor


def mix(clips: Tensor, lam: float) -> Tensor:
    """``lam * clip + (1 - lam) * its neighbour``.

    Args:
        clips: (B, ...) float, B even; not changed.
        lam: weight of a clip itself, 0..1.

    Returns:
        The same shape, dtype and memory layout.
    """
    _require_pairs(clips)
    mixed, other = clips * lam, clips * (1 - lam)
    mixed[0::2] += other[1::2]
    mixed[1::2] += other[0::2]
    return mixed


def partner(labels: Tensor) -> Tensor:
    """The neighbours' labels: (B, ...) -> (B, ...) with rows 2j and 2j + 1 exchanged."""
    _require_pairs(labels)
    return labels.view(-1, 2, *labels.shape[1:]).flip(1).view(labels.shape)


def _require_pairs(rows: Tensor) -> None:
    if len(rows) % 2:
        raise ValueError(f"mixup needs an even number of clips, got {len(rows)}")
