"""Fail the n-th call to the file system below given folders, inside a process, as SQLite's tests do.

Counted are calls of one kind, in their order: open, write, fsync, rename, link, mkdir, unlink, utime. A rehearsal with
`Injector(folders)` lists the calls of a command; `Injector(folders, fail=Fault("write", 3, errno.EIO))` lets the third
write fail. File objects are taken apart: the calls counted are those that reach the kernel, so a full disk is met when
a buffer is flushed or closed, where a real one is met.
"""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import errno
import io
import os
import pathlib
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KINDS = ("open", "write", "fsync", "rename", "link", "mkdir", "unlink", "utime")
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "ESTALE": errno.ESTALE}


@dataclasses.dataclass(frozen=True)
class Fault:
    """Which call fails.

    Attributes:
        kind: one of KINDS.
        number: from 1.
        error: the errno.
        lasting: all later calls that change something fail too, as on a full disk or a lost mount.
    """

    kind: str
    number: int
    error: int
    lasting: bool = False

    def __str__(self) -> str:
        name = errno.errorcode[self.error]
        return f"{self.kind} {self.number} {name}{' and all after it' if self.lasting else ''}"


class Injector:
    """Counts the calls of this process below some folders, and fails one.

    Args:
        folders: only paths below these count.
        fail: which call fails; None: none.
        note: a file that gets a line when the fault is injected, outside of the folders.

    Attributes:
        calls: (kind, path) of each call so far.
        fired: the path of the call that failed, None until it has.
    """

    def __init__(self, folders: Sequence[Path], fail: Fault | None = None, note: Path | None = None) -> None:
        self._folders = [os.path.abspath(folder) for folder in folders]
        self._fail, self._note = fail, note
        self._counts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._real = {name: getattr(os, name) for name in _OF_OS}
        self._real_open = io.open
        self.calls: list[tuple[str, str]] = []
        self.fired: str | None = None

    def met(self, kind: str, path: Any, directory: int | None = None) -> None:
        """Count one call; raise the fault if it is its turn."""
        text = self._path(path, directory)
        if text is None:
            return
        with self._lock:
            self.calls.append((kind, text))
            self._counts[kind] += 1
            fault = self._fail
            if fault is None:
                return
            its_turn = kind == fault.kind and self._counts[kind] == fault.number
            if its_turn:
                self.fired = text
                if self._note is not None:
                    with self._real_open(self._note, "a") as file:
                        file.write(f"{kind} {text}\n")
            elif not (fault.lasting and self.fired is not None and kind != "unlink"):
                return
        raise OSError(fault.error, os.strerror(fault.error), text)

    def _path(self, path: Any, directory: int | None) -> str | None:
        """Return the absolute path that a call is about, None if it is not below the folders."""
        if isinstance(path, int):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{path}")
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        if directory is not None and not os.path.isabs(text):
            text = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)
        text = os.path.abspath(text).removesuffix(" (deleted)")
        return text if any(text == one or text.startswith(one + os.sep) for one in self._folders) else None

    def install(self) -> None:
        """Put the counted functions in the place of the real ones, for the rest of this process."""
        for name, make in _OF_OS.items():
            setattr(os, name, make(self, self._real[name]))
        builtins.open = io.open = self.open
        # Python 3.10 keeps the functions that `Path` calls in a place of their own.
        of_path = getattr(pathlib, "_normal_accessor", None)
        for name in _OF_OS:
            if hasattr(of_path, name):
                setattr(of_path, name, self.open if name == "open" else getattr(os, name))
        from numpy.lib import format as numpy_format

        # Else arrays bypass `write`. The module in which NumPy looks the name up differs between its versions.
        numpy_format.write_array.__globals__["isfileobj"] = lambda _: False

    def open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """Open a file as the builtin does; files below the folders count their calls."""
        text = self._path(file, None)
        if text is None:
            return self._real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            self.met("open", file)
        binary, updating = "b" in mode, "+" in mode
        raw_mode = next(letter for letter in "rwxa" if letter in mode) + ("+" if updating else "")
        raw = _Raw(file, raw_mode, closefd, opener)
        raw.counts_for(self, text)
        if buffering == 0:
            return raw
        kind: Any = io.BufferedRandom if updating else io.BufferedReader if raw_mode == "r" else io.BufferedWriter
        buffered = kind(raw) if buffering in (-1, 1) else kind(raw, buffering)
        if binary:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)


class _Raw(io.FileIO):
    """A file whose writes are counted."""

    _injector: Injector | None = None
    _counted = ""

    def counts_for(self, injector: Injector, path: str) -> None:
        """Count from now on."""
        self._injector, self._counted = injector, path

    def write(self, data: Any) -> int:
        """Write bytes, if it is allowed."""
        if self._injector is not None:
            self._injector.met("write", self._counted)
        return super().write(data)


def _simple(kind: str, place: int = 0, folder: str = "dir_fd") -> Callable[[Injector, Any], Any]:
    """A counted function; `place`: which of its arguments is the path."""

    def make(injector: Injector, real: Any) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            path = arguments[place] if len(arguments) > place else next(iter(named.values()))
            injector.met(kind, path, named.get(folder))
            return real(*arguments, **named)

        return counted

    return make


_OF_OS: dict[str, Callable[[Injector, Any], Any]] = {
    "open": _simple("open"),
    "write": _simple("write"),
    "posix_fallocate": _simple("write"),
    "ftruncate": _simple("write"),
    "truncate": _simple("write"),
    "fsync": _simple("fsync"),
    "fdatasync": _simple("fsync"),
    "rename": _simple("rename", 1, "dst_dir_fd"),
    "replace": _simple("rename", 1, "dst_dir_fd"),
    "link": _simple("link", 1, "dst_dir_fd"),
    "symlink": _simple("link", 1),
    "mkdir": _simple("mkdir"),
    "unlink": _simple("unlink"),
    "remove": _simple("unlink"),
    "rmdir": _simple("unlink"),
    "utime": _simple("utime"),
}
