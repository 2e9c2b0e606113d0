"""Colour jitter with the ranges of torchvision's ColorJitter (`augmentation.colorjitter`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from utils.config import Config


@dataclass(frozen=True)
class ColorJitter:
    """Rows: (F, 8) float64, factors of brightness, contrast, saturation, then the shift of hue, then the four
    operations (0..3 in that numbering) in the order in which to apply them.

    Args:
        strengths: of brightness, contrast, saturation, hue.
        per_frame: one jitter per frame instead of one per clip.
    """

    strengths: tuple[float, ...]
    per_frame: bool = False
    block: ClassVar[int] = 4
    uniforms: ClassVar[int] = 8
    neutral: ClassVar[np.ndarray] = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0])

    def resolve(self, u: NDArray[np.float64], side: int) -> NDArray[np.float64]:
        """See `Op`."""
        *factors, hue = self.strengths
        low = np.array([*(max(0.0, 1 - strength) for strength in factors), -hue])
        high = np.array([*(1 + strength for strength in factors), hue])
        rows = np.empty_like(u)
        rows[:, :4] = low + u[:, :4] * (high - low)
        rows[:, 4:] = np.argsort(u[:, 4:], axis=1, kind="stable")
        return rows


def from_config(cfg: Config) -> ColorJitter | None:
    """See the package."""
    recipe = cfg.augmentation
    return None if recipe.colorjitter is None else ColorJitter(recipe.colorjitter, recipe.colorjitter_per_frame)
