"""Append to a file that the run can do without: report the first failure once and continue. Needs no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from utils.errors import UserError, refuse_odd_file


class AppendFile:
    """A log or a curve on disk. Whatever happens to it later, `write` and `sync` do not raise.

    A file that was deleted or replaced is opened again, and a write after a failed one tries again. Every write is
    one system call in append mode, so the lines of several processes do not mix.

    Args:
        path: the file; a missing folder is created.
        remark: called with one sentence at the first failure.
        lines: the file consists of lines; a line torn by a killed process or a full disk is ended before the next one.
        reopened: returns the first bytes to write after the file had to be opened again.
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
            OSError: the file cannot be opened.
            UserError: a pipe, a device or a folder has its name.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refuse_odd_file(self.path)

        # O_RDWR because the last byte is read back; O_APPEND keeps the writes of several processes apart.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            # A line that was torn by a killed process or a full disk ends here, or it would swallow the next record.
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
        # The file was deleted or rotated while it was open: continue in the file that has the name now.
        if self._descriptor is not None and not _is_at(self._descriptor, self.path):
            self.close()
        if self._descriptor is None:
            self.open()
        assert self._descriptor is not None, "just opened"

        try:
            _write_all(self._descriptor, data)
        except OSError as error:  # an error of a descriptor does not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def write(self, data: bytes) -> bool:
        """Append some bytes and return True if they are in the file."""
        try:
            self.append(data)
        except (OSError, UserError) as error:
            self._fail(error)
            return False
        return True

    def sync(self) -> None:
        """Flush the written bytes to the disk."""
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
        # Report only the first failure: a full disk would otherwise fill the log with the same sentence.
        if not self._has_failed:
            self._has_failed = True
            reason = f"{self.path}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
            self._remark(f"{reason}; the run continues without it and tries again")


def _is_at(descriptor: int, path: Path) -> bool:
    # Compare device and inode: the name may belong to another file by now.
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_torn(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _write_all(descriptor: int, data: bytes) -> None:
    # `os.write` may write a part only, for example when the disk is almost full.
    while data:
        data = data[os.write(descriptor, data) :]
