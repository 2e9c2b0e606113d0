"""Find the videos below a folder by the name of their sample: video files, packs, and folders of frames."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from utils.errors import UserError

VIDEOS = (
    ".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".3gp",
)  # fmt: skip
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_PACK = ".fsh"


class Media(NamedTuple):
    """One video below a root.

    Attributes:
        path: relative to the root, with `/`.
        kind: "video" for a file, "frames" for a folder of images or a pack.
    """

    path: str
    kind: str

    @property
    def name(self) -> str:
        """The name of the sample: the last part of the path, without the suffix of a file."""
        last = self.path.rsplit("/", 1)[-1]
        stem, suffix = os.path.splitext(last)
        return stem if suffix.lower() in (*VIDEOS, _PACK) else last


def walk(root: str) -> Iterator[Media]:
    """Yield all videos below a folder, sorted within each folder. Follow links to folders, skip hidden names.

    A folder that holds an image is a folder of frames, and is not searched further.

    Raises:
        UserError: `root` is not a folder that can be read.
    """
    # Report a wrong root by its option, before the first folder is read.
    try:
        entries = os.scandir(root)
    except OSError as error:
        raise UserError(f"--root: {root}: {error.strerror}") from error
    entries.close()

    seen: set[tuple[int, int]] = set()
    open_ends = [""]  # folders relative to the root; a stack

    while open_ends:
        here = open_ends.pop()
        info = os.stat(os.path.join(root, here))
        if (info.st_dev, info.st_ino) in seen:
            continue  # a link to a folder that was searched already
        seen.add((info.st_dev, info.st_ino))

        videos, folders = _folder(root, here)
        yield from videos
        open_ends += sorted(folders, reverse=True)  # the stack returns them in order


def _folder(root: str, here: str) -> tuple[list[Media], list[str]]:
    """Return the videos and folders in one folder; the folder itself if it holds frames."""
    videos: list[Media] = []
    folders: list[str] = []

    try:
        with os.scandir(os.path.join(root, here)) as entries:
            for entry in entries:
                path = f"{here}/{entry.name}" if here else entry.name
                suffix = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    continue
                # One image decides, so that a folder of a million frames costs no long search.
                if suffix in _IMAGES and here:
                    return [Media(here, "frames")], []
                if suffix in VIDEOS:
                    videos.append(Media(path, "video"))
                elif suffix == _PACK:
                    videos.append(Media(path, "frames"))
                elif entry.is_dir():
                    folders.append(path)
    except OSError as error:
        raise UserError(f"--root: {error.filename}: {error.strerror}") from error

    return sorted(videos), folders


def letters(name: str) -> str:
    """Reduce a class name to letters and digits: tools change its case, spaces, underscores and punctuation."""
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def by_name(media: Iterable[Media], names: set[str]) -> dict[str, list[Media]]:
    """Return the videos whose name or whole path is wanted, by that name."""
    matches: dict[str, list[Media]] = {}
    for one in media:
        for name in {one.name, one.path} & names:
            matches.setdefault(name, []).append(one)
    return matches


def best(candidates: list[Media], class_name: str, split: str) -> Media:
    """Return one of several videos of a name: in a folder of its class, of its split, else the first by path."""

    def rank(one: Media) -> tuple[bool, bool, int, str]:
        parents = [letters(part) for part in one.path.split("/")[:-1]]
        # `val` matches `validation`, and `tra` matches `training`.
        in_split = any(part.startswith(letters(split)[:3]) for part in parents)
        return letters(class_name) not in parents, not in_split, len(parents), one.path

    return min(candidates, key=rank)
