"""Divide videos into training and held-out ones, with no person, source or copy on both sides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anal_tools.start.videos import Samples, Video
from datasets.lists.folds import assign, groups_of, natural
from datasets.loading.bad_media import printable
from utils.errors import UserError, listed

TRAINED, HELD_OUT = ("train", "training"), ("val", "valid", "validation", "test", "testing", "dev", "eval", "holdout")
FOLDS = 5  # one of them is held out without --folds
_SAME_PART = 0.9  # share of videos whose part of the name must also occur in another class


@dataclass(frozen=True)
class Split:
    """The division of N videos.

    Attributes:
        places: (N,) number of the fold in which each is held out; for a given split, 0 for val and 1 for train.
        why: how the groups were found, for a reader.
        groups: (N,) group of each; None if there are no groups.
    """

    places: np.ndarray
    why: str
    groups: list[str] | None = None


def divide(
    samples: Samples, copies: Sequence[Sequence[int]], *, group: str | None, count: int, at_most: bool = False
) -> Split:
    """Divide the videos into folds. Copies of one video are one group, and so are the clips of one video.

    Args:
        samples: the samples.
        copies: rows of the videos that are the same.
        group: the user's pattern; "" for no groups, None to look for a part of the names that is a group.
        count: number of folds.
        at_most: make fewer folds if there are fewer groups.

    Raises:
        UserError: a class could not be both trained and validated, or copies contradict each other.
    """
    videos = samples.videos
    _check_copies(samples, copies)

    if any(one.split for one in videos):
        return _checked(samples, _given(samples, copies), "")

    # Groups, joined where copies or clips connect them
    groups, why = _groups(samples, group)
    kin = [*copies, *_of_one_source(videos)]
    numbers = {name: number for number, name in enumerate(samples.classes)}
    labels = [numbers[one.label] for one in videos]
    if groups is None:
        parent = _joined([f"{one.path} {one.first}" for one in videos], kin)
        return _checked(samples, Split(_blocks(videos, labels, parent, count), why), "")

    parent = _joined(groups, kin)
    if at_most:
        count = max(2, min(count, len(set(parent))))
    try:
        split = Split(assign(parent, labels, count), why, groups)
        return _checked(samples, split, f" in different groups ({why})")
    except UserError:
        if group is not None or any(one.group for one in videos):
            raise
        # The guessed groups leave a class on one side
        split = divide(samples, copies, group="", count=count)
        why = "groups by names would leave a class on one side, so only neighbours by name stay together"
        return Split(split.places, f"{why}; a person or a recording may be on both sides")


def _given(samples: Samples, copies: Sequence[Sequence[int]]) -> Split:
    """Return the split that the folders or the table give."""
    videos = samples.videos
    unknown = next((one for one in videos if one.split.lower() not in TRAINED + HELD_OUT), None)
    if unknown is not None:
        raise UserError(
            f"{printable(unknown.path)}: its split is {unknown.split!r}; use one of {', '.join(TRAINED + HELD_OUT)}"
        )

    places = np.array([0 if one.split.lower() in HELD_OUT else 1 for one in videos])
    across = next((rows for rows in copies if len({places[row] for row in rows}) > 1), None)
    if across is not None:
        names = " and ".join(printable(videos[row].path) for row in across[:2])
        raise UserError(f"{names} are the same video, one for training and one for validation; remove one of them")

    # The user's split is kept, whatever it does to the groups; the accuracy may then be that of known persons
    trained, held_out = (
        {one.group for one, place in zip(videos, places, strict=True) if place == side} for side in (1, 0)
    )
    both = sorted(trained & held_out - {""}, key=natural)
    note = f"; {listed(f'both sides have the {samples.group_column}', both)}" if both else ""
    return Split(places, f"as given by the folders or the table{note}")


def _groups(samples: Samples, pattern: str | None) -> tuple[list[str] | None, str]:
    videos = samples.videos
    paths = [one.path for one in videos]
    if pattern is None and any(one.group for one in videos):
        # An empty cell is a group of its own
        groups = [one.group or one.path for one in videos]
        return groups, f"{len(set(groups))} groups by the column {samples.group_column!r}, each on one side"
    if pattern:
        groups = groups_of(paths, pattern)
        return groups, f"{len(set(groups or ()))} groups by --group {pattern!r}, each on one side"

    # Clips of one recording: of one file, or of files that hold the same video
    sources = [one.source or one.path for one in videos]
    are_clips = any(one.start is not None or one.end is not None for one in videos)
    if len(set(paths)) < len(paths) or (are_clips and len(set(sources)) < len(sources)):
        return sources, f"the clips of each of the {len(set(sources))} files stay on one side"

    guess = None if pattern == "" else guessed(videos)
    if guess is not None:
        shown = ", ".join(sorted(set(guess), key=natural)[:4])
        return (
            guess,
            f"{len(set(guess))} groups by a part of the names that all classes share ({shown}, ...), each on one side",
        )
    return None, (
        "no groups in the names: neighbours by name stay together; if a person or a recording has several videos, name "
        "them: --group 'person[0-9]+'"
    )


def guessed(videos: Sequence[Video]) -> list[str] | None:
    """Return the part of each file name that recurs in several classes: a person, a camera, a recording.

    Parts are the text between `_ - .` and spaces, counted from either end. A number that counts videos is not a group.
    If there are several such parts, use the one with the most values.
    """
    stems = [re.split(r"[_\-. ]+", re.sub(r"\.[^.]*$", "", one.path.rsplit("/", 1)[-1])) for one in videos]

    shortest = min(len(parts) for parts in stems)
    best: list[str] | None = None
    for place in [*range(shortest), *range(-shortest, 0)]:
        values = [parts[place] for parts in stems]
        classes: dict[str, set[str]] = {}
        for value, one in zip(values, videos, strict=True):
            classes.setdefault(value, set()).add(one.label)
        shared = sum(len(classes[value]) > 1 for value in values)
        # At least 3 groups with 2 videos on average, and nearly all videos in groups with several classes
        if not 3 <= len(classes) <= len(videos) / 2 or shared < _SAME_PART * len(videos) or _counts(stems, place):
            continue
        if best is None or len(classes) > len(set(best)):
            best = values

    return best


def _counts(stems: Sequence[Sequence[str]], place: int) -> bool:
    """Return True if a part of the names only counts the videos whose other parts are equal, up from 0 or 1.

    If every count ends at the same number, the number may well be a person.
    """
    sets: dict[tuple[str, ...], set[int]] = {}
    for parts in stems:
        if not parts[place].isdigit():
            return False
        rest = tuple(part for other, part in enumerate(parts) if other != place % len(parts))
        sets.setdefault(rest, set()).add(int(parts[place]))

    return (
        all(min(numbers) <= 1 for numbers in sets.values())
        and len({frozenset(numbers) for numbers in sets.values()}) > 1
    )


def _of_one_source(videos: Sequence[Video]) -> list[list[int]]:
    """Return the rows of the clips of each source: of one file, and of files that hold the same video."""
    rows_of: dict[str, list[int]] = {}
    for row, one in enumerate(videos):
        rows_of.setdefault(one.source or one.path, []).append(row)
    return [rows for rows in rows_of.values() if len(rows) > 1]


def _joined(groups: Sequence[str], copies: Sequence[Sequence[int]]) -> list[str]:
    """Return the groups, with those that share a copy joined into one."""
    # Union-find without path compression: copies are few, so chains are short
    parent = {group: group for group in groups}

    def root(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    for rows in copies:
        for row in rows[1:]:
            parent[root(groups[row])] = root(groups[rows[0]])
    return [root(group) for group in groups]


def _blocks(videos: Sequence[Video], labels: Sequence[int], groups: Sequence[str], count: int) -> np.ndarray:
    """Return the folds of videos without groups: in each class, runs of neighbours in the order of their names."""
    places = np.zeros(len(videos), np.int64)

    rows_of: dict[int, list[int]] = {}
    for row in sorted(range(len(videos)), key=lambda row: natural(videos[row].path)):
        rows_of.setdefault(labels[row], []).append(row)

    for rows in rows_of.values():
        # A unit is a video, or videos that must stay together
        units = {group: number for number, group in enumerate(dict.fromkeys(groups[row] for row in rows))}
        for row in rows:
            number = units[groups[row]]
            # Fewer units than folds: one each
            places[row] = number * count // len(units) if len(units) >= count else number
    return places


def _check_copies(samples: Samples, copies: Sequence[Sequence[int]]) -> None:
    for rows in copies:
        labels = {samples.videos[row].label for row in rows}
        if len(labels) > 1:
            names = " and ".join(
                f"{printable(samples.videos[row].path)} ({samples.videos[row].label})" for row in rows[:2]
            )
            raise UserError(f"{names} are the same video with different classes; remove one of them")


def _checked(samples: Samples, split: Split, how: str) -> Split:
    """Return the division; refuse one in which a class has only one side."""
    places_of: dict[str, list[int]] = {name: [] for name in samples.classes}
    for one, place in zip(samples.videos, split.places.tolist(), strict=True):
        places_of[one.label].append(place)

    short = [f"{name} ({len(places)} videos)" for name, places in places_of.items() if len(set(places)) < 2]
    if short:
        raise UserError(
            f"{listed('no validation is possible for the class', short)}: each class needs at least 2 readable "
            f"videos{how}, one for training and one for validation; add videos, or --leave-out CLASS"
        )
    return split


def held_out(places: np.ndarray, labels: Sequence[int], first: int) -> int:
    """Return the fold to hold out: the first one, starting at `first`, with the most classes on both sides."""
    count = int(places.max()) + 1
    all_labels = np.array(labels)

    def classes(fold: int) -> int:
        return len(set(all_labels[places == fold]) & set(all_labels[places != fold]))

    best = max(classes(fold) for fold in range(count))
    return next(fold % count for fold in range(first, first + count) if classes(fold % count) == best)
