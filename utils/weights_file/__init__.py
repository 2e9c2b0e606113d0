"""Open any weights file: `read(path)`. Every reader of weights uses it; all that it returns has been verified.

| format | recognised by | verified |
|---|---|---|
| `torch.save`, zip | `PK` at its beginning or its end record | structure, checksum of each member, pickle, storages |
| `torch.save` before 1.6 | its magic number | pickles, length of each storage (the format has no checksum) |
| safetensors | its name | header against the size of the file (no checksum) |
| pickle of NumPy arrays | anything else | pickle, arrays against their bytes (no checksum) |

A file of one format is never tried as another. No file can run code or make its reader allocate more than a small
multiple of the file's size.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from utils.errors import UserError
from utils.weights_file import archive, arrays, opcodes, safetensors
from utils.weights_file.flaws import DamagedWeights, Flaw, Forbidden, Unwanted

__all__ = ["DamagedWeights", "Forbidden", "check_written", "glance", "is_checkpoint", "kind_of", "read", "read_archive"]

_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the number 0x1950a86a20f9469cfc6c
_TAIL = 22  # bytes of a zip's end record
_DEEPEST = 100  # containers in containers
_MOST_PARTS = 10_000_000  # values; a shared one counts as often as it is reached


def read(path: Path) -> Any:
    """Return the content of a weights file: plain containers and values with tensors (on the CPU) or arrays.

    Raises:
        DamagedWeights: it is damaged, contradicts itself, or is not a weights file.
        Forbidden: it names something that would have to be run to read it.
        UserError: the file does not exist.
    """
    path = Path(path)
    readers = {"zip": _read_zip, "legacy": _read_legacy, "pickle": arrays.load}
    with opened(path) as (file, size), _named(path):
        kind = kind_of(path, file, size)
        return safetensors.load(path) if kind == "safetensors" else readers[kind](file, size)


def read_archive(path: Path) -> object:
    """Return the content of a file in torch's zip format, in which every checkpoint is written.

    Raises:
        DamagedWeights: as in `read`, and if the file has a different format.
        Forbidden: as in `read`.
        UserError: the file does not exist.
    """
    path = Path(path)
    with opened(path) as (file, size), _named(path):
        if kind_of(path, file, size) != "zip":
            raise Flaw("it is not in torch's zip format")
        return _read_zip(file, size)


def glance(path: Path) -> object:
    """Return the content of a file in torch's zip format, for its plain values. Its tensors are not verified.

    Raises:
        DamagedWeights, Forbidden, UserError: as in `read_archive`, for all but the bytes of the tensors.
    """
    path = Path(path)
    with opened(path) as (file, size), _named(path):
        if kind_of(path, file, size) != "zip":
            raise Flaw("it is not in torch's zip format")
        # mmap: the bytes of the tensors are not even read
        _check_content(file, size, archive.members(file, size))
        return _PlainCopy().value(_torch_load(path, mmap=True))


def check_written(path: Path) -> None:
    """Check a file that `torch.save` just wrote, without building its tensors.

    Raises:
        DamagedWeights: its bytes are not the bytes that were written.
        Forbidden: it contains values that `read` would refuse.
    """
    with opened(path) as (file, size), _named(path):
        members = archive.members(file, size)
        archive.verify(file, members)
        try:
            _check_content(file, size, members)
        except Flaw as error:  # the bytes are right, but the values cannot be read again
            raise Unwanted(str(error)) from error


def kind_of(path: Path, file: BinaryIO, size: int) -> str:
    """Return the format: "zip", "legacy", "safetensors" or "pickle". Damage at one end does not change it."""
    if path.suffix == ".safetensors":
        return "safetensors"
    # A zip file is recognised by its first bytes or, if they are damaged, by its end record
    file.seek(0)
    head = file.read(len(_MAGIC))
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    file.seek(0)

    if archive.looks_like_one(head, tail):
        return "zip"
    return "legacy" if head == _MAGIC else "pickle"


def is_checkpoint(content: object) -> TypeGuard[dict[str, Any]]:
    """Return True for the content of a checkpoint that a run of this program wrote."""
    if not isinstance(content, Mapping) or not isinstance(config := content.get("config"), Mapping):
        return False
    # Parts that other code reads without a check
    if not isinstance(config.get("precise_bn") or {}, Mapping):
        return False
    if not isinstance(config.get("ema") or 0.0, int | float):
        return False
    parts = [content.get("model"), content.get("ema") or {}, content.get("precise_bn") or {}]
    return all(isinstance(part, Mapping) and all(map(_is_tensor_of, part.items())) for part in parts)


def _is_tensor_of(entry: tuple[object, object]) -> bool:
    return isinstance(entry[0], str) and isinstance(entry[1], Tensor)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file that is not empty; refuse a FIFO, device or folder before it is opened.

    Raises:
        DamagedWeights: it is a different kind of file, is empty, or cannot be read to its end.
        UserError: the file does not exist, or may not be read.
    """
    try:
        # `stat` first: opening a FIFO would wait for a writer
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DamagedWeights(path, "not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise DamagedWeights(path, "the file is empty")
            yield file, size
    except FileNotFoundError:
        if os.path.islink(path):
            raise DamagedWeights(path, "a link to nowhere") from None
        raise UserError(f"{path}: no such file") from None
    except PermissionError:
        raise UserError(f"{path}: this user may not read it; change its permissions or those of its folders") from None
    except OSError as error:
        raise DamagedWeights(path, error.strerror or str(error)) from error


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the path to errors of the readers."""
    try:
        yield
    except Unwanted as error:
        raise Forbidden(
            f"{path} holds more than tensors, arrays and plain values: it names {error}, which is never run; "
            "the file was not loaded"
        ) from error
    except Flaw as error:
        raise DamagedWeights(path, str(error)) from error


def _read_zip(file: BinaryIO, size: int) -> object:
    members = archive.members(file, size)
    archive.verify(file, members)
    _check_content(file, size, members)
    return _PlainCopy().value(_torch_load(file))


def _check_content(file: BinaryIO, size: int, members: Mapping[str, archive.Member]) -> None:
    """Check the pickle and the lengths of the storages."""
    tops = {name.partition("/")[0] for name in members}
    top = next(iter(tops), "")
    if len(tops) != 1 or f"{top}/data.pkl" not in members:
        raise Flaw("a zip file, but not one that torch.save wrote")
    if f"{top}/constants.pkl" in members:
        raise Unwanted("the program of a TorchScript archive")

    def storage(key: str, items: int, item_size: int) -> None:
        member = members.get(f"{top}/data/{key}")
        # torch does not compare the two: it would read the bytes behind a storage that is too short
        if member is None or member.size != items * item_size:
            raise Flaw(f"the storage {key[:20]} has a different length than its tensors")

    data = archive.content(file, members[f"{top}/data.pkl"])
    opcodes.check(io.BytesIO(data), len(data), names="torch", size=size, protocol=2, storages=storage)


def _read_legacy(file: BinaryIO, size: int) -> object:
    """Read five pickles (magic number, version, system, content, order of storages), then the storages."""
    file.seek(0)
    lengths: dict[str, tuple[int, int]] = {}

    def storage(key: str, items: int, item_size: int) -> None:
        if items * item_size > size or lengths.setdefault(key, (items, item_size)) != (items, item_size):
            raise Flaw(f"the storage {key[:20]} has a different length than its tensors")

    # Check all five without building anything; `storage` collects the lengths that the content needs
    parts = [opcodes.check(file, size, names="torch", size=size, protocol=2, storages=storage) for _ in range(5)]
    order = parts[4]

    # The content and the list must name the same storages, and the file must contain exactly these
    if parts[1] != 1001 or not isinstance(order, list) or not all(isinstance(key, str) for key in order):
        raise Flaw("not one of torch's older format")
    if len(set(order)) < len(order) or set(order) != lengths.keys():
        raise Flaw("a list of storages that are not those of its tensors")

    for key in order:
        items, item_size = lengths[key]
        written = file.read(8)
        if len(written) < 8 or struct.unpack("<q", written)[0] != items or file.tell() + items * item_size > size:
            raise Flaw(f"the storage {key[:20]} is cut off or damaged")
        file.seek(items * item_size, os.SEEK_CUR)

    if file.tell() != size:
        raise Flaw("bytes after its last storage")
    return _PlainCopy().value(_torch_load(file))


def _torch_load(file: BinaryIO | Path, *, mmap: bool = False) -> object:
    """Let torch build the content of a file that has been checked."""
    if not isinstance(file, Path):
        file.seek(0)
    try:
        # torch warns about old storage types, which the user of the file cannot change
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # noqa: BLE001  damaged bytes make torch raise almost anything
        lines = str(error).strip().splitlines()
        raise Flaw(f"{type(error).__name__}: {lines[0][:200] if lines else ''}") from error


class _PlainCopy:
    """Copies containers into plain ones: a pickle can give an ordered dict attributes that hide its methods."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[object, int]] = {}
        self.open: set[int] = set()

    def value(self, value: object) -> object:
        """Return the plain value.

        Raises:
            Flaw: it contains itself, is nested too deeply, or sharing turns a small file into a huge value.
        """
        return self._part(value, 0)[0]

    def _part(self, value: object, depth: int) -> tuple[object, int]:
        """Return the plain value and the number of its parts."""
        if not isinstance(value, dict | list | tuple):
            return value, 1
        if id(value) in self.done:
            return self.done[id(value)]

        if depth > _DEEPEST or id(value) in self.open:
            raise Flaw("containers that are nested too deeply or hold themselves")

        # `dict.values`, not `value.values`: the pickle may have replaced the method
        self.open.add(id(value))
        items = dict.values(value) if isinstance(value, dict) else value
        parts = [self._part(item, depth + 1) for item in items]
        number = 1 + sum(part[1] for part in parts)
        if number > _MOST_PARTS:
            raise Flaw("containers that share parts so often that it has too many values")

        values = [part[0] for part in parts]
        if isinstance(value, dict):
            copy: object = dict(zip(dict.keys(value), values, strict=True))
        else:
            copy = tuple(values) if isinstance(value, tuple) else values
        # Shared containers stay shared in the copy
        self.open.discard(id(value))
        self.done[id(value)] = copy, number
        return self.done[id(value)]
