"""The samples of a list file, in columns that all processes of a machine share.

A million records take one block of paths, one array of 8-byte offsets and three of 4-byte numbers. `share` puts them
into anonymous memory (memfd) that worker processes map read-only. They cost memory once, and nothing is copied.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datasets.lists.class_names import read_class_names
from datasets.lists.formats import is_json, place_of, read_list
from utils import files
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.config import Config

__all__ = ["Records", "read_class_names", "records_of"]

Columns = dict[str, NDArray[Any]]  # columns of records, by name
_MAGIC = b"ZOERECS1"  # begins the shared memory; the digit is its version
_ALIGN = 64  # bytes: a cache line


class Records:
    """The samples of one list, in its order. Create them with `load` or `from_fd`.

    Attributes:
        labels: (N,) int32 class numbers; the first label of a video that has several.
        frames: (N,) int32 number of frames, -1 if the list has none.
        starts: (N,) int32 first frame (the `offset` column), 0 if the list has none.
        list_hash: sha256 of the list file, hexadecimal.
        list_file: path of the list file.
        root: folder of the paths, absolute.
        duplicates: number of records that repeat an earlier one (same path and start); they are allowed.
        several: True if the list may have several labels per video.
        has_parts: True if the list has offsets: a record is then a part of its video.
    """

    def __init__(self, columns: Columns, info: files.Row) -> None:
        self._fd: int | None = None
        self._info = info
        self.list_hash: str = info["list_hash"]
        self.list_file: str = info["list_file"]
        self.root: str = info["root"]
        self.duplicates: int = info["duplicates"]
        self._num_class: int = info["num_class"]
        self.has_parts: bool = info.get("has_parts", False)
        self._use(columns)

    def _use(self, columns: Columns) -> None:
        self._paths: NDArray[np.uint8] = columns["paths"]
        self._ends: NDArray[np.int64] = columns["ends"]
        self.labels: NDArray[np.int32] = columns["labels"]
        self.frames: NDArray[np.int32] = columns["frames"]
        self.starts: NDArray[np.int32] = columns["starts"]
        self._all_labels: NDArray[np.int32] | None = columns.get("all_labels")
        self._label_ends: NDArray[np.int64] | None = columns.get("label_ends")
        self.multi_label = self._label_ends is not None

    @classmethod
    def load(
        cls,
        list_file: str | os.PathLike[str],
        root: str | os.PathLike[str],
        *,
        num_class: int | None,
        layout: str = "auto",
    ) -> Records:
        """Read a list file in any layout of `formats`.

        Args:
            list_file: path of the list file.
            root: folder that the paths in the list start from; they may not lead out of it.
            num_class: labels must be in 0..num_class-1; None accepts any label of at least 0.
            layout: `data.list_layout`: "auto", or a layout with several labels per video.

        Raises:
            UserError: the list has an error; the message has the file, the line and what was expected.
        """
        file, base = os.fspath(list_file), os.path.abspath(os.fspath(root))
        raw = read_list(file, base, layout)

        count, duplicates = len(raw.labels), raw.duplicates()
        columns: Columns = {
            # Views of the arrays that the reader filled, without a copy.
            "paths": np.frombuffer(raw.paths, np.uint8),
            "ends": np.frombuffer(raw.ends, np.int64),
            "labels": np.frombuffer(raw.labels, np.int32),
            "frames": np.frombuffer(raw.frames, np.int32) if raw.frames else np.full(count, -1, np.int32),
            "starts": np.frombuffer(raw.starts, np.int32) if raw.starts else np.zeros(count, np.int32),
        }

        if raw.label_ends:
            columns["all_labels"] = np.frombuffer(raw.all_labels, np.int32)
            columns["label_ends"] = np.frombuffer(raw.label_ends, np.int64)
        _check_labels(file, columns, num_class)

        highest = int(columns.get("all_labels", columns["labels"]).max())
        info = {"list_hash": files.sha256(file), "list_file": file, "root": base, "duplicates": duplicates}
        info["has_parts"] = bool(raw.starts) and (
            any(raw.starts) or not is_json(file)
        )  # JSON has offsets of 0 by default
        return cls(columns, info | {"num_class": highest + 1 if num_class is None else num_class})

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """Return the path of record i as the list has it; bytes that are not UTF-8 become surrogate escapes."""
        return os.fsdecode(self._paths[self._ends[i] : self._ends[i + 1]].tobytes())

    def raw_paths(self) -> Iterator[bytes]:
        """Yield the paths of all records as the list has them."""
        block, ends = self._paths.tobytes(), self._ends.tolist()
        for begin, end in zip(ends, ends[1:], strict=False):
            yield block[begin:end]

    def full_path(self, i: int) -> str:
        """Return the path of record i below the root."""
        return os.path.join(self.root, self.path(i))

    def length_of(self, i: int, frames: int) -> int:
        """Return how many of `frames` frames, counted from its start, record i has.

        A list with offsets names parts of videos. In such a list, the number of frames sets where a part ends.
        """
        listed_frames = int(self.frames[i])
        return min(listed_frames, frames) if self.has_parts and listed_frames > 0 else frames

    def labels_of(self, i: int) -> NDArray[np.int32]:
        """Return all labels of record i, (1 or more,)."""
        if self._all_labels is None or self._label_ends is None:
            return self.labels[i : i + 1]
        return self._all_labels[self._label_ends[i] : self._label_ends[i + 1]]

    def multi_hot(self, i: int) -> NDArray[np.float32]:
        """Return the labels of record i as a row (K,) of 0 and 1."""
        row = np.zeros(self._num_class, np.float32)
        row[self.labels_of(i)] = 1
        return row

    @property
    def targets(self) -> NDArray[np.bool_] | None:
        """The classes of each video, (N, K), computed at each call; None if each video has one label."""
        if self._all_labels is None or self._label_ends is None:
            return None
        table = np.zeros((len(self), self._num_class), bool)
        table[np.repeat(np.arange(len(self)), np.diff(self._label_ends)), self._all_labels] = True
        return table

    def members(self) -> list[NDArray[np.int64]]:
        """Return the records of each class that has any, in class order; those with several labels appear in each."""
        owners = np.arange(len(self), dtype=np.int64)
        labels = self.labels
        if self._all_labels is not None and self._label_ends is not None:
            owners, labels = np.repeat(owners, np.diff(self._label_ends)), self._all_labels

        # Records sorted by class, split where the class changes.
        order = np.argsort(labels, kind="stable")
        borders = np.flatnonzero(np.diff(labels[order])) + 1
        # A record may repeat a label, but counts once in its class.
        return [np.unique(part) for part in np.split(owners[order], borders)]

    def share(self) -> int:
        """Put all columns into anonymous shared memory and use them from there.

        Returns:
            A file descriptor for `from_fd`, valid while these records live. Pass it to a child with `pass_fds`.
        """
        if self._fd is None:
            fd = os.memfd_create("zoetrope-records", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            weakref.finalize(self, os.close, fd)
            _write(fd, self._columns(), self._info)
            # The seals keep every process from changing or shortening memory that others have mapped.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._use(_map(fd)[0])  # releases the private copy
            self._fd = fd
        return self._fd

    @classmethod
    def from_fd(cls, fd: int) -> Records:
        """Map records that another process shared, without a copy. The descriptor may be closed afterwards."""
        return cls(*_map(fd))

    def _columns(self) -> Columns:
        columns: Columns = {
            "paths": self._paths,
            "ends": self._ends,
            "labels": self.labels,
            "frames": self.frames,
            "starts": self.starts,
        }
        if self._all_labels is not None and self._label_ends is not None:
            columns |= {"all_labels": self._all_labels, "label_ends": self._label_ends}
        return columns


def records_of(cfg: Config, split: str) -> Records:
    """Load the "train" or "val" list of a configuration.

    Raises:
        UserError: the list has an error, or several labels per video although the loss takes one.
    """
    source, root = (cfg.train_source, cfg.train_root) if split == "train" else (cfg.val_source, cfg.val_root)
    records = Records.load(source, root, num_class=cfg.model.num_class, layout=cfg.data.list_layout)
    if records.multi_label and cfg.loss == "ce":
        raise UserError(f"{source}: its videos have several labels, which needs loss: bce")
    return records


def _write(fd: int, columns: Columns, info: files.Row) -> None:
    """Write magic, length of the header, header and columns. The header is JSON: dtypes and lengths, then info."""
    layout = {name: [column.dtype.str, len(column)] for name, column in columns.items()}

    # Paths may hold any bytes. JSON keeps their surrogate escapes as \udcXX.
    header = json.dumps({"columns": layout, "info": info}).encode("ascii")

    with open(os.dup(fd), "wb") as f:  # a copy of the descriptor, since `with` closes it
        f.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        for column in columns.values():
            f.write(bytes(-f.tell() % _ALIGN))
            f.write(column.data)


def _map(fd: int) -> tuple[Columns, files.Row]:
    memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    if memory[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"file descriptor {fd} holds no records")
    size = int.from_bytes(memory[8:16], "little")
    header = json.loads(memory[16 : 16 + size])

    columns: Columns = {}
    at = 16 + size
    # The mapping stays open while a column uses it.
    for name, (dtype, length) in header["columns"].items():
        at += -at % _ALIGN
        columns[name] = np.frombuffer(memory, np.dtype(dtype), length, at)
        at += columns[name].nbytes

    return columns, header["info"]


def _check_labels(file: str, columns: Columns, num_class: int | None) -> None:
    labels: NDArray[np.int32] = columns.get("all_labels", columns["labels"])
    low, high = int(labels.min()), int(labels.max())
    if low >= 0 and (num_class is None or high < num_class):
        return

    # An error: find the first wrong label and its record.
    top = np.iinfo(np.int32).max if num_class is None else num_class - 1
    first = int(np.flatnonzero((labels < 0) | (labels > top))[0])
    record = int(np.searchsorted(columns["label_ends"], first, "right")) - 1 if "label_ends" in columns else first
    message = f"{place_of(file, record)}: label {labels[first]} is outside 0..{top}"

    # Name the likely cause: labels from 1, or a num_class that is too small.
    if num_class is not None and low == 1 and high == num_class:
        message += f"; the labels of this list run from 1 to {high}: subtract 1 from each"
    elif high > top:
        message += f"; the largest label here is {high}, so num_class must be at least {high + 1}, not {num_class}"
    else:
        message += "; labels start at 0"

    raise UserError(message)
