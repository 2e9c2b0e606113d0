"""Memory that the training process and its reader processes share: memfds, inherited by number, mapped on both sides.

A memfd needs no name and no /dev/shm (whose size containers often limit to 64 MB), and it is gone with its last user.
"""

from __future__ import annotations

import mmap
import os

import numpy as np


class Slot:
    """One growing block of shared bytes.

    Arrays from `view` keep their mapping alive, so they stay valid after the slot has grown or was closed.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._bytes = np.zeros(0, np.uint8)

    @classmethod
    def create(cls, name: str, size: int) -> Slot:
        """Make a new block of `size` bytes, zeroed; pages are taken from memory when they are first written."""
        slot = cls(os.memfd_create(name, os.MFD_CLOEXEC))
        os.ftruncate(slot.fd, size)
        return slot

    def grow(self, size: int) -> None:
        """Let the block have at least `size` bytes."""
        if size > os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, size)

    def view(self, offset: int, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
        """An array over a part of the block, without a copy."""
        count = int(np.prod(shape))
        end = offset + count * np.dtype(dtype).itemsize
        if end > len(self._bytes):
            self._bytes = np.frombuffer(mmap.mmap(self.fd, 0), np.uint8)
        return self._bytes[offset:end].view(dtype).reshape(shape)

    def close(self) -> None:
        """Give back the descriptor and this side's mapping, as far as no array uses it."""
        self._bytes = np.zeros(0, np.uint8)
        os.close(self.fd)
