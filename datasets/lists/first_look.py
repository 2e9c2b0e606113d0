"""Look at a few files of both lists before the first iteration, to find mistakes that would otherwise cost an epoch.

A wrong root or the wrong reader makes every video unreadable. The same video in both lists makes a validation useless.
Neither shows in the list files alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from datasets.lists.files import VIDEOS
from datasets.lists.records import Records
from datasets.loading.bad_media import printable
from utils.errors import UserError

if TYPE_CHECKING:
    from utils.config import Config

LOOKED_AT = 8  # videos of a list
MOST_FOLDERS = 20_000  # folders whose links are followed to compare the lists: each costs system calls
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"BM")  # first bytes of JPEG, PNG, BMP
_HEAD = 12  # bytes that show what a file is: WebP and AVI are both RIFF, and differ in the last four


def look(cfg: Config, train: Records, val: Records, *, compare: bool = True) -> list[str]:
    """Look at a few files of both lists.

    Args:
        cfg: a loaded configuration.
        train, val: the two lists of this configuration.
        compare: also look for videos that are in both lists; costs a second for a million videos.

    Returns:
        Warnings, one line each.

    Raises:
        UserError: none of the files exists, or the reader cannot read any of them because of their kind.
    """
    for split, records in (("train", train), ("val", val)):
        check_files(cfg, split, records)
    return both_lists(train, val) if compare else []


def check_files(cfg: Config, split: str, records: Records) -> None:
    """Check a few files of one list: the first, the last, and some in between; see `look`."""
    indices = chosen(len(records))
    paths = [records.full_path(i) for i in indices]
    there = [path for path in paths if os.path.exists(path)]

    # One missing video is the business of `on_bad`; if all are missing, the root is wrong.
    if not there:
        number = "the only video" if len(paths) == 1 else f"none of {len(paths)} videos"
        exists = "does not exist" if len(paths) == 1 else f"of {len(records):,} that were looked at exists"
        raise UserError(
            f"{records.list_file}: {number} {exists} below {records.root}, for example {printable(paths[0])}: "
            f"is common.{split}_root the folder from which these paths start?{_hint(records, indices[0])}"
        )

    # Compare the kind of the files with the reader.
    reader = cfg.data.reader
    if reader == "video" and all(map(os.path.isdir, there)):
        raise UserError(
            f"{records.list_file}: its videos are folders, for example {printable(there[0])}: for folders of images "
            "set data.reader: frames"
        )

    if reader in ("frames", "memcached") and all(map(is_video, there)):
        advice = "" if reader == "frames" else "; memcached takes only frames, which `main.py dump` makes"
        raise UserError(
            f"{records.list_file}: its videos are video files, for example {printable(there[0])}: set data.reader: "
            f"video{advice}"
        )


def chosen(count: int) -> list[int]:
    """Return the records of a list that are checked: the first, the last, and some in between."""
    if count <= LOOKED_AT:
        return list(range(count))
    return [(count - 1) * k // (LOOKED_AT - 1) for k in range(LOOKED_AT)]


def is_video(path: str) -> bool:
    """Return True if a path is a video file by its name, and not an image by its first bytes."""
    if os.path.splitext(path)[1].lower() not in VIDEOS or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    is_webp = head[:4] == b"RIFF" and head[8:] == b"WEBP"
    return not (is_webp or head.startswith(_IMAGES))


def _hint(records: Records, i: int) -> str:
    """Return a sentence with a folder near the root below which record i exists; "" if there is none."""
    path, root = records.path(i), records.root
    near = [os.path.dirname(root), *_subfolders(root)]

    for folder in near:
        if os.path.exists(os.path.join(folder, path)):
            return f" It exists below {printable(folder)}."
    return ""


def _subfolders(root: str) -> list[str]:
    try:
        with os.scandir(root) as entries:
            # A root may be flat with a million videos: look at some entries only.
            return sorted(entry.path for entry, _ in zip(entries, range(1000), strict=False) if entry.is_dir())
    except OSError:
        return []


def both_lists(train: Records, val: Records) -> list[str]:
    """Return a warning if the same part of the same file is in both lists, under whatever root or link.

    Links of roots and of folders are followed, those of single files are not.
    """
    names: dict[bytes, bytes] = {}

    # Only the shorter list is kept in memory.
    few, many = (val, train) if len(val) < len(train) else (train, val)
    few_places = set(_places(few, names))
    common = {place for place in _places(many, names) if place in few_places}
    if not common:
        return []

    path, start = min(common)
    where = f" from frame {start}" if start else ""
    videos = "1 video of the validation list is" if len(common) == 1 else f"{len(common):,} videos are"

    return [
        f"WARNING: {videos} in both lists ({train.list_file}, {val.list_file}), for example "
        f"{printable(os.fsdecode(path))}{where}: the validation accuracy will be too high"
    ]


def _places(records: Records, names: dict[bytes, bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield (real path of the folder and name, first frame) of every record; `names` caches real paths of folders."""
    root = os.fsencode(records.root).rstrip(b"/")
    starts: Iterable[int] = records.starts.tolist()

    for path, start in zip(records.raw_paths(), starts, strict=True):
        # One system call per folder, not one per video.
        folder, _, name = path.rpartition(b"/")
        real = names.get(root + b"/" + folder)
        if real is None:
            real = names[root + b"/" + folder] = _real(root, folder, len(names) < MOST_FOLDERS)
        yield real + b"/" + name, start


def _real(root: bytes, folder: bytes, follow: bool) -> bytes:
    full = os.path.join(root, folder)
    try:
        return os.path.realpath(full) if follow else os.path.normpath(full)
    except (OSError, ValueError):
        return os.path.normpath(full)  # a loop of links, or a path with a NUL
