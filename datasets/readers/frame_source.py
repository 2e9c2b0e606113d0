"""Bytes of frame files: where they lie is decided here, what they mean is decided in frames.py."""

from __future__ import annotations

import collections
import os
import stat
from collections.abc import Sequence
from typing import Protocol

from datasets.readers.frame_shard import SUFFIX, Description, FrameShard
from utils.faults import MediaError

_OPEN_SHARDS = 4


class FrameSource(Protocol):
    """What the frames reader needs from a place where frame files are kept."""

    def read(self, path: str) -> bytes:
        """All bytes of one file; MediaError if it cannot be read."""
        ...

    def read_many(self, folder: str, names: Sequence[str]) -> list[bytes]:
        """All bytes of several files of one folder, in the order asked; MediaError names the first that fails."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        ...

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder of frames (else it is taken for one image)."""
        ...

    def names(self, folder: str) -> list[str]:
        """File names in a folder, in no particular order; MediaError if it cannot be listed."""
        ...

    def describe(self, folder: str) -> Description | None:
        """What a shard says of its frames; None for an ordinary folder, which has to be listed."""
        ...


class FilesSource:
    """Frame files in ordinary folders, and in shards (`NAME.fsh`), which answer like a folder."""

    def __init__(self) -> None:
        self._shards: collections.OrderedDict[str, FrameShard] = collections.OrderedDict()

    def read(self, path: str) -> bytes:
        """All bytes of one file; anything but a regular file (a FIFO would block for ever) is a MediaError."""
        folder, name = os.path.split(path)
        return self.read_many(folder, [name])[0] if self._is_shard(folder) else _read(path, path, None)

    def read_many(self, folder: str, names: Sequence[str]) -> list[bytes]:
        """All bytes of several files of one folder, which is looked up once."""
        if self._is_shard(folder):
            shard = self._shard(folder)
            return shard.read([_known(shard, name) for name in names])
        try:
            at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            first = os.path.join(folder, names[0]) if names else folder
            raise MediaError(first, error.strerror or str(error)) from error
        try:
            return [_read(name, os.path.join(folder, name), at) for name in names]
        finally:
            os.close(at)

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        folder, name = os.path.split(path)
        return self._shard(folder).ordinal(name) is not None if self._is_shard(folder) else os.path.isfile(path)

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder or a shard."""
        return os.path.exists(path) if path.endswith(SUFFIX) else os.path.isdir(path)

    def names(self, folder: str) -> list[str]:
        """File names in a folder, in no particular order."""
        if self._is_shard(folder):
            return self._shard(folder).names()
        try:
            return os.listdir(folder)
        except OSError as error:
            raise MediaError(folder, error.strerror or str(error)) from error

    def describe(self, folder: str) -> Description | None:
        """What a shard says of its frames; None for an ordinary folder."""
        return self._shard(folder).description if self._is_shard(folder) else None

    def _is_shard(self, path: str) -> bool:
        # Nothing is asked of the disk for one that is open, and a folder may have any name.
        return path.endswith(SUFFIX) and (path in self._shards or not os.path.isdir(path))

    def _shard(self, path: str) -> FrameShard:
        """The shard at a path; the last few stay open, since a clip asks several times for its own."""
        shard = self._shards.pop(path, None) or FrameShard(path)
        self._shards[path] = shard
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)[1].close()
        return shard


def _known(shard: FrameShard, name: str) -> int:
    ordinal = shard.ordinal(name)
    if ordinal is None:
        raise MediaError(os.path.join(shard.path, name), f"there is no such frame in the shard of {shard.frames}")
    return ordinal


def _read(name: str, path: str, folder: int | None) -> bytes:
    """The bytes of file `name` in an open folder; `path` is for the message."""
    try:
        # O_NONBLOCK: opening a FIFO returns at once and is then refused, instead of waiting for a writer.
        file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            info = os.fstat(file)
            if not stat.S_ISREG(info.st_mode):
                raise MediaError(path, "it is not a regular file")
            data = os.read(file, info.st_size)
            while len(data) < info.st_size and (more := os.read(file, info.st_size - len(data))):
                data += more
            return data
        finally:
            os.close(file)
    except OSError as error:
        raise MediaError(path, error.strerror or str(error)) from error
