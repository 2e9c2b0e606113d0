"""YAML text -> plain values, with the line of every key.

- Only str, int, float, bool, None, tuple and dict are ever constructed; tags are errors.
- Scalars follow YAML 1.2: `1e-4` is a number, `yes` and `on` are texts, `True/False/true/false` are switches. A number
  with leading zeros is a text, because YAML 1.1 and 1.2 read it differently.
- Duplicate keys are errors. Size, depth and the number of values (aliases count each time) are limited.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from utils.errors import refuse_odd_file

# Limits against files that take all memory or time; a few bytes of aliases can mean millions of values
MAX_BYTES = 200_000  # enough for a list of 5,000 servers; parsing that much takes seconds
MAX_VALUES = 20_000
MAX_DEPTH = 32

_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULL = {"", "~", "null", "Null", "NULL"}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}
_PLAIN_TAGS = ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "merge", "value")

Path_ = tuple[Hashable, ...]  # ("common", "model", "type")


@dataclass
class Document:
    """The values of one text, the line of each path in it, and its problems.

    Attributes:
        value: nested dict and tuple of plain values; None for an empty text.
        lines: path -> line number, from 1; the root is the empty path.
        problems: (path, line, text) of everything that cannot be used.
    """

    value: object = None
    lines: dict[Path_, int] = field(default_factory=dict)
    problems: list[tuple[Path_, int, str]] = field(default_factory=list)


def read(file: Path) -> Document:
    """Parse a file. An OSError passes through; a pipe or a folder is a UserError.

    A text that is not YAML at all gives one problem: nothing after the mistake can be trusted.
    """
    refuse_odd_file(file)
    with file.open("rb") as stream:
        raw = stream.read(MAX_BYTES + 1)

    if len(raw) > MAX_BYTES:
        return _broken(1, f"larger than {MAX_BYTES} bytes, this cannot be a config")

    # utf-8-sig: some editors begin a file with a byte-order mark
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _broken(raw[: error.start].count(b"\n") + 1, "not UTF-8 text")
    return parse(text)


def parse(text: str) -> Document:
    """Parse a text; see `read`."""
    # Compose, not load: nodes keep their lines, and no constructor runs
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        return _broken(text[: error.position].count("\n") + 1, "holds a control character")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return _broken(mark.line + 1 if mark else 1, f"not valid YAML: {what}")
    except RecursionError:
        return _broken(1, "nested too deeply")

    document = Document()
    if root is not None:
        try:
            # Aliases are followed here, so their number counts against the limits
            document.value = _Walk(document).value(root, ())
        except _TooMuch as error:
            return _broken(error.line, str(error))
    document.lines.setdefault((), 1)
    return document


def scalar(text: str) -> bool | float | str | None:
    """Return the value of a plain (unquoted) scalar."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    # Python refuses to convert integers of thousands of digits
    if _INT.fullmatch(text) and len(text) < 400:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return _SPECIAL.get(text.lower(), text)


def _broken(line: int, text: str) -> Document:
    return Document(value=None, lines={(): line}, problems=[((), line, text)])


class _TooMuch(Exception):
    """A limit is exceeded at `line`."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


class _Walk:
    """One pass over the node graph, which fills a `Document`."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0

    def value(self, node: yaml.Node, path: Path_) -> object:
        line = node.start_mark.line + 1
        self.document.lines.setdefault(path, line)
        self.count += 1

        if self.count > MAX_VALUES or len(path) > MAX_DEPTH:
            raise _TooMuch(line, "too many or too deeply nested values (aliases that repeat each other?)")
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
            self.problem(path, line, f"the tag {node.tag} is not allowed; write a plain value")
            return None

        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.value(item, (*path, index)) for index, item in enumerate(node.value))
        # A quoted scalar is a text, whatever is in it
        return scalar(node.value) if getattr(node, "style", None) is None else node.value

    def mapping(self, node: yaml.MappingNode, path: Path_) -> dict[Hashable, object]:
        result: dict[Hashable, object] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, yaml.ScalarNode):
                self.problem(path, line, "a key must be a single word")
                continue

            name = name_node.value
            inner = (*path, name)
            if name in result:
                self.problem(inner, line, f"given twice, first in line {self.document.lines[inner]}")
                continue
            self.document.lines[inner] = line
            result[name] = self.value(value_node, inner)
        return result

    def problem(self, path: Path_, line: int, text: str) -> None:
        self.document.problems.append((path, line, text))
