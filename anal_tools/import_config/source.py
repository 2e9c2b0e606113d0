"""Read values of a foreign config with checked types, and record which keys were read: no key is lost silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from anal_tools.import_config.python_file import Key
from utils.errors import UserError

Number = int | float


class ForeignDict:
    """A dict of a foreign config.

    Args:
        file: for messages.
        values: the dict.
        name: its dotted name in the file; "" for the whole file.
        read: dotted names that were read; all parts of a file share it.
    """

    def __init__(self, file: Path, values: Mapping[Key, object], name: str = "", read: set[str] | None = None) -> None:
        self.file, self.values, self.name = file, values, name
        self.read: set[str] = set() if read is None else read

    def full(self, key: str) -> str:
        """Return the dotted name of a key."""
        return f"{self.name}.{key}" if self.name else key

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def raw(self, key: str) -> object:
        """Return a value of any type; None if it is absent."""
        self.read.add(self.full(key))
        return self.values.get(key)

    def skip(self, *keys: str) -> None:
        """Count keys, with all that they hold, as read."""
        self.read.update(map(self.full, keys))

    def fail(self, key: str, text: str) -> NoReturn:
        """Raise a UserError about a key."""
        raise UserError(f"{self.file}: {self.full(key)}: {text}")

    def wrong(self, key: str, expected: str) -> NoReturn:
        """Raise a UserError about the type of a key."""
        self.fail(key, f"{shown(self.values.get(key))} is not {expected}")

    # ------------------------------------------------------------------------------------------------------------ types

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number; a whole one stays an int."""
        value = default if (given := self.raw(key)) is None else given
        if isinstance(value, bool) or not isinstance(value, Number):
            self.wrong(key, "a number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Return a whole number."""
        value = self.number(key, default)
        if value != int(value):
            self.wrong(key, "a whole number")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return True or False."""
        value = default if (given := self.raw(key)) is None else given
        if not isinstance(value, bool):
            self.wrong(key, "True or False")
        return value

    def text(self, key: str, default: str = "") -> str:
        """Return a string."""
        value = default if (given := self.raw(key)) is None else given
        if not isinstance(value, str):
            self.wrong(key, "a text")
        return value

    def numbers(self, key: str, default: Sequence[float] = ()) -> list[float]:
        """Return a list of numbers."""
        value = default if (given := self.raw(key)) is None else given
        if not isinstance(value, list | tuple) or not all(
            isinstance(one, Number) and not isinstance(one, bool) for one in value
        ):
            self.wrong(key, "a list of numbers")
        return list(value)

    def part(self, key: str) -> ForeignDict:
        """Return a dict within this one; an absent one is empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.wrong(key, "a dict")
        if not value:  # nothing in it can be lost
            self.skip(key)
        return ForeignDict(self.file, value or {}, self.full(key), self.read)

    def parts(self, key: str) -> list[ForeignDict]:
        """Return the dicts of a list; a single dict counts as a list of one."""
        value = self.values.get(key) or []
        parts = [value] if isinstance(value, Mapping) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(one, Mapping) for one in parts):
            self.wrong(key, "a list of dicts")
        if not parts:
            self.skip(key)
        return [ForeignDict(self.file, one, f"{self.full(key)}[{index}]", self.read) for index, one in enumerate(parts)]

    # ------------------------------------------------------------------------------------------------------------- rest

    def unread(self) -> Iterator[tuple[str, object]]:
        """Yield (dotted name, value) of each value that was not read."""
        yield from _unread(self.name, self.values, self.read)


def _unread(name: str, value: object, read: set[str]) -> Iterator[tuple[str, object]]:
    if name in read:
        return
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _unread(f"{name}.{key}" if name else str(key), inner, read)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        for index, inner in enumerate(value):
            yield from _unread(f"{name}[{index}]", inner, read)
    else:
        yield name, value


def shown(value: object, most: int = 60) -> str:
    """Return a value on one line, shortened to `most` letters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
