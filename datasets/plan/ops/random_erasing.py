"""Random erasing (Zhong et al., AAAI 2020, algorithm 1; `augmentation.random_erasing`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from utils.config import Config

_TRIES = 100


@dataclass(frozen=True)
class RandomErasing:
    """Rows: (F, 4) int64, y, x, h, w in the clip after the flip; h = 0 if nothing is erased.

    Args:
        numbers: (p, sl, sh, r1): probability, smallest and largest share of the area, smallest aspect.
        per_frame: one erased box per frame instead of one per clip.
    """

    numbers: tuple[float, ...]
    per_frame: bool = False
    block: ClassVar[int] = 5
    uniforms: ClassVar[int] = 1 + 2 * _TRIES + 2  # whether, areas and aspects, y, x
    neutral: ClassVar[np.ndarray] = np.zeros(4, np.int64)
    is_log_uniform: ClassVar[bool] = False  # the aspect; False, as published: h / w itself is uniform

    def resolve(self, u: NDArray[np.float64], side: int) -> NDArray[np.int64]:
        """See `Op`."""
        p, least, most, flattest = self.numbers
        log_flattest = math.log(flattest)
        boxes = np.zeros((len(u), 4), np.int64)
        for row in np.flatnonzero(u[:, 0] < p):
            drawn = u[row, : RandomErasing.uniforms].tolist()
            for area, shape in zip(drawn[1:-2:2], drawn[2:-2:2], strict=True):
                pixels = (least + area * (most - least)) * side * side
                if self.is_log_uniform:
                    ratio = math.exp(log_flattest - 2 * shape * log_flattest)
                else:
                    ratio = flattest + shape * (1 / flattest - flattest)
                h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
                if 0 < h < side and 0 < w < side:
                    y, x = int(drawn[-2] * (side - h + 1)), int(drawn[-1] * (side - w + 1))
                    boxes[row] = (min(y, side - h), min(x, side - w), h, w)
                    break
        return boxes


@dataclass(frozen=True)
class PixelErasing(RandomErasing):
    """Erasing with noise, like timm's mode "pixel": the logarithm of the aspect is uniform.

    Rows: (F, 5) int64, y, x, h, w, and the start of the noise, 53 bits.
    """

    uniforms: ClassVar[int] = RandomErasing.uniforms + 1
    neutral: ClassVar[np.ndarray] = np.zeros(5, np.int64)
    is_log_uniform: ClassVar[bool] = True

    def resolve(self, u: NDArray[np.float64], side: int) -> NDArray[np.int64]:
        """See `Op`."""
        return np.column_stack((super().resolve(u, side), (u[:, -1] * 2**53).astype(np.int64)))


def from_config(cfg: Config) -> RandomErasing | None:
    """See the package."""
    recipe = cfg.augmentation
    if recipe.random_erasing is None:
        return None
    kind = PixelErasing if recipe.random_erasing_mode == "pixel" else RandomErasing
    return kind(recipe.random_erasing, recipe.random_erasing_per_frame)
