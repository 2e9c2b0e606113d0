"""Read the official annotation files of the usual data sets, each as its authors publish it.

| data set | files | remarks |
|---|---|---|
| Kinetics-400/600/700 | csv `label,youtube_id,time_start,time_end,split` | a clip is named `ID_SSSSSS_EEEEEE` |
| UCF101 | classInd.txt, trainlist0N.txt, testlist0N.txt | labels from 1, the test list has none |
| HMDB51 | `CLASS_test_splitN.txt` | 1 = train, 2 = test, 0 = neither |
| Something-Something v1 | csv: labels one per line, `id;label` | the class number is the line |
| Something-Something v2 | json: {name: "number"}, [{id, template}] | templates have brackets, labels do not |
| ActivityNet | json: {database: {id: {subset, annotations}}} | a video has several segments |
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets.lists.files import letters
from utils.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Item:
    """One sample as the annotations have it.

    Attributes:
        names: names that its file may have, the usual one first.
        class_name: name of the class as the annotations write it.
        where: file and line, for messages.
        segment: (start, end) in seconds of an untrimmed video, or None for all of it.
    """

    names: tuple[str, ...]
    class_name: str
    where: str
    segment: tuple[float, float] | None = None


@dataclasses.dataclass
class Annotations:
    """The content of the official files.

    Attributes:
        classes: names in the order of the labels.
        splits: "train", "val", "test" -> samples.
        unlabelled: number of samples without a label (official test sets), which are left out.
        groups: with `--group`, the number of groups and of videos without a match; else None.
    """

    classes: list[str]
    splits: dict[str, list[Item]]
    unlabelled: int = 0
    groups: tuple[int, int] | None = None


_SPLITS = {"train": "train", "training": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
_SPLITS |= {"testing": "test"}


def read(data_set: str, files: Sequence[Path], split: int) -> Annotations:
    """Read the annotations of a data set.

    Args:
        data_set: a key of `READ`.
        files: annotation files, or folders that hold them.
        split: number of the split of UCF101 or HMDB51, which have several.

    Raises:
        UserError: a file is missing, or not as its authors publish it; the message has the file and the line.
    """
    expanded: list[Path] = []
    for file in files:
        if file.is_dir():
            # A folder may hold more files than needed: each data set picks its own by name.
            expanded += sorted(path for path in file.iterdir() if path.is_file())
        elif file.is_file():
            expanded.append(file)
        else:
            raise UserError(f"--annotations: there is no {file}")

    annotations = READ[data_set](expanded, split)
    # A class that is misspelt in one file would otherwise become another class.
    known = set(annotations.classes)
    for items in annotations.splits.values():
        for item in items:
            if item.class_name not in known:
                hint = did_you_mean(item.class_name, known)
                raise UserError(f"{item.where}: {item.class_name!r} is not one of the {len(known)} classes{hint}")

    if not any(annotations.splits.values()):
        raise UserError(f"{', '.join(map(str, files))}: no labelled sample in these annotations")
    return annotations


def read_folds(data_set: str, files: Sequence[Path]) -> Annotations:
    """Read the three official splits of UCF101 or HMDB51 as folds: `fold01_train` to `fold03_val`; see `read`."""
    three_splits = [read(data_set, files, split) for split in (1, 2, 3)]
    splits = {f"fold{n:02d}_{key}": items for n, one in enumerate(three_splits, 1) for key, items in one.splits.items()}
    # All splits have the same classes in the same order.
    return Annotations(three_splits[0].classes, splits)


def _pick(files: Sequence[Path], pattern: str, what: str) -> Path:
    """Return the one file whose name matches a pattern. Raise UserError if there is none, or more than one."""
    paths = [file for file in files if re.fullmatch(pattern, file.name, re.IGNORECASE)]
    if len(paths) == 1:
        return paths[0]
    if not paths:
        names = ", ".join(file.name for file in files[:8]) or "nothing"
        raise UserError(f"--annotations: {what} is missing (expected a name like {pattern}); found {names}")
    raise UserError(f"--annotations: several files could be {what}: {', '.join(map(str, paths))}; name the right ones")


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (file:line, text) of every line that is not blank."""
    text = _text(file)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{file}:{number}", line.strip()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: this is not a text file in UTF-8 ({error.reason} at byte {error.start})") from error


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from None


