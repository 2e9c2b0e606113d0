"""Where weights come from: their licence, what they were trained on, in which order their classes are.

A checkpoint keeps the answer (`initial`), so that an export names it, and the next run that starts from it too.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.interop import hf
from utils.faults import UserError

if TYPE_CHECKING:
    from methods.interop import Opened

_LETTERS = 2000  # of `about`
_SHOWN = 4
_KINETICS = re.compile(r"(?<![a-z])k(?:inetics)?[-_ ]?(400|600|700|710)(?!\d)", re.IGNORECASE)
_NAMES = {"cc-by-nc-4.0": "CC-BY-NC 4.0", "mit": "MIT", "apache-2.0": "Apache 2.0"}


def of(path: Path, family: str, opened: Opened | None = None, content: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return what is known of a weights file or folder, as plain texts.

    Args:
        path: file or folder.
        family: whose names it has; "" for ours.
        opened: what was read from it, if it is not ours.
        content: of a checkpoint of ours.

    Returns:
        name, sha256, licence ("" if unknown), licence_from ("card", "family", "checkpoint" or ""), about (texts in which
        training data may be named).
    """
    folder = opened.folder if opened else None
    earlier = earlier_of(content)
    about, licence, source = f"{path.parent.name} {path.name}", "", ""
    if folder is not None:
        about, licence, source = folder.about, folder.licence, "card" if folder.stated else "family"
    elif earlier:
        about, licence = f"{about} {earlier['about']}", earlier["licence"]
        source = "checkpoint" if licence else ""
    elif family:
        licence = getattr(importlib.import_module(f"methods.interop.{family}"), "LICENCE", "")
        source = "family" if licence else ""
    found = {"name": path.name, "sha256": hf.digest(path), "licence": licence, "licence_from": source}
    return found | {"about": about[:_LETTERS]}


def earlier_of(content: Mapping[str, Any] | None) -> dict[str, str]:
    """Return what a checkpoint keeps of its own initial weights; {} if it keeps nothing, or nothing sensible."""
    found = content.get("initial") if content else None
    keys = ("name", "sha256", "licence", "licence_from", "about")
    right = isinstance(found, Mapping) and all(isinstance(found.get(key), str) for key in keys)
    return {key: found[key][:_LETTERS] for key in keys} if right and found else {}


def licence_line(initial: Mapping[str, str]) -> str:
    """Return a sentence about the licence of initial weights; "" if nothing is known."""
    licence = initial.get("licence", "")
    if not licence:
        return ""
    name = _NAMES.get(licence, licence)
    terms = ", which forbids commercial use of them and of what is trained from them" if is_non_commercial(licence) else ""
    sure = "" if initial["licence_from"] == "card" else "; it is not in the file: look at the page that it came from"
    return f"licence of the initial weights {initial['name']}: {name}{terms}{sure}"


def is_non_commercial(licence: str) -> bool:
    """Return True for a licence with a condition NC."""
    return "nc" in re.split(r"[^a-z0-9]+", licence.lower())


def seen_line(initial: Mapping[str, str], data: str) -> str:
    """Return a warning if initial weights were trained on another Kinetics than the validation list is of.

    Args:
        initial: see `of`.
        data: paths of the validation list and its root.
    """
    validated, trained = set(_KINETICS.findall(data)), set(_KINETICS.findall(initial.get("about", "")))
    others = sorted(trained - validated)
    if not validated or not others:
        return ""
    return (
        f"WARNING: the initial weights {initial['name']} name Kinetics-{', '.join(others)} as training data, whose "
        f"training videos include validation videos of Kinetics-{', '.join(sorted(validated))}: accuracy on this list is "
        "too high (UniFormerV2: 90.75 instead of 85.6). Start from weights of the data set itself, or remove the "
        "shared videos from the list"
    )


@dataclass(frozen=True)
class LabelOrder:
    """How the class names of a weights file lie beside those of a list.

    Attributes:
        moved: classes that both have, under different numbers.
        renamed: numbers whose names differ and are not elsewhere.
        total: number of classes.
    """

    moved: list[str]
    renamed: list[int]
    total: int


def label_order(theirs: Sequence[str], ours: Sequence[str]) -> LabelOrder | None:
    """Compare class names, by their letters and digits; None if one side has only numbers, or another count."""
    one, other = ([_letters(name) for name in names] for names in (theirs, ours))
    numbers = [str(number) for number in range(len(ours))]
    if len(one) != len(other) or numbers in (one, other):
        return None
    places = {name: number for number, name in enumerate(other)}
    twice = {name for names in (one, other) for name in names if names.count(name) > 1} if _repeats(one, other) else set()
    moved = [name for number, name in enumerate(one) if places.get(name, number) != number and name not in twice]
    renamed = [number for number, name in enumerate(one) if name not in places]
    return LabelOrder(moved, renamed, len(one))


def check_labels(theirs: Sequence[str], ours: Sequence[str], path: Path | str) -> str:
    """Compare the class names of a weights file with those of a list; return a remark, "" if they are the same.

    Raises:
        UserError: classes that both know have other numbers.
    """
    order = label_order(theirs, ours)
    if order is None:
        return ""
    if order.moved:
        name = order.moved[0]
        places = [[_letters(one) for one in names].index(name) for names in (theirs, ours)]
        raise UserError(
            f"{path}: its classes are in another order than those of the list: {len(order.moved)} of {order.total}, such "
            f"as {name!r}, class {places[0]} there and class {places[1]} here; `python main.py convert {path} --config "
            "EXP --out FILE` puts the classifier in the list's order, or set data.class_names if the names are wrong"
        )
    if order.renamed:
        pairs = [f"{theirs[n]!r:.60} is {ours[n]!r:.60} here" for n in order.renamed[:_SHOWN]]
        return (
            f"WARNING: {path}: {len(order.renamed)} of its {order.total} classes have other names than the list's "
            f"({'; '.join(pairs)}): if these are other classes, its scores mean nothing"
        )
    return ""


def reordered(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Return for each class of a list the row of the file's classifier; None where the names do not match one to one."""
    one, other = ([_letters(name) for name in names] for names in (theirs, ours))
    if _repeats(one, other) or set(one) != set(other):
        return None
    rows = {name: row for row, name in enumerate(one)}
    return [rows[name] for name in other]


def _repeats(one: Sequence[str], other: Sequence[str]) -> bool:
    return len(set(one)) < len(one) or len(set(other)) < len(other)


def _letters(name: str) -> str:
    """Return a class name without case, brackets, underscores and repeated blanks."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))
