"""File duties: replace a file as a whole, append rows of JSON, sync a folder, hash."""

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
    """Give the name of a temporary file to write; it becomes `path` at the end, and is removed after an error.

    Args:
        path: what readers see: the old file, or the whole new one.
        temporary: another name than `path` with `.tmp` behind.
        sync: hand the bytes to the disk before the file gets its name.
    """
    temporary = temporary or path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # whatever was left there, such as a pipe
    try:
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
    """Replace a text file as a whole; `errors` says what becomes of names that are not UTF-8."""
    write(path, text.encode("utf-8", errors))


def sync_file(path: Path) -> None:
    """Hand the bytes of a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove_old(paths: Iterable[Path], seconds: float = 24 * 3600) -> None:
    """Remove what processes that were killed long ago left half made."""
    for path in paths:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > seconds:
                path.unlink()


def lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False if another process has. Where a file system knows no locks, True."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def sync_folder(folder: Path) -> None:
    """Hand the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
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
    """Return the values of a file of JSON lines; skip a torn line, return none for a missing file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    values = []
    for line in lines:
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return values


def read_rows(path: Path) -> list[Row]:
    """Return the objects among the values of a file of JSON lines."""
    return [row for row in read_lines(path) if isinstance(row, dict)]


def append_row(path: Path, row: Mapping[str, object] | str) -> None:
    """Append one value, in one write; make the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
