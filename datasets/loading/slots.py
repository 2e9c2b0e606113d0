"""Share memory with the reader processes: memfds that are inherited by number and mapped on both sides.

A memfd needs no name and no /dev/shm, which containers often limit to 64 MB. The kernel frees it with its last user.
"""

from __future__ import annotations

import mmap
import os

import numpy as np


class Slot:
    """One growing block of shared bytes.

    Arrays from `view` keep their mapping alive. They stay valid after the slot has grown or was closed.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._bytes = np.zeros(0, np.uint8)

    @classmethod
    def create(cls, name: str, size: int) -> Slot:
        """Make a zeroed block of `size` bytes. The kernel allocates its pages when they are first written."""
        slot = cls(os.memfd_create(name, os.MFD_CLOEXEC))
        os.ftruncate(slot.fd, size)
        return slot

    def grow(self, size: int) -> None:
        """Grow the block to at least `size` bytes. It never shrinks."""
        if size > os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, size)

    def view(self, offset: int, shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
        """Return an array over a part of the block, without a copy."""
        count = int(np.prod(shape))
        end = offset + count * np.dtype(dtype).itemsize
        if end > len(self._bytes):
            # The other side may have grown the block, so map it again. Older arrays keep the previous mapping.
            self._bytes = np.frombuffer(mmap.mmap(self.fd, 0), np.uint8)
        return self._bytes[offset:end].view(dtype).reshape(shape)

    def close(self) -> None:
        """Close the descriptor, and drop this side's mapping once no array uses it."""
        self._bytes = np.zeros(0, np.uint8)
        os.close(self.fd)
