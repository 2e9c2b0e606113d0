"""Folds: pairs of lists, each with different held-out videos, and the groups that must not be divided.

A fold is a pair of list files, `foldNN_train.txt` and `foldNN_val.txt`. They are published lists, or lists that `of`
writes. The fold of a video depends on the lists and the pattern alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datasets.lists.records import Records
from datasets.loading.bad_media import printable
from utils import files
from utils.errors import UserError, listed

if TYPE_CHECKING:
    from utils.config import Config

MOST = 1000  # folds: each one is a training run of the experiment
_NAME = re.compile(r"fold(\d+)_(train|val)\.txt")
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Fold:
    """One fold.

    Attributes:
        name: number of the fold, as in the names of its lists.
        train, val: list files, absolute.
        root: folder of the paths of both; None for the folders in the config.
    """

    name: str
    train: Path
    val: Path
    root: str | None = None


def of(cfg: Config, folder: Path) -> list[Fold]:
    """Return the folds that a config describes, in order. Write the list files that do not exist yet.

    Args:
        cfg: a config with `data.folds`.
        folder: folder for the lists that are written.

    Raises:
        UserError: there are no such lists, the groups are not folds, or lists in `folder` are of another division.
    """
    if cfg.data.folds == "lists":
        return beside(Path(cfg.train_source))

    records = _all_records(cfg)
    paths = [one.path(i) for one, i in records]
    groups = groups_of(paths, cfg.data.fold_group)

    # Either each group is a fold, or the groups are spread over a number of folds.
    if cfg.data.folds == "groups":
        places = _one_each(paths, groups, str(cfg.data.fold_group))
    else:
        places = assign(groups or paths, [int(one.labels[i]) for one, i in records], int(cfg.data.folds or 0))
    count = int(places.max()) + 1

    contents: dict[Path, bytes] = {}
    folds = []
    for number in range(count):
        # Numbers of equal width, so that the names sort in the order of the folds.
        name = f"{number + 1:0{max(2, len(str(count)))}d}"
        fold = Fold(name, folder / f"fold{name}_train.txt", folder / f"fold{name}_val.txt", records[0][0].root)
        for file, chosen in ((fold.train, places != number), (fold.val, places == number)):
            rows = [row for row, is_in in zip(records, chosen, strict=True) if is_in]
            contents[file] = list_text(rows, cfg.data.list_layout)

        folds.append(fold)
    _write(folder, contents)
    return folds


def beside(source: Path) -> list[Fold]:
    """Return the folds whose lists are in the same folder as a list.

    Raises:
        UserError: there are fewer than two pairs, or one half of a pair is missing.
    """
    pairs: dict[str, dict[str, Path]] = {}
    for file in source.parent.iterdir() if source.parent.is_dir() else ():
        if match := _NAME.fullmatch(file.name):
            pairs.setdefault(match[1], {})[match[2]] = file

    # A list without its partner was probably named wrongly.
    lone = [str(pair.get("train") or pair["val"]) for pair in pairs.values() if len(pair) == 1]
    if lone:
        raise UserError(
            f"data.folds: {sorted(lone)[0]} has no partner; each fold needs foldNN_train.txt and foldNN_val.txt"
        )
    if len(pairs) < 2:
        raise UserError(
            f"data.folds: {source.parent} holds {len(pairs)} pairs of foldNN_train.txt and foldNN_val.txt; lists needs "
            "at least two, next to train_source"
        )

    return [
        Fold(name, pairs[name]["train"].absolute(), pairs[name]["val"].absolute()) for name in sorted(pairs, key=int)
    ]


def groups_of(paths: Sequence[str], pattern: str | None) -> list[str] | None:
    """Return the group of each path: the text that a pattern finds in it, or its first group; None without a pattern.

    A path without a match is alone in its group. Raise UserError if no path matches.
    """
    if pattern is None:
        return None

    compiled = re.compile(pattern)
    matches = [compiled.search(path) for path in paths]
    if not any(matches):
        raise UserError(f"the pattern {pattern!r} finds nothing in any path, for example {printable(paths[0])}")

    # The prefixes keep a path without a match apart from a group of the same text.
    return [
        f"group {match[1] if compiled.groups else match[0]}" if match else f"path {path}"
        for path, match in zip(paths, matches, strict=True)
    ]


def assign(groups: Sequence[Hashable], labels: Sequence[int], count: int) -> np.ndarray:
    """Divide videos into `count` folds: no group in two of them, the videos of each class spread evenly.

    The largest group is placed first, each group in the fold that has the fewest of its classes so far. Groups of equal
    size are placed in the order of a hash of their names, so that the order of the list has no influence.

    Args:
        groups: (N,) the group of each video.
        labels: (N,) the class of each video.
        count: number of folds.

    Returns:
        (N,) numbers of folds, from 0.

    Raises:
        UserError: there are fewer groups than folds.
    """
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    if len(members) < count:
        raise UserError(f"{len(members)} groups cannot make {count} folds; make at most {len(members)}")

    own_labels = np.array(labels)
    totals = np.bincount(own_labels)
    taken = np.zeros((count, len(totals)))  # videos of each class that each fold has so far
    places = np.zeros(len(labels), np.int64)

    for rows in sorted(members.values(), key=lambda rows: (-len(rows), _hash(str(groups[rows[0]])))):
        counts = np.bincount(own_labels[rows], minlength=len(totals))
        # The share of each class that a fold has, weighted by the videos of the class in this group.
        crowded = taken @ (counts / np.maximum(totals, 1))
        place = min(range(count), key=lambda fold: (crowded[fold], taken[fold].sum()))
        places[rows] = place
        taken[place] += counts

    return places


def untrained(folds: Iterable[Fold], cfg: Config) -> list[str]:
    """Return a warning for each fold that holds out all videos of a class, so that it cannot learn this class."""
    warnings = []
    for fold in folds:
        train, val = (
            Records.load(file, fold.root or root, num_class=cfg.model.num_class, layout=cfg.data.list_layout)
            for file, root in ((fold.train, cfg.train_root), (fold.val, cfg.val_root))
        )

        lacking = sorted(set(val.labels.tolist()) - set(train.labels.tolist()))
        if lacking:
            classes = listed("class", map(str, lacking), most=5)
            warnings.append(f"WARNING: fold {fold.name} holds out all videos of {classes}; they count as wrong")
    return warnings


def natural(path: str) -> list[tuple[int, str]]:
    """Return a key that sorts by the numbers in a path: `clip2` before `clip10`."""
    parts = _NUMBER.split(path)  # text and numbers in turn
    return [(int(part), "") if number % 2 else (0, part) for number, part in enumerate(parts)]


def list_text(rows: Sequence[tuple[Records, int]], layout: str) -> bytes:
    """Return a list file of some records, fields separated by tabs, with the frame counts and starts of their lists."""
    # All lines have the same fields, so frame counts are written only if every record has one.
    has_starts = layout == "auto" and any(one.has_parts for one, _ in rows)
    has_frames = has_starts or layout == "path_frames_labels" or all(one.frames[i] >= 0 for one, i in rows)

    lines = []
    for one, i in rows:
        numbers = [int(one.starts[i])] if has_starts else []
        numbers += [int(one.frames[i])] if has_frames and layout != "path_labels" else []
        labels = one.labels_of(i).tolist()
        lines.append("\t".join([one.path(i), *map(str, numbers + labels)]))

    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def _all_records(cfg: Config) -> list[tuple[Records, int]]:
    """Return every record of both lists once, by path and start."""
    lists = {cfg.train_source: cfg.train_root, cfg.val_source: cfg.val_root}
    if len({os.path.realpath(root) for root in lists.values()}) > 1:
        raise UserError("data.folds: train_root and val_root differ; folds need one root, in front of all paths")

    unique: dict[tuple[str, int], tuple[Records, int]] = {}
    for source, root in lists.items():
        records = Records.load(source, root, num_class=cfg.model.num_class, layout=cfg.data.list_layout)
        for i in range(len(records)):
            unique.setdefault((records.path(i), int(records.starts[i])), (records, i))
    return list(unique.values())


def _one_each(paths: Sequence[str], groups: Sequence[str] | None, pattern: str) -> np.ndarray:
    """Return the fold of each video if every group is a fold, in natural order of the groups."""
    assert groups is not None  # a rule of the config
    alone = [path for path, group in zip(paths, groups, strict=True) if group == f"path {path}"]

    names = sorted(set(groups), key=natural)
    # A video without a group would be a fold of one video.
    if alone or not 2 <= len(names) <= MOST:
        what = f"finds nothing in {printable(alone[0])}" if alone else f"finds {len(names)} groups, not 2 to {MOST}"
        raise UserError(f"data.fold_group: {pattern!r} {what}; leaving one group out needs the group of each video")

    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[group] for group in groups])


def _hash(text: str) -> bytes:
    # Not `hash`, which differs from process to process.
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _write(folder: Path, contents: dict[Path, bytes]) -> None:
    """Write lists. Refuse a folder that holds the lists of another division."""
    try:
        there = {file for file in folder.glob("fold*.txt") if _NAME.fullmatch(file.name)}
        # Trained folds belong to these lists: other lists would mix two divisions in one experiment.
        if any(file.read_bytes() != contents.get(file) for file in there):
            raise UserError(
                f"{folder}: holds the lists of other folds; the videos or data.folds have changed since. Move "
                f"{folder.parent} away to start over"
            )

        folder.mkdir(parents=True, exist_ok=True)
        for file, data in contents.items():
            if file not in there:
                files.write(file, data)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from error
