"""Replace a file as a whole, append rows of JSON, sync a folder, hash a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # an object of a JSON file


@contextlib.contextmanager
def replacing(path: Path, *, temporary: Path | None = None, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary file to write; it becomes `path` at the end, and is removed after an error.

    Args:
        path: readers see either the old file or the complete new one.
        temporary: its name; None: `path` with `.tmp` appended.
        sync: flush the bytes to the disk before the file gets its name.
    """
    temporary = temporary or path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # it may be anything, such as a pipe left there

    try:
        # After a power cut a renamed but unsynced file may be empty: hence `sync` before the rename.
        yield temporary
        if sync:
            sync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write(path: Path, data: bytes) -> None:
    """Replace a file as a whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Replace a text file as a whole; `errors` decides what happens to names that are not UTF-8."""
    write(path, text.encode("utf-8", errors))


def sync_file(path: Path) -> None:
    """Flush the bytes of a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove_old(paths: Iterable[Path], seconds: float = 24 * 3600) -> None:
    """Remove files that processes left unfinished when they were killed long ago."""
    for path in paths:
        # Another process may remove the file at the same moment.
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > seconds:
                path.unlink()


def lock(descriptor: int) -> bool:
    """Lock an open file until it is closed. Return False if another process holds it, True where locks do not exist."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # File systems without locks (some NFS mounts): continue unlocked.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do it and need not
            raise
    finally:
        os.close(descriptor)


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_lines(path: Path) -> list[object]:
    """Return the values of a file of JSON lines, without torn lines; return none for a missing file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []

    values = []
    for line in lines:
        with contextlib.suppress(ValueError):  # a killed process leaves half a line
            values.append(json.loads(line))
    return values


def read_rows(path: Path) -> list[Row]:
    """Return the objects among the values of a file of JSON lines."""
    return [row for row in read_lines(path) if isinstance(row, dict)]


def append_row(path: Path, row: Mapping[str, object] | str) -> None:
    """Append one value, in one write; create a missing folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        # One short write in append mode: the lines of several processes do not mix.
        file.write(json.dumps(row) + "\n")
