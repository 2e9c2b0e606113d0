"""Part files of an evaluation: a zip of arrays as numpy writes it, with its owner and a checksum over all members.

A zip has a CRC of each member, which a reader that stops early never compares, and none of its own headers. So every
part carries the sha256 of names, types, shapes and bytes of all arrays, and a reader compares it before it uses one.
"""

from __future__ import annotations

import hashlib
import io
import stat
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from utils import files

COLUMNS = ("samples", "failed", "repaired", "logits", "frames", "boxes")
_HEADER_BYTES = 65536  # largest header of an array


class Damaged(Exception):  # noqa: N818 (the state of a file)
    """A part file that cannot be used.

    Args:
        path: the file.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: a damaged part of an evaluation ({reason})")
        self.path, self.reason = path, reason


class Stranger(Damaged):
    """A whole part file of another evaluation."""


def write(path: Path, arrays: dict[str, np.ndarray], owner: bytes) -> None:
    """Write a part file; it is there whole or not at all.

    Args:
        path: its name, `part-*.npz`.
        arrays: `samples` (n,) int64, `failed` and `repaired` (n,) text, of the m videos that did not fail `logits`
            (m, V, K) and `frames` (m, V, T), of one of them `boxes` (V, 4).
        owner: 32 bytes, which evaluation it is of.

    Raises:
        OSError: the file system does not take it; an earlier file of this name stays.
    """
    with files.replacing(path, temporary=path.with_suffix(".tmp")) as temporary, temporary.open("wb") as file:
        store(file, arrays, owner)


def store(file: IO[bytes], arrays: dict[str, np.ndarray], owner: bytes) -> None:
    """Write the bytes of a part file into an open one; arguments as of `write`."""
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in COLUMNS}
    marks = {"owner": np.frombuffer(owner, np.uint8), "sha256": np.frombuffer(_digest(arrays, owner), np.uint8)}
    np.savez(file, **arrays, **marks)  # pyright: ignore[reportArgumentType]


def read(path: Path, owner: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a part file, every byte of them checked; shapes as in `write`.

    Raises:
        Stranger: it is a part of another evaluation.
        Damaged: it is no whole part file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Damaged(path, "not a regular file")
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            found = {name: _array(archive, name) for name in (*COLUMNS, "owner", "sha256")}
    except Damaged:
        raise
    except Exception as error:  # damaged bytes make zipfile and numpy raise almost anything
        raise Damaged(path, str(error) or type(error).__name__) from error

    claimed, digest = found.pop("owner").tobytes(), found.pop("sha256").tobytes()
    if _digest(found, claimed) != digest:
        raise Damaged(path, "wrong checksum")
    if claimed != owner:
        raise Stranger(path, "it belongs to an evaluation with other settings")
    if not _fits(found):
        raise Damaged(path, "its arrays do not fit together")
    return found


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return one member; a header that claims more than there is costs no memory."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    data = archive.read(info)  # to its end, so that its CRC is compared

    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream, max_header_size=_HEADER_BYTES)
    if dtype.hasobject or fortran and len(shape) > 1:
        raise ValueError(f"{name} is of a kind that no part has")
    return np.frombuffer(data[stream.tell() :], dtype).reshape(shape).copy()  # a copy can be written to


def _digest(arrays: dict[str, np.ndarray], owner: bytes) -> bytes:
    digest = hashlib.sha256(owner)
    for name in COLUMNS:
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data if array.nbytes else b"")
    return digest.digest()


def _fits(part: dict[str, np.ndarray]) -> bool:
    """Return True if the lengths and kinds of the arrays are those of a part."""
    kinds = {"samples": "i1", "failed": "U1", "repaired": "U1", "logits": "f3", "frames": "i3", "boxes": "i2"}
    if any(f"{part[name].dtype.kind}{part[name].ndim}" != kind for name, kind in kinds.items()):
        return False

    lengths = {len(part[name]) for name in ("samples", "failed", "repaired")}
    good = int((part["failed"] == "").sum())
    boxes = (part["logits"].shape[1], 4) if good else (0, 4)
    return (
        len(lengths) == 1
        and len(part["logits"]) == good
        and part["frames"].shape[:2] == part["logits"].shape[:2]
        and part["boxes"].shape == boxes
    )
