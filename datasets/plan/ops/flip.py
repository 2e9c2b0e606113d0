"""Mirror half of the clips, left and right (`data.flip`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from utils.config import Config


@dataclass(frozen=True)
class Flip:
    """Rows: (F, 1) bool, True mirrors."""

    block: ClassVar[int] = 3
    uniforms: ClassVar[int] = 1
    neutral: ClassVar[np.ndarray] = np.zeros(1, bool)
    per_frame: ClassVar[bool] = False

    def resolve(self, u: NDArray[np.float64], side: int) -> NDArray[np.bool_]:
        """See `Op`."""
        return u < 0.5


def from_config(cfg: Config) -> Flip | None:
    """See the package."""
    return Flip() if cfg.data.flip else None
