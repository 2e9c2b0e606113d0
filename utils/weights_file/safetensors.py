"""Read `.safetensors` files. The header is checked against the file's size before anything is allocated."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from utils.errors import UserError
from utils.weights_file.flaws import DamagedWeights, Flaw

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_HEADER = 16 << 20  # bytes; a tensor takes about 100
_BITS = {  # of an item
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32,
    "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def load(path: Path) -> dict[str, Tensor]:
    """Return the tensors by name.

    Raises:
        DamagedWeights: the header and the file contradict each other.
        UserError: the library is not installed.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path}: reading it needs safetensors: pip install safetensors") from error

    try:
        with path.open("rb") as file:
            check(file, os.fstat(file.fileno()).st_size)
        return load_file(path)
    except (Flaw, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise DamagedWeights(path, str(error)[:200]) from error


def check(file: BinaryIO, size: int) -> None:
    """Check the header: tensors of known types that fill the rest of the file without gaps or overlaps.

    Raises:
        Flaw: the header is damaged, or does not fit the file.
    """
    # 8 bytes with the length of the header, then the header, then the tensors
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise Flaw("its header is longer than the file, or than a header can be")

    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Flaw("its header is damaged") from error

    if not isinstance(header, dict):
        raise Flaw("its header is damaged")
    header.pop("__metadata__", None)

    # In the order of the bytes, each tensor must begin where the one before it ends
    at = 0
    for begin, end in sorted(_place(name, entry) for name, entry in header.items()):
        if begin != at:
            raise Flaw("its tensors leave gaps or overlap")
        at = end
    if 8 + length + at != size:
        raise Flaw(f"its tensors need {8 + length + at} bytes, but the file has {size}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of an object; raise ValueError if two have the same name."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("two entries with the same name")
    return entries


def _place(name: str, entry: Any) -> tuple[int, int]:
    """Return the begin and end of a tensor's bytes, after comparing them with its shape."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Flaw(f"its header does not describe {name[:100]!r}")

    shape, place = entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(place, list) and len(place) == 2
    if not lists or not all(type(number) is int and number >= 0 for number in [*shape, *place]):
        raise Flaw(f"its header does not describe {name[:100]!r}")

    bits = _BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if bits is None:
        raise Flaw(f"{name[:100]!r} is of an unknown type")
    if len(shape) > 64 or math.prod(shape) * bits != 8 * (place[1] - place[0]):
        raise Flaw(f"the shape of {name[:100]!r} does not fit its bytes")
    return place[0], place[1]
