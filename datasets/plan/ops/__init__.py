"""Augmentations as parts: how each is drawn. NAME.py here, and NAME.py in `utils/ops/`, which applies it on the device.

A new augmentation is these two files and its keys in the schema. The file here holds one frozen dataclass with what
`Op` lists, and `from_config(cfg)`, which returns it, or None if the configuration switches it off.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from utils.config import Config


class Op(Protocol):
    """One augmentation with its parameters.

    Attributes:
        block: the purpose of its uniforms (order.py), and its place in the order of application within a stage. 1 and 2
            are used by plan/train.py, 3 and above by the files here; a test keeps them apart. Never change it:
            switching one augmentation on leaves the draws of the others as they are.
        uniforms: how many numbers one row takes, the same for every video.
        neutral: the row that changes nothing, with the type of all rows.
        per_frame: draw a row for each frame, not one for the clip.
    """

    block: ClassVar[int]

    @property
    def uniforms(self) -> int:
        """See above."""
        ...

    @property
    def neutral(self) -> np.ndarray:
        """See above."""
        ...

    @property
    def per_frame(self) -> bool:
        """See above."""
        ...

    def resolve(self, u: NDArray[np.float64], side: int) -> np.ndarray:
        """Turn (F, uniforms) numbers in [0, 1) into (F, ...) rows for a clip of `side` pixels; see `neutral`."""
        ...


def from_config(cfg: Config) -> dict[str, Op]:
    """Return the augmentations that a configuration switches on, by name, in the order of application."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    ops = {name: importlib.import_module(f"{__name__}.{name}").from_config(cfg) for name in names}
    return dict(sorted(((name, op) for name, op in ops.items() if op is not None), key=lambda item: item[1].block))
