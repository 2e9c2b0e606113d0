"""Bytes of frame files: where they lie is decided here, what they mean is decided in frames.py."""

from __future__ import annotations

import os
import stat
from typing import Protocol

from utils.faults import MediaError


class FrameSource(Protocol):
    """What the frames reader needs from a place where frame files are kept."""

    def read(self, path: str) -> bytes:
        """All bytes of one file; MediaError if it cannot be read."""
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


class DirectorySource:
    """Frame files in ordinary folders."""

    def read(self, path: str) -> bytes:
        """All bytes of one file; anything but a regular file (a FIFO would block for ever) is a MediaError."""
        try:
            # O_NONBLOCK: opening a FIFO returns at once and is then refused, instead of waiting for a writer.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise MediaError(path, "it is not a regular file")
                return file.read()
        except OSError as error:
            raise MediaError(path, error.strerror or str(error)) from error

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return os.path.isfile(path)

    def is_folder(self, path: str) -> bool:
        """Whether the path is a folder."""
        return os.path.isdir(path)

    def names(self, folder: str) -> list[str]:
        """File names in a folder, in no particular order."""
        try:
            return os.listdir(folder)
        except OSError as error:
            raise MediaError(folder, error.strerror or str(error)) from error
