"""Turn the sources that a user names for `predict` into single videos, each with the reader that takes it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.lists.records import Records
from datasets.loading.bad_media import printable
from datasets.readers.frames import IMAGES, find_layout
from utils.errors import UserError

#: Endings that a folder is searched for; a file that the user names may have any ending.
VIDEOS = (
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
    ".ts", ".vob", ".webm", ".wmv",
)  # fmt: skip
LISTS = (".txt", ".csv", ".tsv", ".json")


@dataclass(frozen=True)
class InputVideo:
    """One video to score.

    Attributes:
        path: as the user named it, or as it was found below what the user named.
        reader: "video", or "frames" for a folder of numbered images or a single image; "" if `reason` is set.
        reason: why it cannot even be tried.
    """

    path: str
    reader: str
    reason: str = ""

    def __str__(self) -> str:
        return printable(self.path)


def expand(named: Sequence[str | Path], root: Path | None = None) -> list[InputVideo]:
    """Return the videos in the order in which they were named; those of a folder by name, from all its sub-folders.

    Args:
        named: video files, images, folders of numbered images, folders of these, list files (.txt, .csv, .tsv, .json).
        root: folder of the relative paths in list files; default: the list's folder, else the working folder.

    Raises:
        UserError: a list cannot be read, or there is nothing to score.
    """
    sources: list[InputVideo] = []
    names = [os.fspath(name) for name in named]

    for name in names:
        if os.path.isdir(name):
            sources += _in_folder(name)
        elif not os.path.lexists(name):
            # one missing source does not stop the others
            sources.append(InputVideo(name, "", "there is no such file or folder"))
        elif name.lower().endswith(LISTS):
            sources += _in_list(Path(name), root)
        else:
            sources.append(_one(name))

    if not sources:
        raise UserError(f"predict: no videos and no folders of numbered images in {', '.join(names)}")
    return sources


def records_of(sources: Iterable[InputVideo]) -> Records:
    """Return the sources as records in their order, all with label 0, for the readers of an evaluation."""
    # Without a list file: a name on the command line may contain characters that no list can, such as a line feed.
    paths = [os.fsencode(os.path.abspath(source.path)) for source in sources]
    text = b"".join(paths)
    columns = {
        "paths": np.frombuffer(text, np.uint8),
        "ends": np.cumsum([0, *map(len, paths)], dtype=np.int64),
        "labels": np.zeros(len(paths), np.int32),
        # -1: the number of frames is not known
        "frames": np.full(len(paths), -1, np.int32),
        "starts": np.zeros(len(paths), np.int32),
    }

    about = {"list_hash": hashlib.sha256(b"\0".join(paths)).hexdigest(), "list_file": "the sources of predict"}
    return Records(columns, about | {"root": "/", "duplicates": 0, "num_class": 1})


def _one(path: str) -> InputVideo:
    return InputVideo(path, "frames" if os.path.isdir(path) or path.lower().endswith(IMAGES) else "video")


def _in_folder(folder: str) -> list[InputVideo]:
    """Return the videos anywhere below a folder; a folder of numbered images is itself a video."""
    sources: list[InputVideo] = []
    for place, folders, files in os.walk(folder):
        folders.sort()  # in place: os.walk descends in this order
        videos = sorted(name for name in files if name.lower().endswith(VIDEOS))
        sources += [InputVideo(os.path.join(place, name), "video") for name in videos]
        # images next to videos, such as thumbnails, are not a video
        if not videos and find_layout(files) is not None:
            sources.append(InputVideo(place, "frames"))
    return sources


def _in_list(file: Path, root: Path | None) -> list[InputVideo]:
    """Read one path per line, or any list that training takes; labels are neither needed nor used."""
    base = root or file.parent
    paths: list[str] = []
    if file.suffix.lower() != ".json":
        # a path is bytes, and b"\xef\xbb\xbf" is the byte order mark of an editor
        lines = [os.fsdecode(line) for line in file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()]
        paths = [_place(line.strip(), base) for line in lines if line.strip()]
        if paths and all(os.path.lexists(path) for path in paths):
            return [_one(path) for path in paths]

    # Else a list as training takes it, perhaps with labels.
    try:
        records = Records.load(file, base, num_class=None)
    except UserError as error:
        if file.suffix.lower() == ".json":
            raise
        # a list of one path per line of which some are missing: name these, score the others
        lost = [path for path in paths if not os.path.lexists(path)]
        if not paths or len(lost) == len(paths):
            raise UserError(f"{error} (and as a list of one path per line, none of them exists)") from error
        return [_one(p) if os.path.lexists(p) else InputVideo(p, "", "there is no such file or folder") for p in paths]
    return [_one(_place(records.path(i), base)) for i in range(len(records))]


def _place(path: str, base: Path) -> str:
    """Return where a path of a list leads: from the list's root, else from the working folder."""
    below = os.path.join(base, path)
    return path if not os.path.lexists(below) and os.path.lexists(path) else below
