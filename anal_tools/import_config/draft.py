"""Collect the experiment that a foreign config becomes: our keys, and a table row for each of their keys."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from anal_tools.import_config.source import ForeignDict, shown
from utils.config import model_options
from utils.config.schema import Config, leaves

EXACT, OTHER, NOT = "kept exactly", "kept with a different meaning", "not kept"  # kinds of rows
KWARGS = "model.kwargs."


@dataclass(frozen=True)
class KeyRow:
    """A row of the table: how one of their keys was converted.

    Args:
        kind: EXACT, OTHER or NOT.
        theirs: `key = value`.
        ours: `key = value`; "" for none.
        note: how the meaning differs, or why the key was left out.
    """

    kind: str
    theirs: str
    ours: str
    note: str


@dataclass
class Draft:
    """The experiment as far as it is converted.

    Attributes:
        values: our dotted key -> value.
        comments: our dotted key -> comment after it in the file.
        rows: rows of the table.
        test: options of `eval.sh` that repeat their test; "" if they have none.
    """

    values: dict[str, object] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    rows: list[KeyRow] = field(default_factory=list)
    test: str = ""

    def exact(self, ours: str, value: object, source: ForeignDict, *keys: str) -> None:
        """Keep a value that has the same meaning in both projects."""
        self._put(EXACT, ours, value, source, keys, "")

    def other(self, ours: str, value: object, source: ForeignDict, *keys: str, note: str, comment: str = "") -> None:
        """Keep a value whose meaning here differs; `note` explains how."""
        self._put(OTHER, ours, value, source, keys, note)
        if comment:
            self.comments[ours] = comment

    def built_in(self, source: ForeignDict, *keys: str, note: str = "the network or rule here is made so") -> None:
        """Record values of theirs that have no key here, because the code here does the same without an option."""
        self._row(EXACT, source, [key for key in keys if key in source.values], "", note)

    def left_out(self, source: ForeignDict, *keys: str, note: str) -> None:
        """Record values of theirs that are not kept."""
        self._row(NOT, source, [key for key in keys if key in source.values], "", note)

    def note(self, theirs: str, note: str, value: object = ...) -> None:
        """Record a setting of theirs that is not kept; `value` is shown after it, if given."""
        self.rows.append(KeyRow(NOT, theirs if value is ... else f"{theirs} = {shown(value)}", "", note))

    def test_row(self, theirs: str) -> None:
        """Record that `eval.sh` repeats their test with the options of `test`."""
        self.rows.append(KeyRow(EXACT, theirs, f"eval.sh local 1 {self.test}", ""))

    def ours_only(self, ours: str, value: object, comment: str) -> None:
        """Set one of our keys that their file does not mention."""
        self.values[ours] = value
        self.comments[ours] = comment

    def _put(self, kind: str, ours: str, value: object, source: ForeignDict, keys: Iterable[str], note: str) -> None:
        self.values[ours] = value
        self._row(kind, source, keys, f"{ours} = {yaml_value(value)}", note)

    def _row(self, kind: str, source: ForeignDict, keys: Iterable[str], ours: str, note: str) -> None:
        keys = list(keys)
        source.skip(*keys)  # they are dealt with, and not reported as unknown
        if not keys:
            return

        theirs = "; ".join(
            f"{source.full(key)} = {shown(source.values[key])}"
            if key in source.values
            else f"{source.full(key)} (default)"
            for key in keys
        )

        self.rows.append(KeyRow(kind, theirs, ours, note))

    # ------------------------------------------------------------------------------------------------------------- text

    def yaml(self, head: Iterable[str]) -> str:
        """Return the text of `config.yaml`: required keys, and those that differ from their defaults."""
        # Nest the dotted keys
        tree: dict[str, object] = {}
        for key in self._written():
            *above, last = key.split(".")
            place = tree
            for name in above:
                inner = place.setdefault(name, {})
                assert isinstance(inner, dict)
                place = inner
            place[last] = key

        return "\n".join([*(f"# {line}" for line in head), "common:", *self._lines(tree, 1)]) + "\n"

    def _lines(self, tree: Mapping[str, object], depth: int) -> list[str]:
        # A leaf of `tree` is our dotted key
        lines = []
        for name, held in tree.items():
            if isinstance(held, Mapping):
                lines += [f"{'    ' * depth}{name}:", *self._lines(held, depth + 1)]
                continue
            line = f"{'    ' * depth}{name}: {yaml_value(self.values[str(held)])}"
            comment = self.comments.get(str(held), "")
            lines.append(f"{line}  # {comment}" if comment else line)
        return lines

    def _written(self) -> list[str]:
        """Return the keys to write, in the order of the schema."""
        keys = []
        for name, info in leaves(Config):
            # model.kwargs has no schema: its options are those of the method's build()
            if name == "model.kwargs":
                keys += [key for key in self.values if key.startswith(KWARGS) and not self._is_default(key)]
            elif name in self.values and (
                info.is_required() or self.values[name] != _as_written(info.get_default(call_default_factory=True))
            ):
                keys.append(name)

        return keys

    def _is_default(self, key: str) -> bool:
        # The default is source text, because the method is parsed and not imported
        option = model_options.options(str(self.values["model.type"]), str(self.values["model.backbone"])).get(
            key.removeprefix(KWARGS)
        )
        if option is None or option.default is None:
            return False
        return ast.literal_eval(option.default) == self.values[key]


def _as_written(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def yaml_value(value: object) -> str:
    """Return a value as text for a YAML file, on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_value, value))}]"
    # Unquoted only if YAML cannot read a different type
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", value) and value.lower() not in _WORDS:
        return value

    if isinstance(value, float):
        return f"{value:.12g}"
    return json.dumps(value, ensure_ascii=False)  # null, true, false, whole numbers and quoted texts are YAML, too


_WORDS = {"true", "false", "null"}  # YAML does not read them as text


def table(rows: Iterable[KeyRow]) -> list[str]:
    """Return the lines of the table: three groups, and one or two lines for each key of theirs."""
    lines: list[str] = []

    for kind in (EXACT, OTHER, NOT):
        of_kind = [row for row in rows if row.kind == kind]
        lines += ["", f"{kind} ({len(of_kind)})"]
        # A few long lines must not push the right column off the screen
        width = min(max((len(row.theirs) for row in of_kind), default=0), 70)
        for row in of_kind:
            right = row.ours or row.note
            lines.append(f"  {row.theirs:<{width}}  {'-> ' if row.ours else ''}{right}".rstrip())
            if row.ours and row.note:
                lines.append(f"      {row.note}")

    # Without the blank line before the first group
    return lines[1:]
