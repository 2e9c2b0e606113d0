"""Part files of an evaluation: zip files of arrays as numpy writes them, with owner and checksum over all members.

A zip has a CRC of each member, which a reader that stops early never compares, and no CRC of its own headers. So each
part holds the sha256 of names, types, shapes and bytes of all arrays, and a reader compares it before it uses any.
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
_HEADER_BYTES = 65536  # largest header of an array that is read


class DamagedPart(Exception):  # noqa: N818 (the state of a file)
    """A part file that cannot be used.

    Args:
        path: the file.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: a damaged part of an evaluation ({reason})")
        self.path, self.reason = path, reason


class Stranger(DamagedPart):
    """A whole part file of another evaluation."""


def write(path: Path, arrays: dict[str, np.ndarray], owner: bytes) -> None:
    """Write a part file, whole or not at all.

    Args:
        path: its name, `part-*.npz`.
        arrays: columns for n videos, of which m did not fail: `samples` (n,) int64, `failed` and `repaired` (n,) text,
            `logits` (m, V, K) and `frames` (m, V, T), and `boxes` (V, 4) of one of the m videos.
        owner: 32 bytes that identify the evaluation.

    Raises:
        OSError: the file system refuses it; an earlier file of this name stays.
    """
    with files.replacing(path, temporary=path.with_suffix(".tmp")) as temporary, temporary.open("wb") as file:
        store(file, arrays, owner)


def store(file: IO[bytes], arrays: dict[str, np.ndarray], owner: bytes) -> None:
    """Write the bytes of a part file into an open file; arguments as of `write`."""
    arrays = {name: np.ascontiguousarray(arrays[name]) for name in COLUMNS}
    # the marks are arrays too, so that every member is read in the same way
    marks = {"owner": np.frombuffer(owner, np.uint8), "sha256": np.frombuffer(_digest(arrays, owner), np.uint8)}
    np.savez(file, **arrays, **marks)  # pyright: ignore[reportArgumentType]


def read(path: Path, owner: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a part file after a check of every byte; shapes as in `write`.

    Raises:
        Stranger: it is a part of another evaluation.
        Damaged: the part file is not whole, or cannot be read.
    """
    try:
        # opening a pipe could block for ever
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedPart(path, "not a regular file")
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            arrays = {name: _array(archive, name) for name in (*COLUMNS, "owner", "sha256")}
    except DamagedPart:  # from the check above
        raise
    except Exception as error:  # damaged bytes make zipfile and numpy raise almost anything
        raise DamagedPart(path, str(error) or type(error).__name__) from error

    claimed, digest = arrays.pop("owner").tobytes(), arrays.pop("sha256").tobytes()
    # checksum before owner: a damaged owner must not look like another evaluation
    if _digest(arrays, claimed) != digest:
        raise DamagedPart(path, "wrong checksum")
    if claimed != owner:
        raise Stranger(path, "it belongs to an evaluation with other settings")
    if not _fits(arrays):
        raise DamagedPart(path, "its arrays do not fit together")
    return arrays


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return one member; a header that claims more than the file holds allocates no memory."""
    info = archive.getinfo(f"{name}.npy")
    # numpy stores without compression, so the sizes bound the memory that `read` takes
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    data = archive.read(info)  # to the end, because zipfile compares the CRC only there

    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream, max_header_size=_HEADER_BYTES)
    # objects would need pickle, and C order is what `reshape` below assumes
    if dtype.hasobject or fortran and len(shape) > 1:
        raise ValueError(f"{name} is of a kind that no part has")
    return np.frombuffer(data[stream.tell() :], dtype).reshape(shape).copy()  # writable, unlike a view of bytes


def _digest(arrays: dict[str, np.ndarray], owner: bytes) -> bytes:
    digest = hashlib.sha256(owner)
    for name in COLUMNS:
        array = np.ascontiguousarray(arrays[name])
        # names, types and shapes too: the same bytes of a different shape are another part
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        # an empty array cannot be viewed as bytes
        digest.update(array.reshape(-1).view(np.uint8).data if array.nbytes else b"")
    return digest.digest()


def _fits(part: dict[str, np.ndarray]) -> bool:
    """Return True if the lengths and kinds of the arrays are those of a part."""
    # numpy's letter of the type and the number of axes
    kinds = {"samples": "i1", "failed": "U1", "repaired": "U1", "logits": "f3", "frames": "i3", "boxes": "i2"}
    if any(f"{part[name].dtype.kind}{part[name].ndim}" != kind for name, kind in kinds.items()):
        return False

    # `logits`, `frames` and `boxes` have rows only for videos that could be read
    lengths = {len(part[name]) for name in ("samples", "failed", "repaired")}
    good = int((part["failed"] == "").sum())
    boxes = (part["logits"].shape[1], 4) if good else (0, 4)
    return (
        len(lengths) == 1
        and len(part["logits"]) == good
        and part["frames"].shape[:2] == part["logits"].shape[:2]
        and part["boxes"].shape == boxes
    )
