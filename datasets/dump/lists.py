"""Name the place of each video of a list in DST, and write the new list with these names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

from datasets.dump.settings import DumpSettings
from datasets.dump.state import DumpEntry
from datasets.lists.records import Records
from datasets.readers.frame_pack import SUFFIX
from utils.errors import UserError

#: Endings that are removed from a name; any other dot belongs to the name.
ENDINGS = {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"}
ENDINGS |= {".ts", ".webm", ".wmv", SUFFIX}


def target_names(records: Records, settings: DumpSettings, files: set[str]) -> dict[str, str]:
    """Return the place of each video below DST, by its path as the list writes it.

    A name loses its ending, unless two videos would then share a name, or one would lie inside the other.

    Args:
        records: the list; its paths may be absolute.
        settings: its form sets the new ending.
        files: names in DST that are not videos: the new list and failed.txt.

    Raises:
        UserError: a video would take the place of a file of the dump, or would lie inside another video.
    """
    below: dict[str, str] = {}
    for i in range(len(records)):
        shown = records.path(i)
        if shown not in below:
            below[shown] = os.path.relpath(records.full_path(i), records.root)
    long = set(below.values())  # a list may write one file in several ways

    # Names that clash get their old ending back. That may cause another clash, so repeat until none is left.
    names = {path: _without_ending(path) + settings.ending for path in long}
    while True:
        times, parents = Counter(names.values()), _parents(names.values())
        clash = {p for p, name in names.items() if times[name] > 1 or name in parents or name in files}
        # A name that has its ending back cannot change again.
        clash = {path for path in clash if names[path] != path + settings.ending}
        if not clash:
            break
        names |= {path: path + settings.ending for path in clash}

    # Only the user can resolve the clashes that remain.
    for path, name in names.items():
        if name in parents:
            raise UserError(f"dump: {path} would hold other videos; give it another name, or use --as packs")
        if name.split(os.sep)[0] in files | {os.curdir, os.pardir, ".dump"}:
            raise UserError(f"dump: {path}: {name} cannot be the name of a video; give it another name")

    return {shown: names[path] for shown, path in below.items()}


def _parents(names: Iterable[str]) -> set[str]:
    """Return all folders that hold one of these names, directly or below."""
    parents: set[str] = set()
    for name in names:
        while (name := os.path.dirname(name)) and name not in parents:
            parents.add(name)
    return parents


def _without_ending(path: str) -> str:
    name, ending = os.path.splitext(path)
    return name if ending.lower() in ENDINGS else path


def list_lines(records: Records, targets: dict[str, str], done: dict[str, DumpEntry]) -> list[str]:
    """Return a line for each record whose video is dumped, in list order: `path [start] frames label...`, real counts.

    Args:
        records: the old list.
        targets: see `target_names`.
        done: the manifest's entry of each dumped video, by target.
    """
    # A name with a space or a comma is only unambiguous between tabs.
    blank = "\t" if any(" " in name or "," in name for name in targets.values()) else " "
    parts = bool(records.starts.any())

    lines: list[str] = []
    for i in range(len(records)):
        entry = done.get(targets[records.path(i)])
        if entry is None:
            continue

        start, declared = int(records.starts[i]), int(records.frames[i])
        frames = entry["frames"] - start
        # The declared count sets where a part of a video ends. For whole videos only the real count matters.
        if parts and declared > 0:
            frames = min(frames, declared)
        if frames < 1:  # the video ends before this part
            continue

        numbers = [start, frames] if parts else [frames]
        row = [targets[records.path(i)], *map(str, numbers), *map(str, records.labels_of(i))]
        lines.append(blank.join(row) + "\n")

    return lines
