"""Errors of weights files. The readers raise them without the path, and `utils.weights_file.read` adds it."""

from __future__ import annotations

from pathlib import Path

from utils.errors import UserError

_KINDS = {
    ".safetensors": "safetensors file",
    ".pkl": "pickle of NumPy arrays",
    ".pdparams": "pickle of NumPy arrays",
}


class Flaw(Exception):
    """The bytes of a file contradict its format. The text is the reason in a few words."""


class Unwanted(Exception):
    """A pickle names something that is not needed to describe tensors. The text is its full name."""


class DamagedWeights(UserError):
    """A file that is not a complete weights file.

    Args:
        path: the file.
        reason: the defect in a few words.
    """

    def __init__(self, path: Path, reason: str) -> None:
        kind = _KINDS.get(path.suffix, "weights file")
        super().__init__(f"{path} is not a whole {kind} ({reason}); get another copy of it")
        self.path = path
        self.reason = reason


class Forbidden(UserError):
    """The file names something that would have to be run or built to read it."""
