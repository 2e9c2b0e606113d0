"""Find files that hold the same video, since a copy in the validation list makes an accuracy worthless."""

from __future__ import annotations

import os

from datasets.lists.records import Records
from datasets.loading.messages import Look
from datasets.readers.spec import ReaderSpec
from datasets.scan.journal import ScanEntry
from datasets.scan.work import ask


def same_content(
    lists: list[Records], entries: list[list[ScanEntry]], spec: ReaderSpec, *, workers: int, deadline: float
) -> list[ScanEntry]:
    """Return groups of files that hold the same video, within a list or across lists.

    A group has the same file, the same bytes or, if frames were decoded, the same pictures: equal number of
    frames, frame size, and first, middle and last picture (a copy in another container). To compare bytes, only files
    of equal size are read, and three frame files of each folder.

    Returns:
        {"how": "file", "bytes" or "pictures", "members": [(list, record), ...]}: one file in several lists, or at least
        two files.
    """
    # Real paths, so that a link counts as the file that it names.
    by_path: dict[str, tuple[int, int]] = {}
    others: dict[str, dict[int, tuple[int, int]]] = {}  # path -> list -> its first record in that list

    for number, records in enumerate(lists):
        for i in range(len(records)):
            path = os.path.realpath(records.full_path(i))
            if not entries[number][i]["bad"]:
                by_path.setdefault(path, (number, i))
            others.setdefault(path, {}).setdefault(number, (number, i))

    # The same file in several lists, bad or not.
    groups = [{"how": "file", "members": list(places.values())} for places in others.values() if len(places) > 1]
    groups += _digests(lists, entries, list(by_path.values()), spec, workers, deadline)

    # The same pictures in files with different bytes.
    pictures: dict[str, list[tuple[int, int]]] = {}
    for number, i in by_path.values():
        if entries[number][i].get("pictures"):
            pictures.setdefault(entries[number][i]["pictures"], []).append((number, i))

    # A group that bytes have already shown is not listed twice.
    known = {frozenset(group["members"]) for group in groups}
    for members in pictures.values():
        if len(members) > 1 and frozenset(members) not in known:
            groups.append({"how": "pictures", "members": members})

    return groups


def _digests(
    lists: list[Records],
    entries: list[list[ScanEntry]],
    members: list[tuple[int, int]],
    spec: ReaderSpec,
    workers: int,
    deadline: float,
) -> list[ScanEntry]:
    """Return groups with equal bytes among the members that their size does not distinguish."""
    # Folders have no size of their own: compare the number of frames and the size of the first file.
    sizes: dict[object, list[tuple[int, int]]] = {}
    for number, i in members:
        entry = entries[number][i]
        folder = (entry["frames"], entry["stamp"][3]) if entry["kind"] == "folder" else None
        sizes.setdefault(folder or entry["stamp"][0], []).append((number, i))

    digests: dict[str, list[tuple[int, int]]] = {}
    for number, records in enumerate(lists):
        # A file with a unique size need not be read.
        chosen = [i for group in sizes.values() if len(group) > 1 for owner, i in group if owner == number]
        tasks = [Look(i, "digest", names=_three(entries[number][i])) for i in chosen]
        for i, answer in ask(records, spec, tasks, workers, deadline):
            if answer.get("digest"):
                entry = entries[number][i]
                digests.setdefault(f"{entry['kind']} {entry['frames']} {answer['digest']}", []).append((number, i))

    return [{"how": "bytes", "members": sorted(group)} for group in digests.values() if len(group) > 1]


def _three(entry: ScanEntry) -> tuple[str, ...]:
    """Return the first, middle and last frame file of a folder; nothing for a file."""
    if entry["kind"] != "folder":
        return ()

    # The number keeps its leading zeros, as in the name of the first file.
    stem, suffix = os.path.splitext(entry["first"])
    digits = len(stem) - len(stem.rstrip("0123456789"))
    prefix, first = stem[: len(stem) - digits], int(stem[len(stem) - digits :])

    ordinals = sorted({0, entry["frames"] // 2, entry["frames"] - 1})
    return tuple(f"{prefix}{first + ordinal:0{digits}d}{suffix}" for ordinal in ordinals)
