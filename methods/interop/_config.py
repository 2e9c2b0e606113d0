"""Read the JSON files of a Hugging Face folder, within bounds and with errors that name file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from methods.interop._names import Options
from utils import weights_file
from utils.errors import UserError

_LARGEST = 8 << 20  # bytes; 22,000 classes need 2
_MOST = 65_536  # largest count of anything in a network
_WORD = 200  # letters of a label that are kept


def read_json(path: Path) -> Options:
    """Return the object in a JSON file.

    Raises:
        UserError: no such file, not a regular one, too large, or no JSON object.
    """
    with weights_file.opened(path) as (file, size):
        if size > _LARGEST:
            raise UserError(f"{path}: {size:,} bytes, and such a file has fewer than {_LARGEST:,}; get another copy")
        data = file.read(_LARGEST)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({str(error)[:100]}); get another copy of it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object; get another copy of it")
    return values


class HfConfig:
    """Read the values of a config.json, by key.

    Args:
        path: the file, for messages.
        values: the content of the file.
    """

    def __init__(self, path: Path, values: Options) -> None:
        self.path = path
        self.values = values

    def _wrong(self, name: str, needed: str) -> UserError:
        shown = repr(self.values.get(name))
        return UserError(f"{self.path}: {name} is {shown[:60]}, and must be {needed}; get another copy of the folder")

    def count(self, name: str, default: int, *, least: int = 1, most: int = _MOST) -> int:
        """Return a whole number from `least` to `most`."""
        value = self.values.get(name, default)
        # `type` and not `isinstance`: true is an int in Python
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, f"a whole number from {least} to {most:,}")
        return value

    def side(self, name: str, default: int) -> int:
        """Return the side of a square, given once or as height and width."""
        value = self.values.get(name, default)
        one = value[0] if isinstance(value, list) and value and value == [value[0]] * 2 else value
        if type(one) is not int or not 1 <= one <= _MOST:
            raise self._wrong(name, f"a whole number from 1 to {_MOST:,}, the same for height and width")
        return one

    def number(self, name: str, default: float) -> float:
        """Return a positive number."""
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 < value <= 1000 or not math.isfinite(value):
            raise self._wrong(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a truth value."""
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise self._wrong(name, "true or false")
        return value

    def require(self, name: str, value: object) -> None:
        """Refuse a different value than the one that networks here are built with."""
        if self.values.get(name, value) != value:
            raise UserError(
                f"{self.path}: {name} is {self.values[name]!r:.60}, and only networks with {value!r} are built here"
            )

    def agree(self, shown: Mapping[str, object], **configured: object) -> None:
        """Refuse a config that the tensors of its folder contradict."""
        wrong = [key for key, value in configured.items() if shown.get(key) != value]
        if wrong:
            texts = [", ".join(f"{key} {values.get(key)}" for key in wrong) for values in (configured, shown)]
            raise UserError(
                f"{self.path} has {texts[0]}, and the tensors of its folder show {texts[1]}; get another copy of the "
                "folder"
            )

    def labels(self) -> list[str] | None:
        """Return the class names in the order of the classifier's rows; None if there are only numbers."""
        table = self.values.get("id2label")
        if table is None:
            return None

        right = isinstance(table, dict) and all(isinstance(name, str) for name in table.values())
        # the keys must be exactly 0 ... K-1, as texts
        if not right or [str(number) for number in range(len(table))] != sorted(table, key=_as_number):
            raise self._wrong("id2label", "an object of the names of the classes 0, 1, 2, ...")

        names = [table[str(number)][:_WORD] for number in range(len(table))]
        # transformers writes LABEL_0, LABEL_1, ... if a model has no names
        return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


def _as_number(text: str) -> int:
    # fewer than 8 digits, because int() refuses thousands of them with a ValueError
    return int(text) if text.isascii() and text.isdigit() and len(text) < 8 else -1
