"""Name the checkpoints in an experiment folder, and keep second names that only one start writes. Needs no torch.

A process that lost its folder while it was frozen may still carry out one last rename (docs/cluster.md, "Two processes,
one folder"). A start that may have such a predecessor therefore keeps a second name for its newest latest and best
checkpoint: ``ckpt.start-7.pth.tar`` is the latest checkpoint of the start with token 7. Only that start writes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
from pathlib import Path

LATEST = "ckpt.pth.tar"
PREVIOUS = "ckpt_prev.pth.tar"
BEST = "ckpt_best.pth.tar"

_ENDING = ".pth.tar"
_KEPT = re.compile(r"(ckpt|ckpt_best)\.start-(\d+)\.pth\.tar")
_PROCESS = os.urandom(4).hex()  # host and pid can repeat, see `temporary_name`
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # errors of file systems without hard links


def kept_name(name: str, token: int) -> str:
    """Return the second name of the checkpoint `name` (LATEST or BEST) of the start with this token."""
    return f"{name.removesuffix(_ENDING)}.start-{token}{_ENDING}"


def split_name(file_name: str) -> tuple[str, int]:
    """Return (LATEST or BEST, token) of a kept name, and any other name with token 0."""
    match = _KEPT.fullmatch(file_name)
    return (f"{match[1]}{_ENDING}", int(match[2])) if match else (file_name, 0)


def kept(folder: Path, name: str | None = None) -> list[Path]:
    """List the kept names in a folder, highest token first.

    Args:
        folder: an experiment folder; one that does not exist holds none.
        name: LATEST or BEST, for those of one kind.
    """
    try:
        entries = [split_name(file) for file in os.listdir(folder)]
    except FileNotFoundError:
        return []

    known = sorted({(token, base) for base, token in entries if token and name in (None, base)}, reverse=True)
    return [folder / kept_name(base, token) for token, base in known]


def present(folder: Path, *names: str) -> list[Path]:
    """List the files with these names or with a kept name of one of them, including dangling links."""
    paths: list[Path] = []
    for name in names:
        paths += [folder / name] if os.path.lexists(folder / name) else []
        paths += kept(folder, name)
    return paths


def temporary_name(target: Path) -> Path:
    """Return the file that this process writes before it renames it to `target`.

    Host and pid do not identify a process: a restarted container often has the same ones. With a shared name, a process
    that wakes up would rename a file that the other one has half written.
    """
    stem = target.name.removesuffix(_ENDING)
    return target.with_name(f"{stem}.tmp-{_PROCESS}.{socket.gethostname()}-{os.getpid()}{_ENDING}")


def temporary_files(folder: Path) -> list[tuple[Path, str, str]]:
    """List the temporary files of all processes: (path, host, pid)."""
    entries = []
    for path in folder.glob(f"ckpt*.tmp-*{_ENDING}"):
        owner = path.name.removesuffix(_ENDING).split(".tmp-", 1)[1]
        # The random part of the name is missing in files of older versions.
        host, _, pid = re.sub(r"^[0-9a-f]{8}\.", "", owner).rpartition("-")
        entries.append((path, host, pid))
    return entries


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of every process, so that no rename of an earlier start can still succeed.

    Only the holder of the folder's lock and of its highest token may call this, before it writes its own files.
    """
    for path, _, _ in temporary_files(folder):
        path.unlink(missing_ok=True)


def second_name(source: Path, link: Path) -> None:
    """Give a file a second name and replace what has that name; copy it where hard links are not supported."""
    # `os.link` fails if the name exists. The link is a spare name, so its absence for a moment does no harm.
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, link)


def publish(source: Path, target: Path) -> None:
    """Let `target` name the same file as `source`. `target` exists at every moment, and `source` stays."""
    if _same_file(source, target):
        return

    # A link and a rename: `os.link` alone cannot replace an existing name.
    spare = temporary_name(target)
    try:
        second_name(source, spare)
        os.replace(spare, target)
    finally:
        with contextlib.suppress(OSError):  # renaming one of two names of the same file leaves both
            spare.unlink()


def settle(folder: Path, token: int, *, keep: bool) -> None:
    """Undo what a late rename of an earlier start has changed.

    The kept names of `token` show which files LATEST and BEST are. The kept names of earlier starts are removed.

    Args:
        folder: the experiment folder; the caller holds its lock and the highest token.
        token: the caller's token.
        keep: an earlier start may still wake up, so the names of `token` stay.
    """
    for path in kept(folder):
        name, number = split_name(path.name)
        if number == token:
            publish(path, folder / name)
        if number < token or not keep:
            path.unlink(missing_ok=True)


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))  # lstat: a link is replaced, not followed
    except FileNotFoundError:
        return False
