"""Records: what a list file says of each video, in columns that all processes of a machine share.

A million records take one block of paths, one array of 8-byte offsets and three of 4-byte numbers. `share` puts them
into anonymous memory (memfd) that worker processes map read-only: they cost memory once, and nothing is copied.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.class_names import read_class_names
from datasets.list_formats import place_of, read_list
from utils.faults import UserError

__all__ = ["Records", "read_class_names"]

_MAGIC = b"ZOERECS1"
_ALIGN = 64


class Records:
    """The samples of one list, in its order. Make them with `load` or `from_fd`.

    Attributes:
        labels: (N,) int32 class numbers.
        frames: (N,) int32 number of frames, -1 where the list does not say.
        starts: (N,) int32 first frame (the `offset` column), 0 where the list does not say.
        list_hash: sha256 of the list file, hexadecimal.
        list_file: its path.
        root: folder of the paths, absolute.
        duplicates: records that repeat an earlier one (same path and start); they are allowed.
    """

    def __init__(self, columns: dict[str, NDArray[Any]], info: dict[str, Any]) -> None:
        self._fd: int | None = None
        self._info = info
        self.list_hash: str = info["list_hash"]
        self.list_file: str = info["list_file"]
        self.root: str = info["root"]
        self.duplicates: int = info["duplicates"]
        self._use(columns)

    def _use(self, columns: dict[str, NDArray[Any]]) -> None:
        self._paths: NDArray[np.uint8] = columns["paths"]
        self._ends: NDArray[np.int64] = columns["ends"]
        self.labels: NDArray[np.int32] = columns["labels"]
        self.frames: NDArray[np.int32] = columns["frames"]
        self.starts: NDArray[np.int32] = columns["starts"]

    @classmethod
    def load(cls, list_file: str | os.PathLike[str], root: str | os.PathLike[str], *, num_class: int | None) -> Records:
        """Read a list file in any layout of `list_formats`.

        Args:
            list_file: its path.
            root: folder that the paths in it start from; they may not lead out of it.
            num_class: labels must be in 0..num_class-1; None accepts any label from 0 on.

        Raises:
            UserError: whatever is wrong with the list, with file, line and what was expected.
        """
        file, base = os.fspath(list_file), os.path.abspath(os.fspath(root))
        raw = read_list(file, base)
        count, duplicates = len(raw.labels), raw.duplicates()
        columns: dict[str, NDArray[Any]] = {
            "paths": np.frombuffer(raw.paths, np.uint8),
            "ends": np.frombuffer(raw.ends, np.int64),
            "labels": np.frombuffer(raw.labels, np.int32),
            "frames": np.frombuffer(raw.frames, np.int32) if raw.frames else np.full(count, -1, np.int32),
            "starts": np.frombuffer(raw.starts, np.int32) if raw.starts else np.zeros(count, np.int32),
        }
        _check_labels(file, columns["labels"], num_class)
        return cls(columns, {"list_hash": _sha256(file), "list_file": file, "root": base, "duplicates": duplicates})

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """Path of record i as the list has it; bytes that are not UTF-8 stand as surrogate escapes."""
        return os.fsdecode(self._paths[self._ends[i] : self._ends[i + 1]].tobytes())

    def full_path(self, i: int) -> str:
        """Path of record i below the root."""
        return os.path.join(self.root, self.path(i))

    def share(self) -> int:
        """Put all columns into anonymous shared memory and use them from there.

        Returns:
            A file descriptor for `from_fd`, valid as long as these records live. Pass it to a child with `pass_fds`.
        """
        if self._fd is None:
            fd = os.memfd_create("zoetrope-records", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            weakref.finalize(self, os.close, fd)
            _write(fd, self._columns(), self._info)
            # Nobody can change or cut what others have mapped, not even by mistake.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._use(_map(fd)[0])  # gives the private copy back
            self._fd = fd
        return self._fd

    @classmethod
    def from_fd(cls, fd: int) -> Records:
        """Map records that another process shared: read-only and without a copy. The descriptor may be closed after."""
        return cls(*_map(fd))

    def _columns(self) -> dict[str, NDArray[Any]]:
        return {
            "paths": self._paths,
            "ends": self._ends,
            "labels": self.labels,
            "frames": self.frames,
            "starts": self.starts,
        }


def _write(fd: int, columns: dict[str, NDArray[Any]], info: dict[str, Any]) -> None:
    """Magic, length of the header, header (JSON: dtype and length of each column, then info), columns; each aligned."""
    layout = {name: [column.dtype.str, len(column)] for name, column in columns.items()}
    # Paths on this machine need not be UTF-8; JSON keeps their surrogate escapes as \udcXX.
    header = json.dumps({"columns": layout, "info": info}).encode("ascii")
    with open(os.dup(fd), "wb") as f:
        f.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        for column in columns.values():
            f.write(bytes(-f.tell() % _ALIGN))
            f.write(column.data)


def _map(fd: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    if memory[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"file descriptor {fd} holds no records")
    size = int.from_bytes(memory[8:16], "little")
    header = json.loads(memory[16 : 16 + size])
    columns: dict[str, NDArray[Any]] = {}
    at = 16 + size
    for name, (dtype, length) in header["columns"].items():
        at += -at % _ALIGN
        columns[name] = np.frombuffer(memory, np.dtype(dtype), length, at)
        at += columns[name].nbytes
    return columns, header["info"]


def _sha256(file: str) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_labels(file: str, labels: NDArray[np.int32], num_class: int | None) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low >= 0 and (num_class is None or high < num_class):
        return
    top = np.iinfo(np.int32).max if num_class is None else num_class - 1
    first = int(np.flatnonzero((labels < 0) | (labels > top))[0])
    said = f"{place_of(file, first)}: label {labels[first]} is outside 0..{top}"
    if num_class is not None and low == 1 and high == num_class:
        said += f"; the labels of this list run from 1 to {high}: subtract 1 from each"
    elif high > top:
        said += f"; the largest label here is {high}, so num_class must be at least {high + 1}, not {num_class}"
    else:
        said += "; labels start at 0"
    raise UserError(said)
