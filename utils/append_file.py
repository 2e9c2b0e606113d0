"""A file that a run appends to and can do without: it remarks a failure once and continues. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from utils.faults import UserError, refuse_odd_file


class AppendFile:
    """A log or a curve on disk. Whatever happens to it later, `write` and `sync` do not raise.

    A file that was deleted, or that another one has replaced, is opened again. After a failed write the next one tries
    again. Every write is one system call in append mode, so the lines of several processes do not mix.

    Args:
        path: the file; its folder is made where it is missing.
        remark: called with one sentence at the first failure.
        lines: the file has lines: one that a killed process or a full disk tore gets its end first.
        reopened: gives what a file begins with that had to be opened again.
    """

    def __init__(
        self,
        path: Path,
        remark: Callable[[str], object],
        *,
        lines: bool = True,
        reopened: Callable[[], bytes] = lambda: b"",
    ) -> None:
        self.path, self._remark, self._lines, self._reopened = Path(path), remark, lines, reopened
        self._descriptor: int | None = None
        self._was_open = self._has_failed = False

    def open(self) -> None:
        """Open the file now.

        Raises:
            OSError: it cannot be opened.
            UserError: a pipe, a device or a folder has its name.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refuse_odd_file(self.path)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            start = b"\n" if self._lines and _is_torn(descriptor) else b""
            start += self._reopened() if self._was_open else b""
            _write_all(descriptor, start)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor, self._was_open = descriptor, True

    @property
    def size(self) -> int:
        """Bytes in the file now; 0 if it is not open."""
        return 0 if self._descriptor is None else os.fstat(self._descriptor).st_size

    def append(self, data: bytes) -> None:
        """Append some bytes that the run cannot do without.

        Raises:
            OSError, UserError: as `open`, or the write failed.
        """
        if self._descriptor is not None and not _is_at(self._descriptor, self.path):
            self.close()
        if self._descriptor is None:
            self.open()
        assert self._descriptor is not None, "just opened"
        try:
            _write_all(self._descriptor, data)
        except OSError as error:  # of a descriptor: it does not say which file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def write(self, data: bytes) -> bool:
        """Append some bytes; reports whether they are in the file."""
        try:
            self.append(data)
        except (OSError, UserError) as error:
            self._fail(error)
            return False
        return True

    def sync(self) -> None:
        """Hand what was written to the disk."""
        if self._descriptor is None:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Close the file; the next `write` opens it again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _fail(self, error: OSError | UserError) -> None:
        self.close()
        if not self._has_failed:
            self._has_failed = True
            reason = f"{self.path}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
            self._remark(f"{reason}; the run continues without it and tries again")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_torn(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