def _split(name: str, where: str) -> str:
    if name.lower() not in _SPLITS:
        raise UserError(f"{where}: no split is called {name!r}; expected one of {', '.join(_SPLITS)}")
    return _SPLITS[name.lower()]


def _ucf101(files: Sequence[Path], split: int) -> Annotations:
    numbers: dict[str, int] = {}
    for where, line in _lines(_pick(files, r"classInd\.txt", "the class list")):
        number, _, name = line.partition(" ")
        if not number.isdigit() or int(number) != len(numbers) + 1 or not name:
            raise UserError(f"{where}: expected `{len(numbers) + 1} NAME`, found {line[:60]!r}")
        numbers[name.strip()] = int(number)

    splits: dict[str, list[Item]] = {}
    # UCF101 has no validation list: its test list is used for validation, as papers do.
    for key, word in (("train", "train"), ("val", "test")):
        splits[key] = []
        for where, line in _lines(_pick(files, rf"{word}list0?{split}\.txt", f"the {word} list of split {split}")):
            path, _, label = line.partition(" ")
            class_name, _, file = path.rpartition("/")
            if not class_name or not file:
                raise UserError(f"{where}: expected `CLASS/NAME.avi`, found {line[:60]!r}")
            # The test lists have no labels; the class is always the folder's name.
            if label and label.strip() != str(numbers.get(class_name)):
                known = numbers.get(class_name, "unknown")
                raise UserError(f"{where}: label {label.strip()}, but classInd.txt numbers {class_name} as {known}")
            splits[key].append(Item((file.rsplit(".", 1)[0],), class_name, where))

    return Annotations(list(numbers), splits)


def _hmdb51(files: Sequence[Path], split: int) -> Annotations:
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    ending = f"_test_split{split}.txt"
    chosen = [file for file in files if file.name.endswith(ending)]
    if not chosen:
        raise UserError(f"--annotations: there are no files CLASS{ending}")

    # HMDB51 has one file per class, with the split in each line.
    for file in chosen:
        for where, line in _lines(file):
            name, _, number = line.rpartition(" ")
            if number not in ("0", "1", "2") or not name:
                raise UserError(f"{where}: expected `NAME.avi 0|1|2`, found {line[:60]!r}")
            if number != "0":
                item = Item((name.strip().removesuffix(".avi"),), file.name.removesuffix(ending), where)
                splits["train" if number == "1" else "val"].append(item)

    return Annotations(sorted(file.name.removesuffix(ending) for file in chosen), splits)


def _sthv1(files: Sequence[Path], split: int) -> Annotations:
    # The samples name their class; its number is its line in this file.
    classes = [line for _, line in _lines(_pick(files, r".*labels.*\.csv", "the list of labels"))]
    splits: dict[str, list[Item]] = {}
    for key, pattern in (("train", r".*train.*\.csv"), ("val", r".*val.*\.csv")):
        splits[key] = []
        for where, line in _lines(_pick(files, pattern, f"the {key} list")):
            name, separator, label = line.partition(";")
            if not separator or not name.strip().isdigit():
                raise UserError(f"{where}: expected `ID;LABEL`, found {line[:60]!r}")
            splits[key].append(Item((name.strip(),), label.strip(), where))

    return Annotations(classes, splits)


def _sthv2(files: Sequence[Path], split: int) -> Annotations:
    file = _pick(files, r"(.*-)?labels\.json", "the list of labels")
    numbers = _json(file)
    if not isinstance(numbers, dict) or sorted(map(str, numbers.values())) != sorted(map(str, range(len(numbers)))):
        raise UserError(f"{file}: expected an object of names and numbers 0..K-1")

    splits: dict[str, list[Item]] = {}
    for key, pattern in (("train", r"(.*-)?train\.json"), ("val", r"(.*-)?validation\.json")):
        file = _pick(files, pattern, f"the {key} list")
        splits[key] = []
        for number, entry in enumerate(_json(file), start=1):
            where = f"{file}: entry {number}"
            if not isinstance(entry, dict) or not {"id", "template"} <= entry.keys():
                raise UserError(f"{where}: expected an object with `id` and `template`")
            # Templates mark their placeholders: `Pushing [something]`. The labels do not.
            name = str(entry["template"]).replace("[", "").replace("]", "")
            splits[key].append(Item((str(entry["id"]),), name, where))

    return Annotations(sorted(numbers, key=lambda name: int(numbers[name])), splits)


