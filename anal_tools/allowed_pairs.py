"""Allowed pairs: predictions that are not mistakes, such as the parent class of a video's own class (hotpot -> food).

Pytorch Video Analysis calls them good pairs. They count as correct in a second accuracy and are left out of lists of
errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError, did_you_mean

Pair = tuple[int, int]  # (true class, predicted class)


def read(path: str | os.PathLike[str], names: Sequence[str]) -> frozenset[Pair]:
    """Read rules, one per line: `child -> parent` (a video of child may be called parent), `a <-> b` (both ways).

    A class is its name or its number; `#` starts a comment at the beginning of a line or after a space.

    Args:
        path: the file.
        names: K class names.

    Raises:
        UserError: the file cannot be read, or a line is not a rule about two different classes of `names`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{path}: the allowed pairs cannot be read: {error.strerror}") from error

    pairs: set[Pair] = set()
    for number, line in enumerate(lines, start=1):
        # A `#` inside a name is not a comment
        rule = re.sub(r"(^|\s)#.*", "", line).strip()
        if not rule:
            continue

        sides = re.split(r"\s*(<->|->)\s*", rule)
        if len(sides) != 3 or not sides[0] or not sides[2]:
            raise UserError(
                f"{path}:{number}: {rule!r} is not a rule; write `child -> parent`, or `a <-> b` for both ways"
            )

        child, parent = (_class(side, names, f"{path}:{number}") for side in (sides[0], sides[2]))
        if child == parent:
            raise UserError(f"{path}:{number}: both sides are the class {names[child]!r}; name two different ones")
        pairs.add((child, parent))
        if sides[1] == "<->":
            pairs.add((parent, child))

    return frozenset(pairs)


def accuracy(predicted: np.ndarray, labels: np.ndarray, allowed: Collection[Pair]) -> float:
    """Return the share of videos whose prediction is right or allowed, 0..1.

    Args:
        predicted: (N,) classes, -1 for a video that could not be read.
        labels: (N,).
        allowed: pairs of `read`.
    """
    right = np.asarray(predicted) == np.asarray(labels)
    for truth, guess in allowed:
        right |= (labels == truth) & (predicted == guess)
    return float(right.mean()) if len(right) else 0.0


def _class(text: str, names: Sequence[str], where: str) -> int:
    # Names first: a class may be called "3"
    if text in names:
        return list(names).index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    raise UserError(f"{where}: there is no class {text!r}{did_you_mean(text, names)}; write its name or its number")
