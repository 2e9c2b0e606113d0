"""Describe where weights come from: their licence, training data and order of classes.

A checkpoint keeps this (`initial`), so that an export and the next run that starts from it can name it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from methods.interop import hf
from methods.interop._names import Options
from utils.errors import UserError

if TYPE_CHECKING:
    from methods.interop import Opened

_LETTERS = 2000  # of `about` that are kept
_SHOWN = 4  # renamed classes that a message lists
_LARGER = 2.0  # times the training's side, from which `size_line` warns
# k400, Kinetics-400, kinetics_400 and the like
_KINETICS = re.compile(r"(?<![a-z])k(?:inetics)?[-_ ]?(400|600|700|710)(?!\d)", re.IGNORECASE)
_NAMES = {"cc-by-nc-4.0": "CC-BY-NC 4.0", "mit": "MIT", "apache-2.0": "Apache 2.0"}


@dataclass(frozen=True)
class Start:
    """Describe a model's initial weights, apart from their values.

    Attributes:
        path: the file or folder.
        initial: see `of`.
        labels: class names in the order of the loaded classifier; None if none was loaded, or nothing names them.
        lists: hashes of the lists of their run, if they are from a checkpoint.
        side: height and width of the frames that they were trained on, pixels; None if unknown.
    """

    path: Path
    initial: dict[str, str]
    labels: list[str] | None = None
    lists: dict[str, str] = field(default_factory=dict)
    side: int | None = None


def of(path: Path, family: str, opened: Opened | None = None, content: Options | None = None) -> dict[str, str]:
    """Return the known metadata of a weights file or folder, as plain texts.

    Args:
        path: file or folder.
        family: the family of its names; "" for ours.
        opened: the content of a file or folder that is not ours.
        content: the content of one of our checkpoints.

    Returns:
        name, sha256, licence ("" if unknown), licence_from ("card", "family", "checkpoint" or ""), and about: texts
        that may name the training data.
    """
    folder = opened.folder if opened else None
    earlier = earlier_of(content)

    # A folder's card, else what a checkpoint kept about its initial weights, else the family.
    about, licence, source = f"{path.parent.name} {path.name}", "", ""
    if folder is not None:
        about, licence, source = folder.about, folder.licence, "card" if folder.stated else "family"
    elif earlier:
        about, licence = f"{about} {earlier['about']}", earlier["licence"]
        source = "checkpoint" if licence else ""
    elif family:
        licence = getattr(importlib.import_module(f"methods.interop.{family}"), "LICENCE", "")
        source = "family" if licence else ""

    origin = {"name": path.name, "sha256": hf.digest(path), "licence": licence, "licence_from": source}
    # texts of a folder may be long, and a checkpoint keeps them
    return origin | {"about": about[:_LETTERS]}


def earlier_of(content: Options | None) -> dict[str, str]:
    """Return what a checkpoint keeps about its initial weights; {} if that is missing or malformed."""
    initial = content.get("initial") if content else None
    keys = ("name", "sha256", "licence", "licence_from", "about")
    right = isinstance(initial, Mapping) and all(isinstance(initial.get(key), str) for key in keys)

    return {key: initial[key][:_LETTERS] for key in keys} if right and initial else {}


def licence_line(initial: Mapping[str, str]) -> str:
    """Return a sentence about the licence of initial weights; "" if it is unknown."""
    licence = initial.get("licence", "")
    if not licence:
        return ""

    name = _NAMES.get(licence, licence)
    terms = (
        ", which forbids commercial use of them and of what is trained from them" if is_non_commercial(licence) else ""
    )

    if initial.get("licence_from") == "family":
        name = f"not in the file; that of the published weights of this network is {name}"
        terms += ": look at the page that they came from"
    return f"licence of the initial weights {initial['name']}: {name}{terms}"


def is_non_commercial(licence: str) -> bool:
    """Return True for a licence with a condition NC."""
    return "nc" in re.split(r"[^a-z0-9]+", licence.lower())


def seen_line(initial: Mapping[str, str], data: str) -> str:
    """Return a warning if initial weights were trained on a different Kinetics than that of the validation list.

    Args:
        initial: see `of`.
        data: paths of the validation list and its root.
    """
    # the videos of Kinetics-400, -600, -700 and -710 overlap, in different splits
    validated, trained = set(_KINETICS.findall(data)), set(_KINETICS.findall(initial.get("about", "")))
    others = sorted(trained - validated)

    if not validated or not others:
        return ""
    return (
        f"WARNING: the initial weights {initial['name']} name Kinetics-{', '.join(others)} as training data, whose "
        f"training videos include validation videos of Kinetics-{', '.join(sorted(validated))}: accuracy on this list "
        "is too high (UniFormerV2: 90.75 instead of 85.6). Start from weights of the data set itself, or remove the "
        "shared videos from the list"
    )


@dataclass(frozen=True)
class LabelOrder:
    """Compare the order of class names in a weights file with that of a list.

    Attributes:
        moved: classes that both have, under different numbers.
        renamed: numbers whose names differ and do not occur elsewhere.
        total: number of classes.
    """

    moved: list[str]
    renamed: list[int]
    total: int


def label_order(theirs: Sequence[str], ours: Sequence[str]) -> LabelOrder | None:
    """Compare class names by their letters and digits; None if one side has only numbers, or a different count."""
    one, other = ([_letters(name) for name in names] for names in (theirs, ours))
    numbers = [str(number) for number in range(len(ours))]
    if len(one) != len(other) or numbers in (one, other):
        return None

    places = {name: number for number, name in enumerate(other)}
    # a name that occurs twice has no single number
    twice = (
        {name for names in (one, other) for name in names if names.count(name) > 1} if _repeats(one, other) else set()
    )

    moved = [name for number, name in enumerate(one) if places.get(name, number) != number and name not in twice]
    renamed = [number for number, name in enumerate(one) if name not in places]
    return LabelOrder(moved, renamed, len(one))


def check_labels(theirs: Sequence[str], ours: Sequence[str], path: Path | str) -> str:
    """Compare the class names of a weights file with those of a list; return a remark, or "" if they are equal.

    Raises:
        UserError: classes that both have, have other numbers.
    """
    order = label_order(theirs, ours)
    if order is None:
        return ""

    # weights would be evaluated with shuffled classes: an accuracy near chance
    if order.moved:
        name = order.moved[0]
        places = [[_letters(one) for one in names].index(name) for names in (theirs, ours)]
        raise UserError(
            f"{path}: its classes are not in the order of the list: {len(order.moved)} of {order.total}, "
            f"such as {name!r}, class {places[0]} there and class {places[1]} here; `python main.py convert {path} "
            "--config EXP --out FILE` puts the classifier in the list's order, or set data.class_names if that is wrong"
        )

    if order.renamed:
        pairs = [f"{theirs[n]!r:.60} is {ours[n]!r:.60} here" for n in order.renamed[:_SHOWN]]
        return (
            f"WARNING: {path}: {len(order.renamed)} of its {order.total} classes have names that differ from the "
            f"list's ({'; '.join(pairs)}): if these are other classes, its scores mean nothing"
        )
    return ""


def list_line(lists: object, list_hash: str, weights: str) -> str:
    """Return a warning if weights were trained on the list that is scored, or "".

    Args:
        lists: hashes of the lists of their run, by split, if a checkpoint has them.
        list_hash: hash of the list that is scored.
        weights: names the weights in the sentence.
    """
    if not isinstance(lists, Mapping) or lists.get("train") != list_hash:
        return ""
    return f"WARNING: {weights} were trained on this very list: their accuracy on it says nothing about other videos"


def check_start(start: Start, class_names: Sequence[str], side: int) -> list[str]:
    """Compare initial weights with a run's classes and the size of its clips; return remarks.

    Raises:
        UserError: the classifier has the same classes in a different order.
    """
    remarks = [check_labels(start.labels, class_names, start.path)] if start.labels else []
    return [*remarks, size_line(side, start.side, f"the initial weights {start.path} were trained on")]


def size_line(side: int, trained: int | None, what: str) -> str:
    """Return a remark if frames are much larger than those of the training, or "".

    Args:
        side: height and width, pixels.
        trained: the side in training; None if unknown.
        what: names the training's size in the sentence.
    """
    if trained is None or side < _LARGER * trained:
        return ""
    return (
        f"REMARK: frames of {side} pixels are {side / trained:.2g} times the {trained} pixels that {what}: objects "
        "look larger than in training, and fixed positions differ; accuracy usually falls"
    )


def reordered(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Return for each class of a list its row in the file's classifier; None if the names are not the same."""
    one, other = ([_letters(name) for name in names] for names in (theirs, ours))
    if _repeats(one, other) or set(one) != set(other):
        return None

    rows = {name: row for row, name in enumerate(one)}
    return [rows[name] for name in other]


def _repeats(one: Sequence[str], other: Sequence[str]) -> bool:
    return len(set(one)) < len(one) or len(set(other)) < len(other)


def _letters(name: str) -> str:
    """Return a class name without case, brackets, underscores and repeated spaces."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))
