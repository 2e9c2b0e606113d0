"""Read the names of the classes from one text file, in any of the layouts in which data sets ship it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from utils.errors import UserError

_INDEXED = re.compile(r"(\d{1,18})\s*[\s,:;]\s*(.*\S)")  # `0 name`, `0: name`, `0,name`


def read_class_names(path: str | os.PathLike[str] | None, num_class: int) -> list[str]:
    """Return the names in the order of the labels 0..num_class-1; without a file, the numbers themselves.

    One class per line: `0 name` or `1 name` (0-based or 1-based; blank, comma, colon or semicolon after the number),
    or the name alone, in the order of the labels; names may contain spaces. A header line above numbered lines is
    skipped. A `.json` file holds a list of names.

    Raises:
        UserError: the file is missing, does not have `num_class` names, or has numbers with gaps or repeats.
    """
    if path is None:
        return [str(label) for label in range(num_class)]

    try:
        # A name with bytes that are not UTF-8 is only shown, so it stays readable without them.
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file of class names; check data.class_names") from None
    except OSError as error:
        raise UserError(f"{path}: the class names cannot be read: {error.strerror}") from error

    names = _from_json(path, text) if str(path).endswith(".json") else _from_lines(path, text)
    if len(names) != num_class:
        raise UserError(f"{path}: {len(names)} class names, but num_class is {num_class}")
    return names


def _from_json(path: str | os.PathLike[str], text: str) -> list[str]:
    try:
        names = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: JSON with a number of thousands of digits, or nested too deeply") from None

    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: expected a list of class names")
    return names


def _from_lines(path: str | os.PathLike[str], text: str) -> list[str]:
    lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]

    matches = [_INDEXED.fullmatch(line) for line in lines]
    if len(matches) > 2 and matches[0] is None and all(matches[1:]):
        matches = matches[1:]  # a header such as `id,name`

    numbered = [(int(match[1]), match[2]) for match in matches if match]
    # Names may begin with a number, such as `3 point shot`: the numbers count only if every line has one.
    if not numbered or len(numbered) < len(matches):
        return [_unquoted(line) for line in lines]

    numbered.sort()
    # Labels count from 0 either way, so the first number may be 0 or 1.
    first = numbered[0][0]
    for expected, (index, name) in enumerate(numbered, first):
        if index != expected or first > 1:
            raise UserError(
                f"{path}: class numbers must be 0..K-1 or 1..K without gaps or repeats, but {index} ({name:.80}) "
                f"found where {expected if first <= 1 else '0 or 1'} is expected"
            )

    return [_unquoted(name) for _, name in numbered]


def _unquoted(name: str) -> str:
    return name[1:-1] if len(name) > 1 and name[0] == name[-1] == '"' else name
