"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) with timm's policy (`augmentation.randaugment`).

A policy is a text such as rand-m7-n4-mstd0.5-inc1: n operations of 15 with replacement, each applied with probability
p (.5), at a normally distributed magnitude with mean m and standard deviation mstd, clipped to 0..10. Operations that
have a direction go either way with even odds. With inc1 every operation grows stronger with the magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from utils.config.kinds import RandPolicy, rand_policy

if TYPE_CHECKING:
    from utils.config import Config

#: Names of the operations; the number of an operation is its place here, NONE for none.
OPERATIONS = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "saturation"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
NONE = -1
_MOST = 10.0  # the largest magnitude
_STANDARD = NormalDist()
_SMALLEST = 2.0**-54  # below every uniform but 0

# (share of the largest magnitude 0..1, sign, side of the clip) -> argument of an operation.
_Argument = Callable[[float, float, int], float]
_BOTH: dict[str, _Argument] = {
    "rotate": lambda share, sign, side: 30 * share * sign,  # degrees, counter-clockwise
    "solarize_add": lambda share, sign, side: min(128, int(110 * share)),  # to values below 128
    "shear_x": lambda share, sign, side: 0.3 * share * sign,
    "shear_y": lambda share, sign, side: 0.3 * share * sign,
    "translate_x": lambda share, sign, side: 0.45 * share * sign * side,  # pixels
    "translate_y": lambda share, sign, side: 0.45 * share * sign * side,
}
_INCREASING = _BOTH | {
    "posterize": lambda share, sign, side: 4 - int(4 * share),  # bits that stay
    "solarize": lambda share, sign, side: 256 - min(256, int(256 * share)),  # values from here on are inverted
    **dict.fromkeys(
        ("saturation", "contrast", "brightness", "sharpness"),
        lambda share, sign, side: max(0.1, 1 + 0.9 * share * sign),  # 1 changes nothing
    ),
}
_AS_PUBLISHED = _BOTH | {
    "posterize": lambda share, sign, side: int(4 * share),
    "solarize": lambda share, sign, side: min(256, int(256 * share)),
    **dict.fromkeys(("saturation", "contrast", "brightness", "sharpness"), lambda share, sign, side: 1.8 * share + 0.1),
}


@dataclass(frozen=True)
class RandAugment:
    """Rows: (F, n, 2) float64, number of the operation and its argument, in the order in which to apply them.

    Args:
        policy: parsed from the text.
        per_frame: different operations for each frame instead of the same for the clip.
    """

    policy: RandPolicy
    per_frame: bool = False
    block: ClassVar[int] = 6

    @property
    def uniforms(self) -> int:
        """Which operation, whether, how strong, which way: for each of n."""
        return 4 * self.policy.n

    @property
    def neutral(self) -> NDArray[np.float64]:
        """See `Op`."""
        return np.tile([float(NONE), 0.0], (self.policy.n, 1))

    def resolve(self, u: NDArray[np.float64], side: int) -> NDArray[np.float64]:
        """See `Op`."""
        arguments = _INCREASING if self.policy.inc else _AS_PUBLISHED
        rows = np.tile(self.neutral, (len(u), 1, 1))
        for frame, place in np.argwhere(u.reshape(len(u), -1, 4)[:, :, 1] < self.policy.p):
            which, _, strength, direction = u[frame, 4 * place : 4 * place + 4].tolist()
            number = int(which * len(OPERATIONS))
            magnitude = self.policy.m + self.policy.mstd * _STANDARD.inv_cdf(max(strength, _SMALLEST))
            share, sign = min(max(magnitude, 0.0), _MOST) / _MOST, 1.0 if direction < 0.5 else -1.0
            argument = arguments.get(OPERATIONS[number])
            rows[frame, place] = number, argument(share, sign, side) if argument else 0.0
        return rows


def from_config(cfg: Config) -> RandAugment | None:
    """See the package."""
    recipe = cfg.augmentation
    if recipe.randaugment is None:
        return None
    return RandAugment(rand_policy(recipe.randaugment), recipe.randaugment_per_frame)
