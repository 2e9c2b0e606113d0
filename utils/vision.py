"""Import torchvision. No other file imports it.

Its compiled operators fit one build of torch. They cannot be loaded with another build of the same version (the CPU
build, if the package index has torchvision for CUDA only). `import torchvision` then fails, because it adds fake
kernels to operators that do not exist. Its networks and transforms need none of these operators.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

# The operators to which torchvision adds fake kernels even if its compiled part is missing.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a library that is garbage-collected removes its operators


def load(name: str = "torchvision") -> ModuleType:
    """Import torchvision, or one of its modules, with any build of torch.

    Args:
        name: dotted name, "torchvision" or "torchvision.models".

    Raises:
        ImportError: torchvision is not installed or is broken.
    """
    _declare_missing_operators()
    return importlib.import_module(name)


@functools.cache
def has_compiled_operators() -> bool:
    """Return True if torchvision's compiled part fits this build of torch. Loads it."""
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations or () if spec else ()

    for file in (file for folder in folders for file in sorted(Path(folder).glob("_C*.so"))):
        # Loading is the only test: the file exists in either case, with symbols that this torch may lack.
        try:
            torch.ops.load_library(str(file))
        except (ImportError, OSError):
            continue
        return True

    return False


@functools.cache
def _declare_missing_operators() -> None:
    if has_compiled_operators():
        return

    library = torch.library.Library("torchvision", "FRAGMENT")
    _declared.append(library)
    for schema in _SCHEMAS:
        try:
            library.define(schema)
        except RuntimeError as error:  # another package has declared it for the same reason
            if "same name" not in str(error):
                raise
