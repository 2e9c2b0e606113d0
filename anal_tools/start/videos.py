"""Find the samples in a folder of videos: paths and classes, from class folders or a table."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets.lists.class_names import read_class_names
from datasets.lists.files import Media, letters, walk
from datasets.lists.formats import fits_a_line
from datasets.lists.verb import from_folders
from datasets.loading.bad_media import printable
from utils.errors import UserError, counted, listed

# Names of columns
_PATHS = ("path", "video", "file", "filename", "name", "clip", "video_path")
_LABELS = ("label", "class", "category", "action", "class_name")
_STARTS, _ENDS = (
    ("start", "begin", "start_time", "time_start", "t_start"),
    ("end", "stop", "end_time", "time_end", "t_end"),
)
_GROUPS = ("group", "person", "subject", "actor", "participant")
_NAMES_SHARE = 0.8  # share of names that must hold their own class before another class in a name means anything
_SHORTEST_NAME = 4  # letters of a class that is looked for in file names; shorter ones occur by chance


@dataclass
class Video:
    """A sample.

    Attributes:
        path: below the root.
        label: name of its class.
        split: "train", "val" or "test" if the folders or the table give it, else "".
        group: from the column of the table, such as a person; videos of one group stay on one side. "" for none.
        start, end: the part in seconds; None for the whole video.
        first, frames: the part in frames, set once the file was examined; frames is -1 for the whole video.
        source: the first of the files that hold the same video as `path`, set once the files were examined.
    """

    path: str
    label: str
    split: str = ""
    group: str = ""
    start: float | None = None
    end: float | None = None
    first: int = 0
    frames: int = -1
    source: str = ""


@dataclass
class Samples:
    """The samples of a folder.

    Attributes:
        root: folder that the paths start from, absolute.
        kind: "video" or "frames".
        source: where the classes come from, for messages.
        videos: the samples.
        notes: lines about what was left out.
        classes: names in the order of their labels.
        group_column: the table's column that names the groups; "" for none.
    """

    root: str
    kind: str
    source: str
    videos: list[Video]
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    group_column: str = ""


def look(where: Path, leave_out: Sequence[str] = ()) -> Samples:
    """Find videos and their classes.

    Args:
        where: a folder of class folders, a folder with one table, or the table.
        leave_out: names of classes to leave out.

    Raises:
        UserError: there are no videos, or fewer than two classes.
    """
    if not where.exists():
        raise UserError(f"{where}: there is no such folder")

    root = where if where.is_dir() else where.parent
    # A list has a line for each path: odd characters would break it
    media = [one for one in walk(str(root)) if fits_a_line(os.fsencode(one.path))]
    if not media:
        hint = "" if where.is_dir() else "; put the table into the folder of the videos, or into one above it"
        raise UserError(f"{root}: contains neither videos nor folders of frames{hint}")
    # One reader reads all samples, so the rarer kind is left out
    kind = Counter(one.kind for one in media).most_common(1)[0][0]
    others = [one.path for one in media if one.kind != kind]
    media = [one for one in media if one.kind == kind]

    table = _table_of(where, media)
    samples = _from_table(table, str(root.resolve()), media, kind) if table else _from_folders(root, media, kind)
    if others:
        kinds = ["video files", "folders of frames"]
        kept, left = kinds if kind == "video" else kinds[::-1]
        samples.notes.append(listed(f"left out {len(others)} {left}, because most samples are {kept}", others[:3]))

    unknown = [name for name in leave_out if name not in samples.classes]
    if unknown:
        raise UserError(f"--leave-out {unknown[0]}: no such class; choose from {', '.join(samples.classes[:10])}")

    samples.videos = [one for one in samples.videos if one.label not in leave_out]
    samples.classes = [name for name in samples.classes if name not in leave_out]

    if len(samples.classes) < 2:
        raise UserError(
            f"{where}: {counted(len(samples.videos), 'video')}, all of one class, {samples.classes[0]!r}; a model "
            "needs at least two: make a folder for each class, FOLDER/CLASS/video"
        )
    return samples


def _table_of(where: Path, media: Sequence[Media]) -> Path | None:
    """Return the table that names the classes: the file itself, or the only one of a folder without class folders."""
    if where.is_file():
        return where

    shallow = any("/" not in one.path for one in media)
    tables = [
        path for path in sorted(where.iterdir()) if path.suffix.lower() in (".csv", ".tsv", ".txt") and _is_table(path)
    ]

    if len(tables) > 1 and shallow:
        raise UserError(
            f"{where}: {listed('several files could name the classes', (path.name for path in tables))}; give one of "
            "them instead of the folder"
        )
    # A table next to class folders is not the source of the classes
    return tables[0] if tables and (shallow or len({one.path.split("/")[0] for one in media}) == 1) else None


def _is_table(path: Path) -> bool:
    # Files that are often stored next to videos
    return not re.match(r"(classind|readme|licen[cs]e|requirements)", path.name.lower())


def _from_folders(root: Path, media: Sequence[Media], kind: str) -> Samples:
    if any("/" not in one.path for one in media):
        lone = next(one.path for one in media if "/" not in one.path)
        raise UserError(
            f"{root / printable(lone)}: is not in a class folder; make FOLDER/CLASS/video, or put a csv of path,label "
            f"into {root}"
        )

    # This split is used only if the folders define it, so share and seed do not matter
    annotations = from_folders(media, str(root), share=0.2, group=None, seed=0)
    names = {one.path.split("/")[0].lower() for one in media}
    given = all(re.fullmatch(r"train(ing)?|val(id|idation)?|test(ing)?", name) for name in names)
    videos = [
        Video(item.where, item.class_name, split if given else "")
        for split, items in annotations.splits.items()
        for item in items
    ]

    # In the order of the walk, whatever the split
    order = {one.path: number for number, one in enumerate(media)}
    videos.sort(key=lambda one: order[one.path])
    return Samples(str(root.resolve()), kind, "the class folders", videos, classes=annotations.classes)


def _from_table(table: Path, root: str, media: Sequence[Media], kind: str) -> Samples:
    # A table may give a path, a name without suffix, or a file name in another folder
    by_name: dict[str, list[str]] = {}
    for one in media:
        for name in {one.path, one.name, one.path.rsplit("/", 1)[-1]}:
            by_name.setdefault(name, []).append(one.path)

    videos, missing = [], []
    columns, group_column, rows = _read_table(table)
    for line, row in rows:
        asked = row["path"].replace("\\", "/").removeprefix("./").removeprefix(f"{root}/")
        # Try the exact path first; a name must match exactly one video
        paths = (
            [asked]
            if asked in by_name.get(asked, ())
            else by_name.get(asked) or by_name.get(asked.rsplit("/", 1)[-1], [])
        )
        if len(paths) != 1:
            missing.append(asked)
            continue

        start, end = (_seconds(row.get(key), f"{table}:{line}") for key in ("start", "end"))
        if start is not None and end is not None and end <= start:
            raise UserError(f"{table}:{line}: the clip ends at {end:g} s, before or at its start at {start:g} s")
        videos.append(Video(paths[0], row["label"], row.get("split", ""), row.get("group", ""), start, end))

    if not videos:
        raise UserError(
            f"{table}: none of its {len(missing)} videos is below {root}, for example {missing[0]!r}; put the table "
            "into the folder of the videos, or into one above it"
        )

    notes = [
        listed(f"{counted(len(missing), 'line')} of {table.name} left out, because the video is missing", missing[:5])
    ]
    source = f"{table.name} ({columns})"
    samples = Samples(root, kind, source, videos, [note for note in notes if missing], group_column=group_column)
    samples.classes = _class_names(table, videos)
    return samples


def _class_names(table: Path, videos: Sequence[Video]) -> list[str]:
    """Return the names of the classes; numeric labels get the names in classInd.txt next to the table."""
    labels = {one.label for one in videos}
    if not all(label.isdigit() for label in labels):
        return sorted(labels)

    count = max(map(int, labels)) + 1
    beside = table.parent / "classInd.txt"
    # A huge label is not a class number but a name in digits
    names = read_class_names(beside if beside.is_file() else None, count) if count <= 10_000 else sorted(labels)

    for one in videos:
        one.label = names[int(one.label)] if count <= 10_000 else one.label
    return [name for name in names if name in {one.label for one in videos}]


def _seconds(text: str | None, where: str) -> float | None:
    """Return `12.5`, `0:12.5` or `1:02:03` in seconds; None without a text."""
    if not text:
        return None

    try:
        total = 0.0
        for part in text.split(":"):
            total = 60 * total + float(part)
        return total
    except ValueError:
        raise UserError(f"{where}: {text!r} is not a time; write seconds, or minutes:seconds") from None


def _read_table(table: Path) -> tuple[str, str, list[tuple[int, dict[str, str]]]]:
    """Read a table with or without a header.

    Returns:
        which columns were taken, in words; the one that names the groups, "" for none; and (line, {path, label, start,
        end, split, group}) of each row.
    """
    try:
        text = table.read_text("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"{table}: {error.strerror}") from error

    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and line[0] != "#"]
    if not lines:
        raise UserError(f"{table}: is empty; write a line `path,label` for each video")

    # The separator is a character that all lines have; None: spaces
    mark = next((mark for mark in "\t;," if all(mark in line for _, line in lines)), None)
    fields = [(number, [cell.strip() for cell in _fields(line, mark)]) for number, line in lines]
    header = fields[0][1]
    places = _header(header)
    if places:
        fields.pop(0)
        ignored = [name for place, name in enumerate(header) if place not in places.values()]
        columns = listed("columns", (header[place] for place in places.values()))
        columns += f"; {listed('ignored', ignored)}" if ignored else ""
    else:
        places = {key: place for place, key in enumerate(("path", "label", "start", "end")[: len(header)])}
        columns = listed("no header, so the columns are", places)

    rows, text_of = [], dict(lines)
    for number, cells in fields:
        row = {key: cells[place] for key, place in places.items() if place < len(cells)}
        if not row.get("path") or not row.get("label"):
            raise UserError(
                f"{table}:{number}: expected `path,label` or `path,label,start,end`, found {text_of[number][:60]!r}"
            )
        rows.append((number, row))

    # Without a header there is no group column
    return columns, header[places["group"]] if "group" in places else "", rows


_COLUMNS = {
    "path": _PATHS, "label": _LABELS, "start": _STARTS, "end": _ENDS, "split": ("split", "subset", "set"),
    "group": _GROUPS,
}  # fmt: skip


def _header(cells: list[str]) -> dict[str, int]:
    """Return the place of each column that a header names; {} if the cells are no header: it has path and label."""
    names = [cell.lower() for cell in cells]
    column = {key: next((names.index(name) for name in known if name in names), -1) for key, known in _COLUMNS.items()}
    places = {key: place for key, place in column.items() if place >= 0}
    return places if {"path", "label"} <= places.keys() else {}


def _fields(line: str, mark: str | None) -> list[str]:
    if mark:
        return next(csv.reader([line], delimiter=mark))
    # The path may hold spaces, so count from the right: label, or label, start and end
    words = line.split()
    times = len(words) > 3 and all(re.fullmatch(r"[\d.:]+", word) for word in words[-2:]) and not words[-3].isdigit()
    return line.rsplit(None, 3 if times else 1)


def contradictions(samples: Samples) -> list[str]:
    """Return the videos whose names contain a class other than theirs; none if names do not contain classes."""
    names = {name: letters(name) for name in samples.classes if len(letters(name)) >= _SHORTEST_NAME}

    stems = [letters(Path(one.path).stem) for one in samples.videos]
    in_own_class = [
        names.get(one.label, "") in stem and one.label in names for one, stem in zip(samples.videos, stems, strict=True)
    ]

    if sum(in_own_class) < _NAMES_SHARE * len(in_own_class):
        return []
    return [
        f"{one.path} ({other} in the name, {one.label} according to {samples.source})"
        for one, stem, is_own in zip(samples.videos, stems, in_own_class, strict=True)
        if not is_own and (other := next((name for name, text in names.items() if text in stem), None))
    ]
