"""Read the bytes of frame files. This module decides where they are; frames.py decides what they mean."""

from __future__ import annotations

import collections
import os
import stat
from collections.abc import Sequence
from typing import Protocol

from datasets.readers.frame_pack import SUFFIX, Description, FramePack
from utils.errors import MediaError

_OPEN_PACKS = 4  # per process; a clip reads one pack several times


class FrameSource(Protocol):
    """A place where frame files are kept, as the frames reader needs it."""

    def read(self, path: str) -> bytes:
        """Return all bytes of one file. Raise MediaError if it cannot be read."""
        ...

    def read_many(self, folder: str, names: Sequence[str]) -> list[bytes]:
        """Return all bytes of several files of one folder, in order. MediaError names the first that fails."""
        ...

    def exists(self, path: str) -> bool:
        """Return True if the file exists."""
        ...

    def is_folder(self, path: str) -> bool:
        """Return True if the path is a folder of frames; any other path is treated as one image."""
        ...

    def names(self, folder: str) -> list[str]:
        """Return the file names in a folder, in any order. Raise MediaError if it cannot be listed."""
        ...

    def describe(self, folder: str) -> Description | None:
        """Return the metadata in the header of a pack, or None for an ordinary folder, which has to be listed."""
        ...


class FilesSource:
    """Frame files in ordinary folders, and in packs (`NAME.fsh`), which behave like folders."""

    def __init__(self) -> None:
        self._packs: collections.OrderedDict[str, FramePack] = collections.OrderedDict()

    def read(self, path: str) -> bytes:
        """Return all bytes of one file. MediaError if it is not a regular file: a FIFO would block forever."""
        folder, name = os.path.split(path)
        return self.read_many(folder, [name])[0] if self._is_pack(folder) else _read(path, path, None)

    def read_many(self, folder: str, names: Sequence[str]) -> list[bytes]:
        """Return all bytes of several files of one folder. The folder's path is resolved once."""
        if self._is_pack(folder):
            pack = self._pack(folder)
            return pack.read([_known(pack, name) for name in names])

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
        """Return True if the file exists."""
        folder, name = os.path.split(path)
        return self._pack(folder).ordinal(name) is not None if self._is_pack(folder) else os.path.isfile(path)

    def is_folder(self, path: str) -> bool:
        """Return True if the path is a folder or a pack."""
        return os.path.exists(path) if path.endswith(SUFFIX) else os.path.isdir(path)

    def names(self, folder: str) -> list[str]:
        """Return the file names in a folder, in any order."""
        if self._is_pack(folder):
            return self._pack(folder).names()
        try:
            return os.listdir(folder)
        except OSError as error:
            raise MediaError(folder, error.strerror or str(error)) from error

    def describe(self, folder: str) -> Description | None:
        """Return the metadata in the header of a pack, or None for an ordinary folder."""
        return self._pack(folder).description if self._is_pack(folder) else None

    def _is_pack(self, path: str) -> bool:
        # An open pack needs no look at the disk. A folder may have any name, even one that ends in .fsh.
        return path.endswith(SUFFIX) and (path in self._packs or not os.path.isdir(path))

    def _pack(self, path: str) -> FramePack:
        """Return the pack at a path. The last few stay open."""
        # Insert it again, so that the least recently used pack comes first.
        pack = self._packs.pop(path, None) or FramePack(path)
        self._packs[path] = pack
        if len(self._packs) > _OPEN_PACKS:
            self._packs.popitem(last=False)[1].close()
        return pack


def _known(pack: FramePack, name: str) -> int:
    ordinal = pack.ordinal(name)
    if ordinal is None:
        raise MediaError(os.path.join(pack.path, name), f"there is no such frame in the pack of {pack.frames}")
    return ordinal


def _read(name: str, path: str, folder: int | None) -> bytes:
    """Return the bytes of file `name` in an open folder. `path` is for the message."""
    try:
        # O_NONBLOCK: opening a FIFO returns at once instead of waiting for a writer. It is refused below.
        file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            info = os.fstat(file)
            if not stat.S_ISREG(info.st_mode):
                raise MediaError(path, "it is not a regular file")
            # The file may be shorter by now, or a read may return less than requested.
            data = os.read(file, info.st_size)
            while len(data) < info.st_size and (more := os.read(file, info.st_size - len(data))):
                data += more
            return data
        finally:
            os.close(file)
    except OSError as error:
        raise MediaError(path, error.strerror or str(error)) from error
