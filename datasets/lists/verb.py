"""`python main.py lists DATA_SET`: write list files from official annotations and a folder of videos, with coverage.

It writes to --out: train.txt, val.txt (and test.txt if the annotations have one), lines of `path label` with labels
from 0; classInd.txt; missing_train.txt and so on, the samples without a video; coverage.json, how many videos of each
class were found. Without --force it replaces no file by a different one.

With --drop or --relabel it corrects a list instead: datasets/lists/correct.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.lists import correct
from datasets.lists.class_names import read_class_names
from datasets.lists.files import Media, best, by_name, walk
from datasets.lists.formats import fits_a_line
from datasets.lists.official import READ, Annotations, Item, read, read_folds, reorder
from datasets.loading.bad_media import printable
from utils import files
from utils.errors import UserError, listed
from utils.options import Parser

_WORST = 10  # classes named in the terminal
_MARKS = (" ", ",", "\t")  # separators of list files


def main(argv: Sequence[str]) -> int:
    """Run the verb. Return 0."""
    # Two verbs share one name: with corrections the first argument is a list, not a data set.
    if any(word.partition("=")[0] in ("--drop", "--relabel") for word in argv):
        return correct.main(argv)
    args = _arguments(argv)

    # Find the videos.
    everything = list(walk(args.root))
    media = [one for one in everything if fits_a_line(os.fsencode(one.path))]
    if not media:
        raise UserError(f"--root: there is no video and no folder of frames below {args.root}")
    torn = [printable(repr(one.path)) for one in everything if not fits_a_line(os.fsencode(one.path))]

    # Read which videos there should be.
    if args.data_set == "folder":
        annotations = from_folders(media, args.root, share=args.val_share, group=args.group, seed=args.seed)
    elif args.split == "all":
        annotations = read_folds(args.data_set, args.annotations)
    else:
        annotations = read(args.data_set, args.annotations, int(args.split))
    if args.classes:
        count = sum(bool(line.strip()) for line in _bytes(args.classes).splitlines())
        reorder(annotations, _class_names(args.classes, count), args.classes)

    # Match the two, and write the lists.
    files, coverage = lists(annotations, media, store=args.store, fps=args.segments)
    publish({args.out / name: data for name, data in files.items()}, force=args.force)
    print("\n".join(in_words(coverage, args.out, str(args.root))))

    if torn:
        more = ", ..." if len(torn) > _WORST else ""
        print(f"left out, since their names hold a line feed ({len(torn)}): {', '.join(torn[:_WORST])}{more}")
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="main.py lists",
        description="write the list files of a data set, and report missing videos",
        epilog="main.py lists LIST --drop TABLE --relabel TABLE --out NEW corrects the labels of a list",
    )

    add = parser.add_argument
    add("data_set", choices=[*READ, "folder"], help="folder: CLASS/video or train/CLASS/video, without annotations")
    add(
        "--annotations",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="the official files, or the folder that contains them",
    )
    add("--root", required=True, metavar="DIR", help="folder of the videos or frames, searched recursively")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the lists")
    add(
        "--split",
        choices=("1", "2", "3", "all"),
        default="1",
        help="ucf101, hmdb51: one split, or all of them as folds (1)",
    )
    add("--store", choices=("video", "frames"), help="which to use if both exist (default: the more frequent)")
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="number the classes as this file does (default: sorted, or official)",
    )
    add(
        "--segments",
        type=float,
        metavar="FPS",
        help="activitynet: one record per segment, in folders with FPS frames/s",
    )
    add("--val-share", type=float, default=0.2, metavar="X", help="folder: share of the validation videos (0.2)")
    add("--group", metavar="REGEX", help="folder: videos that match with the same text stay in one list")
    add("--seed", type=int, default=0, help="folder: random seed of the split (0)")
    add("--force", action="store_true", help="overwrite lists that differ")

    args = parser.parse_args(argv)
    # Options that need another option, or only make sense with one data set.
    if args.data_set != "folder" and not args.annotations:
        raise UserError(f"--annotations: {args.data_set} needs its official files; docs/data.md lists them")
    if args.split == "all" and args.data_set not in ("ucf101", "hmdb51"):
        raise UserError(f"--split all: {args.data_set} has no three official splits; ucf101 and hmdb51 have")
    if args.segments is not None and args.data_set != "activitynet":
        raise UserError("--segments: frames per second, for activitynet only")
    if args.segments is not None and not (math.isfinite(args.segments) and args.segments > 0):
        raise UserError(f"--segments {args.segments:g}: give frames per second, above 0")
    if not 0 < args.val_share < 1:
        raise UserError("--val-share must lie between 0 and 1")
    return args


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"--classes: {file}: {error.strerror}") from error


def _class_names(file: Path, count: int) -> list[str]:
    try:
        return read_class_names(file, count)
    except UserError:
        return read_class_names(file, count - 1)  # the file has a header line


def lists(
    annotations: Annotations, media: Sequence[Media], *, store: str | None, fps: float | None
) -> tuple[dict[str, bytes], files.Row]:
    """Match annotations with videos. Return list files and coverage.

    Args:
        annotations: the samples of the data set.
        media: the videos below the root.
        store: "video" or "frames"; None takes the kind that more samples have.
        fps: frame rate of the frame folders, to list their segments; None lists whole videos.

    Returns:
        File name -> content, and the content of coverage.json.

    Raises:
        UserError: no sample has a file, or a line of text cannot hold the name of a class.
    """
    _check_classes(annotations.classes)
    items = [item for split in annotations.splits.values() for item in split]
    videos = by_name(media, {name for item in items for name in item.names})
    kinds = Counter(one.kind for several in videos.values() for one in several)
    if not kinds:
        there = ", ".join(one.path for one in media[:3])
        raise UserError(
            f"none of the {len(items)} samples is below the root: looked for names such as {items[0].names[0]!r} "
            f"({items[0].where}), found {there}"
        )

    # A list has one kind of videos, since a reader reads one kind.
    kind = store or kinds.most_common(1)[0][0]
    files: dict[str, bytes] = {}
    coverage: files.Row = {"store": kind, "unlabelled": annotations.unlabelled, "splits": {}}
    coverage["groups"] = annotations.groups
    used: set[str] = set()

    for split, split_items in annotations.splits.items():
        rows, missing, ambiguous = _resolve(split_items, videos, kind, split)
        used.update(path for path, _ in rows)
        files[f"{split}.txt"] = _list_text(rows, annotations.classes, fps)
        # Name, class and line of each missing sample, so that a script can fetch them.
        files[f"missing_{split}.txt"] = "".join(
            f"{_in_a_line(item.names[0])}\t{item.class_name}\t{_in_a_line(item.where)}\n" for item in missing
        ).encode("utf-8", "surrogateescape")
        coverage["splits"][split] = _coverage(rows, missing, ambiguous, annotations.classes)

    coverage["not_in_the_annotations"] = sum(one.kind == kind and one.path not in used for one in media)
    files["classInd.txt"] = "".join(f"{label} {name}\n" for label, name in enumerate(annotations.classes)).encode(
        "utf-8", "surrogateescape"
    )
    files["coverage.json"] = json.dumps(coverage, indent=1).encode("ascii")

    return files, coverage


def _check_classes(classes: Iterable[str]) -> None:
    for name in classes:
        try:
            fits = fits_a_line(os.fsencode(name))
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
            fits = False
        if not fits:
            raise UserError(f"the class name {name!r} of the annotations does not fit into a line of text; change it")


def _resolve(
    items: Sequence[Item], videos: Mapping[str, list[Media]], kind: str, split: str
) -> tuple[list[tuple[str, Item]], list[Item], int]:
    """Return (path, item) of the samples with a video, the samples without one, and how many have several files."""
    rows: list[tuple[str, Item]] = []
    missing: list[Item] = []
    ambiguous = 0

    for item in items:
        candidates: list[Media] = []
        # The names are in order of preference: the first that has files counts.
        for name in item.names:
            candidates = candidates or [one for one in videos.get(name, ()) if one.kind == kind]
        if not candidates:
            missing.append(item)
            continue
        ambiguous += len(candidates) > 1
        rows.append((best(candidates, item.class_name, split).path, item))

    return rows, missing, ambiguous


def _in_a_line(text: str) -> str:
    """Return a text of the annotations, which may hold anything, so that it fits into a line for people."""
    is_one_line = "\n" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)
    return text if is_one_line else ascii(text)


def _list_text(rows: Sequence[tuple[str, Item]], classes: Sequence[str], fps: float | None) -> bytes:
    """Return a list file: `path label`, or `path offset num_frames label` for segments; each line once."""
    labels = {name: label for label, name in enumerate(classes)}
    # A space or a comma in a path is only unambiguous between tabs.
    separator = "\t" if any(mark in path for path, _ in rows for mark in _MARKS) else " "
    lines: dict[str, None] = {}  # a set that keeps its order

    for path, item in rows:
        fields = [path]
        # A segment [seconds] becomes a range of frames with at least one frame.
        if fps is not None and item.segment is not None:
            first = int(item.segment[0] * fps)
            count = max(1, int(item.segment[1] * fps) - first)
            if first < 0 or first + count >= 2**31:
                start, end = item.segment
                raise UserError(
                    f"{item.where}: at --segments {fps:g} frames/s the segment from {start:g} to {end:g} s has frame "
                    "numbers below 0 or beyond 32 bits"
                )
            fields += [str(first), str(count)]
        lines[separator.join([*fields, str(labels[item.class_name])])] = None

    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def _coverage(
    rows: Sequence[tuple[str, Item]], missing: Sequence[Item], ambiguous: int, classes: Sequence[str]
) -> files.Row:
    there, gone = (Counter(item.class_name for item in items) for items in ([item for _, item in rows], missing))

    return {
        "wanted": len(rows) + len(missing),
        "found": len(rows),
        "several_files": ambiguous,
        "classes": {name: [there[name], there[name] + gone[name]] for name in classes},
    }


def publish(contents: Mapping[Path, bytes], *, force: bool) -> None:
    """Write all files, or none if a file exists with other content, unless forced."""
    try:
        differing = [path for path, data in contents.items() if path.exists() and path.read_bytes() != data]
        if differing and not force:
            names = ", ".join(str(path) for path in differing)
            raise UserError(f"--out: {names} would change; choose another folder, or replace them with --force")

        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, data)
    except OSError as error:
        raise UserError(f"--out: {error.filename}: {error.strerror}") from error


def in_words(coverage: Mapping[str, Any], out: Path, root: str = "DIR") -> list[str]:
    """Return the coverage as lines for the terminal; `root` is the root to show in the next command."""
    # One paragraph for each list.
    lines = []
    for split, part in coverage["splits"].items():
        # Round down: a list that lacks a video must not show 100 %.
        share = 10_000 * part["found"] // max(1, part["wanted"]) / 100
        lines.append(f"{out / split}.txt: {part['found']} of {part['wanted']} samples ({share:g} %)")

        short = {name: pair for name, pair in part["classes"].items() if pair[0] < pair[1]}
        worst = sorted(short.items(), key=lambda item: (item[1][0] / item[1][1], item[0]))[:_WORST]
        lines += [f"  {printable(name)}: {there} of {expected}" for name, (there, expected) in worst]
        if short:
            lines.append(f"  {len(short)} classes lack videos, all named in {out / f'missing_{split}.txt'}")

        absent = [printable(name) for name, (_, expected) in part["classes"].items() if not expected]
        if absent:
            lines.append(f"  {listed('no video of', absent)}")

        if part["several_files"]:
            lines.append(
                f"  {part['several_files']} names were found more than once; the one in its class's folder counts"
            )

    # What concerns all lists together.
    if coverage.get("groups"):
        groups, alone = coverage["groups"]
        rest = f"; {alone} videos without a match each form a group of their own" if alone else ""
        lines.append(f"{groups} groups, none of them in both lists{rest}")
    if coverage["unlabelled"]:
        lines.append(f"{coverage['unlabelled']} samples of the annotations have no label and are left out")
    if coverage["not_in_the_annotations"]:
        lines.append(f"{coverage['not_in_the_annotations']} videos below the root are in no list")

    # The next step of the user: a scan of the lists for training and validation.
    reader = coverage["store"]
    names = [split for split in coverage["splits"] if split != "test"]
    words = ["python", "main.py", "scan", *(str(out / f"{name}.txt") for name in names), "--root", root]
    lines.append(f"data.reader: {reader}; next: {shlex.join(words)}")
    return lines


def from_folders(media: Iterable[Media], root: str, *, share: float, group: str | None, seed: int) -> Annotations:
    """Read a data set that is ordered by folders: CLASS/..., or train/CLASS/... and val/CLASS/....

    Without folders for the splits, `share` of the videos become the validation list. They are drawn for each class, or
    in whole groups, by a hash of their names, so that the draw does not change when videos are added elsewhere.

    Args:
        media: the videos below the root.
        root: the root, for messages.
        share: share of the validation videos.
        group: pattern whose match (or first group) in a path names what must stay together, such as a person.
        seed: a different seed gives a different draw.
    """
    parts = [(one, one.path.split("/")) for one in media]
    names = {path[0].lower() for _, path in parts}
    given = {name for name in names if name in ("train", "training", "val", "valid", "validation", "test", "testing")}

    # A class may be called `test`: the first folders are splits only if all of them are.
    level = 1 if given and given == names else 0
    shallow = next((path for _, path in parts if len(path) < level + 2), None)
    if shallow:
        raise UserError(f"--root: {os.path.join(root, *shallow)} is not in a class folder")

    items = [(path[0].lower(), Item((one.path,), path[level], one.path)) for one, path in parts]
    groups = None
    if level:
        if group:
            raise UserError("--group: the split folders already determine the list of each video; leave --group out")
        splits: dict[str, list[Item]] = {}
        for split, item in items:
            splits.setdefault(
                "train" if split.startswith("tr") else "val" if split.startswith("v") else "test", []
            ).append(item)
    else:
        splits, groups = _draw([item for _, item in items], share, group, seed)

    return Annotations(sorted({item.class_name for _, item in items}), splits, groups=groups)


def _draw(
    items: Sequence[Item], share: float, group: str | None, seed: int
) -> tuple[dict[str, list[Item]], tuple[int, int] | None]:
    """Return the two lists, and with `group` the number of groups and of videos without a match."""
    try:
        pattern = re.compile(group) if group else None
    except re.error as error:
        raise UserError(f"--group: {group!r} is not a pattern ({error})") from error

    # Videos that stay together. A video without a match is alone.
    bunches: dict[tuple[str, str], list[Item]] = {}
    alone = 0
    for item in items:
        match = pattern.search(item.where) if pattern else None
        alone += match is None
        name = (match[1] if match.re.groups else match[0]) if match else item.where
        # With groups there is one draw for all classes: a group may have several.
        bunches.setdefault(("" if pattern else item.class_name, name), []).append(item)

    if pattern and alone == len(items):
        raise UserError(f"--group: {group!r} finds nothing in any path, for example not in {items[0].where}")

    def drawn(key: tuple[str, str]) -> bytes:
        text = f"{seed} {key[0]} {key[1]}".encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, digest_size=8).digest()

    val: set[str] = set()
    for scope in sorted({key[0] for key in bunches}):
        keys = sorted((key for key in bunches if key[0] == scope), key=drawn)
        total, taken = sum(len(bunches[key]) for key in keys), 0
        for key in keys[:-1]:  # the last stays: no class and no draw without training videos
            if taken >= max(1, round(share * total)):
                break
            val.update(item.where for item in bunches[key])
            taken += len(bunches[key])

    splits = {
        "train": [item for item in items if item.where not in val],
        "val": [item for item in items if item.where in val],
    }

    return splits, (len(bunches) - alone, alone) if pattern else None