def _kinetics(files: Sequence[Path], split: int) -> Annotations:
    tables = [file for file in files if file.suffix.lower() == ".csv"]
    if not tables:
        raise UserError("--annotations: expected the csv files of Kinetics (train.csv, validate.csv)")
    splits: dict[str, list[Item]] = {}
    unlabelled = 0

    for file in tables:
        # Some releases have no column for the split: then the file's name shows it, as in kinetics400_val_list.csv.
        words = re.split(r"[_.-]", file.stem)
        named = next((word for word in reversed(words) if word.lower() in _SPLITS), words[-1])
        rows = csv.DictReader(_text(file).splitlines())
        missing = {"youtube_id", "time_start", "time_end"} - set(rows.fieldnames or ())
        if missing:
            raise UserError(f"{file}:1: the header lacks {', '.join(sorted(missing))}")
        for row in rows:
            where = f"{file}:{rows.line_num}"
            if not (row.get("label") or "").strip():
                unlabelled += 1
                continue

            key = _split(row.get("split") or named, where)
            try:
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            except (TypeError, ValueError):
                raise UserError(f"{where}: time_start and time_end must be numbers") from None

            name = row["youtube_id"]
            # The usual name of a downloaded clip, then two other forms.
            names = (f"{name}_{start:06d}_{end:06d}", f"{name}_{start}_{end}", name)
            splits.setdefault(key, []).append(Item(names, row["label"].strip(), where))

    classes = sorted({item.class_name for items in splits.values() for item in items})
    return Annotations(classes, splits, unlabelled)


def _activitynet(files: Sequence[Path], split: int) -> Annotations:
    file = _pick(files, r".*\.json", "the annotations")
    content = _json(file)
    if not isinstance(content, dict) or not isinstance(content.get("database"), dict):
        raise UserError(f"{file}: expected an object with `database`")
    splits: dict[str, list[Item]] = {}
    unlabelled = 0
    for name, video in content["database"].items():
        where = f"{file}: {name}"
        annotations = video.get("annotations") if isinstance(video, dict) else None
        if not isinstance(annotations, list):
            raise UserError(f"{where}: expected an object with `subset` and a list `annotations`")
        # The test set has no annotations.
        unlabelled += not annotations

        for one in annotations:
            try:
                start, end = map(float, one["segment"])
                label = str(one["label"])
                if not (math.isfinite(start) and math.isfinite(end)):
                    raise ValueError
            except (KeyError, TypeError, ValueError, OverflowError):
                raise UserError(f"{where}: expected annotations with `label` and `segment: [start, end]`") from None
            # ActivityNet's tools put `v_` in front of the id of a video.
            item = Item((f"v_{name}", name), label, where, (start, end))
            splits.setdefault(_split(str(video.get("subset")), where), []).append(item)

    classes = sorted({item.class_name for items in splits.values() for item in items})
    return Annotations(classes, splits, unlabelled)


READ: dict[str, Callable[[Sequence[Path], int], Annotations]] = {
    "kinetics": _kinetics,
    "ucf101": _ucf101,
    "hmdb51": _hmdb51,
    "activitynet": _activitynet,
    "sthv1": _sthv1,
    "sthv2": _sthv2,
}


def reorder(annotations: Annotations, order: Sequence[str], file: Path) -> None:
    """Renumber the classes as in another list. Ignore differences in case, spaces, underscores and punctuation.

    Raises:
        UserError: the other list lacks a class.
    """
    # Two names of the list that differ only in such characters must match exactly.
    spelled = {letters(name): name for name in order}
    if len(spelled) < len(order):
        spelled = {name: name for name in order}

    renamed: dict[str, str] = {}
    for name in annotations.classes:
        spelling = spelled.get(letters(name)) or spelled.get(name)
        if spelling is None:
            raise UserError(f"{file}: there is no class {name!r}{did_you_mean(name, order)}")
        renamed[name] = spelling

    annotations.classes = list(order)
    for key, items in annotations.splits.items():
        annotations.splits[key] = [dataclasses.replace(item, class_name=renamed[item.class_name]) for item in items]
