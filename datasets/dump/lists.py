"""Where the videos of a list go in DST, and the new list that names them there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

from datasets.dump.settings import Settings
from datasets.dump.state import Entry
from datasets.lists.records import Records
from datasets.readers.frame_shard import SUFFIX
from utils.faults import UserError

#: Endings that a name loses; any other dot belongs to the name.
ENDINGS = {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"}
ENDINGS |= {".ts", ".webm", ".wmv", SUFFIX}


def target_names(records: Records, settings: Settings, files: set[str]) -> dict[str, str]:
    """Where each path of the list goes below DST, by the path as the list writes it.

    It goes without its ending, unless two videos would then be one, or one would lie inside the other.

    Args:
        records: the list; its paths may be absolute.
        settings: the form gives the new ending.
        files: names in DST that are not videos: the new list and failed.txt.

    Raises:
        UserError: a video would lie in the dump's own files, or in another video whatever its name.
    """
    below: dict[str, str] = {}
    for i in range(len(records)):
        shown = records.path(i)
        if shown not in below:
            below[shown] = os.path.relpath(records.full_path(i), records.root)
    long = set(below.values())  # each file once, however it is written
    names = {path: _without_ending(path) + settings.ending for path in long}
    while True:
        times, parents = Counter(names.values()), _parents(names.values())
        clash = {p for p, name in names.items() if times[name] > 1 or name in parents or name in files}
        clash = {path for path in clash if names[path] != path + settings.ending}
        if not clash:
            break
        names |= {path: path + settings.ending for path in clash}
    for path, name in names.items():
        if name in parents:
            raise UserError(f"dump: {path} would hold other videos; give it another name, or use --as shards")
        if name.split(os.sep)[0] in files | {os.curdir, os.pardir, ".dump"}:
            raise UserError(f"dump: {path}: {name} is no place for a video; give it another name")
    return {shown: names[path] for shown, path in below.items()}


def _parents(names: Iterable[str]) -> set[str]:
    """All folders that hold one of these."""
    found: set[str] = set()
    for name in names:
        while (name := os.path.dirname(name)) and name not in found:
            found.add(name)
    return found


def _without_ending(path: str) -> str:
    name, ending = os.path.splitext(path)
    return name if ending.lower() in ENDINGS else path


def list_lines(records: Records, targets: dict[str, str], done: dict[str, Entry]) -> list[str]:
    """The records whose video is there, in the order of the list: `path [start] frames label...` with real counts.

    Args:
        records: the old list.
        targets: see `target_names`.
        done: by target, what the manifest says of it.
    """
    blank = "\t" if any(" " in name or "," in name for name in targets.values()) else " "
    parts = bool(records.starts.any())
    lines: list[str] = []
    for i in range(len(records)):
        entry = done.get(targets[records.path(i)])
        if entry is None:
            continue
        start, declared = int(records.starts[i]), int(records.frames[i])
        frames = entry["frames"] - start
        if parts and declared > 0:
            frames = min(frames, declared)
        if frames < 1:
            continue
        numbers = [start, frames] if parts else [frames]
        row = [targets[records.path(i)], *map(str, numbers), *map(str, records.labels_of(i))]
        lines.append(blank.join(row) + "\n")
    return lines
