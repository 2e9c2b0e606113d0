"""Read a config file of MMAction2 (`.py`) and its `_base_` files as plain values: parse with `ast`, never execute.

* Allowed: literals, `dict()`, lists, tuples, arithmetic on literals, names of the same file and f-strings of them,
  `_base_`, `_base_.NAME`, `_delete_`, `NAME.copy()` and `NAME[KEY] = VALUE`. Anything else is an error with file and
  line.
* Files, depth, values and letters of all files together are limited, and counted before they are made: a short text
  cannot fill the memory.
"""

from __future__ import annotations

import ast
import operator
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, TypeAlias

from utils.errors import UserError, refuse_odd_file

MAX_BYTES = 200_000  # of a file
MAX_FILES = 50  # _base_ files included
MAX_VALUES = 20_000  # of all files together; every use of a name counts
MAX_DEPTH = 40  # of nested values; below Python's own limit of recursion
MAX_NUMBER = 1e18
LETTERS_A_VALUE = 100  # a longer text counts as several values

Value: TypeAlias = "None | bool | int | float | str | list[Value] | tuple[Value, ...] | dict[Key, Value]"
Key: TypeAlias = "str | int"
Tree: TypeAlias = "dict[Key, Value]"

_ARITHMETIC: dict[type[ast.operator], Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
# Names of refused syntax in messages
_WORDS: dict[type[ast.AST], str] = {
    ast.FunctionDef: "a function",
    ast.AsyncFunctionDef: "a function",
    ast.ClassDef: "a class",
    ast.Lambda: "a function",
    ast.For: "a loop",
    ast.While: "a loop",
    ast.If: "a condition",
    ast.IfExp: "a condition",
    ast.With: "a with block",
    ast.Try: "a try block",
    ast.ListComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.Delete: "del",
    ast.Raise: "raise",
    ast.Assert: "assert",
}


def read(file: Path) -> Tree:
    """Return the names of a config file, merged over those of its `_base_` files as MMAction2 merges them.

    Raises:
        UserError: the file cannot be read, holds code, or is larger than any config.
    """
    return _Budget().config(file, ())


class _Budget:
    """The limits that all files of one config share, and what they have used of them."""

    def __init__(self) -> None:
        self.files = self.values = 0

    def config(self, file: Path, above: tuple[Path, ...]) -> Tree:
        """Return the names of one file merged over its bases; `above` are the files that lead to it."""
        # Links resolved, so that a cycle through a link is one
        real = Path(os.path.realpath(file))
        if real in above:
            chain = " -> ".join(path.name for path in (*above[above.index(real) :], real))
            raise UserError(f"{file}: its _base_ leads back to itself ({chain}); remove one of them")

        self.files += 1
        if self.files > MAX_FILES:
            raise UserError(f"{file}: more than {MAX_FILES} _base_ files; no config has so many")

        parsed = _File(file, self, (*above, real))
        for statement in _parsed(file).body:
            parsed.statement(statement)
        return parsed.merged(parsed.names, parsed.base)

    def spend(self, file: Path, line: int, values: int) -> None:
        """Count values; raise UserError when there are too many."""
        self.values += values
        if self.values > MAX_VALUES:
            raise UserError(f"{file}:{line}: more than {MAX_VALUES:,} values; no config holds so many")


def _parsed(file: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    refuse_odd_file(file)  # a pipe or a device would block
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{file}: larger than {MAX_BYTES} bytes, this cannot be a config")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd backslashes are the author's affair
            return ast.parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{raw[: error.start].count(10) + 1}: not UTF-8 text") from error
    except SyntaxError as error:
        raise UserError(f"{file}:{error.lineno or 1}: not Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file}: not a config: nested too deeply, or it holds a null byte") from error


class _File:
    """The statements of one file.

    Attributes:
        names: values that they have assigned so far.
        base: the merged names of its `_base_` files.
        used: names that have been read, see `put`.
        kinds: node type -> function that returns its value; a type that is absent is code.
    """

    def __init__(self, file: Path, budget: _Budget, above: tuple[Path, ...]) -> None:
        self.file, self.budget, self.above = file, budget, above
        self.names: Tree = {}
        self.base: Tree = {}
        self.used: set[str] = set()
        self.kinds: dict[type[ast.AST], Callable[..., Value]] = {
            ast.Constant: self.constant,
            ast.Name: self.name,
            ast.List: lambda node, depth: self.items(node.elts, depth),
            ast.Tuple: lambda node, depth: tuple(self.items(node.elts, depth)),
            ast.Dict: self.dictionary,
            ast.Call: self.call,
            ast.UnaryOp: self.unary,
            ast.BinOp: self.binary,
            ast.JoinedStr: self.joined,
            ast.Subscript: self.item,
            ast.Attribute: lambda node, depth: self.of_base(node),
            ast.Set: self.braces,
        }

    # ------------------------------------------------------------------------------------------------------ statements

    def statement(self, node: ast.stmt) -> None:
        """Evaluate an assignment; skip a string on its own (a docstring)."""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        # An annotated assignment, x: int = 1
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            node = ast.copy_location(ast.Assign([node.target], node.value), node)
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            self.refuse(node)

        target, value = node.targets[0], self.value(node.value, 0)
        if isinstance(target, ast.Name) and target.id == "_base_":
            self.take_bases(node, value)
        elif isinstance(target, ast.Name):
            self.names[target.id] = value
            self.used.discard(target.id)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            self.put(target.value.id, self.value(target.slice, 0), value, node)
        else:
            self.refuse(target)

    def put(self, name: str, key: Value, value: Value, node: ast.stmt) -> None:
        """Set NAME[KEY] = VALUE; refuse it once the name was used: values are copied here and shared in Python."""
        held = self.names.get(name)
        if not isinstance(held, dict) or not isinstance(key, str | int) or name in self.used:
            self.fail(node, f"{name}[...] is changed although it is not a dict or already in use; write out its value")
        held[key] = value

    def take_bases(self, node: ast.stmt, value: Value) -> None:
        """Read the `_base_` files; no two of them may define the same name, as in MMAction2."""
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple):
            self.fail(node, "_base_ must be a path or a list of them")

        for name in names:
            if not isinstance(name, str) or "::" in name or "://" in name or not name.endswith(".py"):
                self.fail(
                    node,
                    f"_base_ {str(name)[:200]!r} is not the path of a .py file; copy the file here and name it",
                )

            file = self.file.parent / name
            if not file.is_file():
                self.fail(node, f"its _base_ {name} is missing: there is no file {file}")
            base_names = self.budget.config(file, self.above)
            if twice := next((key for key in base_names if key in self.base), None):
                self.fail(node, f"two _base_ files define {twice}; MMAction2 refuses that, too")
            self.base.update(base_names)

    def merged(self, over: Tree, base: Tree, depth: int = 0) -> Tree:
        """Return `over` on top of `base`: dicts are merged, all else is replaced; `_delete_` replaces a dict."""
        self.budget.spend(self.file, 1, len(over) + len(base))

        result = dict(base)
        for key, value in over.items():
            if not isinstance(value, dict):
                result[key] = value
                continue

            # A dict over something else is refused, as in MMAction2
            below = base.get(key)
            if key in base and not value.get("_delete_", False) and not isinstance(below, dict):
                raise UserError(
                    f"{self.file}: {key} is a dict here and {type(below).__name__} in its _base_; add _delete_=True"
                )

            replaces = value.get("_delete_", False) or not isinstance(below, dict)
            kept: Tree = {name: inner for name, inner in value.items() if name != "_delete_"}
            result[key] = self.merged(kept, {} if replaces or not isinstance(below, dict) else below, depth + 1)
        return result

    # ----------------------------------------------------------------------------------------------------- expressions

    def value(self, node: ast.expr, depth: int) -> Value:
        """Return the value of an expression; raise UserError for anything that would have to be executed."""
        self.budget.spend(self.file, node.lineno, 1)
        if depth > MAX_DEPTH:
            self.fail(node, f"nested deeper than {MAX_DEPTH} levels; no config is")
        kind = self.kinds.get(type(node))
        if kind is None:
            self.refuse(node)
        return kind(node, depth + 1)

    def constant(self, node: ast.Constant, depth: int) -> Value:
        if not isinstance(node.value, bool | int | float | str | None):  # bytes, complex, ...
            self.refuse(node)
        return self.checked(node, node.value)

    def name(self, node: ast.Name, depth: int) -> Value:
        if node.id not in self.names:
            self.fail(node, f"{node.id} has no value before this line")
        self.used.add(node.id)
        return self.copied(node, self.names[node.id])  # no sharing, and each use counts

    def items(self, nodes: Iterable[ast.expr], depth: int) -> list[Value]:
        return [self.value(node, depth) for node in nodes]

    def dictionary(self, node: ast.Dict, depth: int) -> Value:
        keys = [None if key is None else self.value(key, depth) for key in node.keys]
        pairs = zip(node.keys, keys, node.values, strict=True)
        return self.pairs(((None if at is None else key, value) for at, key, value in pairs), depth)

    def pairs(self, given: Iterable[tuple[Value, ast.expr]], depth: int) -> Tree:
        """Return a dict of keys and expressions; the key None stands for `**`."""
        result: Tree = {}
        for key, node in given:
            value = self.value(node, depth)
            if key is None and isinstance(value, dict):
                result.update(value)
            elif isinstance(key, str | int):
                result[key] = value
            else:
                self.fail(node, "a key of a dict must be a text or a whole number")
        return result

    def call(self, node: ast.Call, depth: int) -> Value:
        """Evaluate dict(...), range(...) of a few numbers, and NAME.copy()."""
        function = node.func
        if isinstance(function, ast.Name) and function.id == "range" and not node.keywords:
            return self.range(node, self.items(node.args, depth))
        if isinstance(function, ast.Name) and function.id == "dict" and len(node.args) <= 1:
            # A positional argument of dict() is a dict: the same as `**`
            given = [*((None, value) for value in node.args), *((word.arg, word.value) for word in node.keywords)]
            return self.pairs(given, depth)
        # Names are copied anyway
        if isinstance(function, ast.Attribute) and function.attr == "copy" and not node.args and not node.keywords:
            return self.value(function.value, depth)
        return self.refuse(node)

    def range(self, node: ast.Call, ends: list[Value]) -> list[Value]:
        """Return the numbers of a range as a list."""
        whole = [end for end in ends if isinstance(end, int)]
        if not 1 <= len(whole) <= 3 or len(whole) != len(ends) or 0 in whole[2:]:
            self.fail(node, "range takes one to three whole numbers")

        numbers = range(*whole)
        # Count before making the list
        self.budget.spend(self.file, node.lineno, min(len(numbers), MAX_VALUES + 1))
        return list(numbers)

    def unary(self, node: ast.UnaryOp, depth: int) -> Value:
        value = self.value(node.operand, depth)
        if isinstance(node.op, ast.Not):
            return not value
        if not isinstance(value, int | float) or not isinstance(node.op, ast.USub | ast.UAdd):
            self.refuse(node)
        return -value if isinstance(node.op, ast.USub) else value

    def binary(self, node: ast.BinOp, depth: int) -> Value:
        """Evaluate arithmetic on numbers; join texts and lists, and repeat them by a number."""
        left, right = self.value(node.left, depth), self.value(node.right, depth)

        function = _ARITHMETIC.get(type(node.op))
        if function is None:
            self.refuse(node)

        if isinstance(left, int | float) and isinstance(right, int | float):
            # Powers of integers have no limit of size, and would fill the memory before `checked` sees them
            if function is operator.pow and (abs(left) > 1e6 or abs(right) > 64):
                self.fail(node, "the result is a larger number than any config holds")
        elif function is operator.mul:
            self.check_repetition(node, left, right)
        elif function is not operator.add or type(left) is not type(right) or not isinstance(left, str | list | tuple):
            self.refuse(node)

        try:
            return self.checked(node, function(left, right))
        except (ArithmeticError, TypeError, ValueError) as error:
            self.fail(node, f"the arithmetic has no result ({error})")

    def check_repetition(self, node: ast.BinOp, left: Value, right: Value) -> None:
        """Count the values of a list or text before it is repeated."""
        what, times = (left, right) if isinstance(right, int) else (right, left)
        if not isinstance(what, str | list | tuple) or not isinstance(times, int):
            self.refuse(node)
        self.budget.spend(self.file, node.lineno, _measure(what, MAX_VALUES)[0] * max(times, 0))

    def joined(self, node: ast.JoinedStr, depth: int) -> Value:
        """Evaluate an f-string of names, without formats."""
        parts = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                if part.format_spec is not None or part.conversion != -1:
                    self.fail(node, "a format in an f-string; write out the text that it gives")
                inner = self.value(part.value, depth)
                if not isinstance(inner, str | int | float):
                    self.fail(node, "an f-string of something that is neither a text nor a number")
                parts.append(str(inner))
            else:
                parts.append(str(self.value(part, depth)))

        return self.checked(node, "".join(parts))

    def item(self, node: ast.Subscript, depth: int) -> Value:
        held, key = self.value(node.value, depth), self.value(node.slice, depth)
        try:
            return held[key]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript, reportArgumentType, reportCallIssue, reportReturnType]
        except (LookupError, TypeError) as error:
            self.fail(node, f"there is nothing at [{str(key)[:100]!r}] ({type(error).__name__})")

    def of_base(self, node: ast.expr) -> Value:
        """Return the value of _base_.NAME.NAME."""
        # The innermost node is the first name
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id != "_base_":
            self.refuse(node, "an attribute")

        held: Value = self.base
        for name in reversed(names):
            if not isinstance(held, dict) or name not in held:
                self.fail(node, f"_base_.{'.'.join(reversed(names))} is in none of the _base_ files")
            held = held[name]
        return self.copied(node, held)

    def braces(self, node: ast.Set, depth: int) -> Value:
        """Evaluate {{_base_.NAME}}, the other spelling of MMAction2."""
        # Python parses it as a set within a set
        inner = node.elts[0]
        if len(node.elts) == 1 and isinstance(inner, ast.Set) and len(inner.elts) == 1:
            return self.of_base(inner.elts[0])
        return self.refuse(node, "a set")

    # ----------------------------------------------------------------------------------------------------------- limits

    def copied(self, node: ast.expr, value: Value) -> Value:
        """Return a copy that shares nothing; it counts as if it had been written out."""
        # Counting stops where the budget ends: a nest of repeated names grows exponentially
        size, depth = _measure(value, MAX_VALUES - self.budget.values + 1)
        self.budget.spend(self.file, node.lineno, size)
        if depth > MAX_DEPTH:
            self.fail(node, f"nested deeper than {MAX_DEPTH} levels; no config is")
        return _copy(value)

    def checked(self, node: ast.expr, value: Value) -> Value:
        """Return a number or text; raise UserError if it is larger than a config's."""
        if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:  # nan, too
            self.fail(node, "a larger number than any config holds")
        if isinstance(value, complex):
            self.refuse(node)
        if isinstance(value, str):
            self.budget.spend(self.file, node.lineno, len(value) // LETTERS_A_VALUE)
        return value

    def refuse(self, node: ast.AST, what: str = "") -> NoReturn:
        """Raise a UserError that names the code in the line."""
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module or ".")]
        if names:
            what = f"an import of {', '.join(names)[:100]}"
        elif isinstance(node, ast.Call):
            what = f"a call of {_dotted(node.func)}"
        what = what or _WORDS.get(type(node), "this")
        self.fail(node, f"{what} is code, and nothing in the file is run; write out the value that it gives")

    def fail(self, node: ast.AST, text: str) -> NoReturn:
        """Raise a UserError at the line of a node."""
        raise UserError(f"{self.file}:{getattr(node, 'lineno', 1)}: {text}")


def _dotted(node: ast.expr) -> str:
    """Return the dotted name of a called function, with "..." in place of anything that is not a name."""
    names = []
    while isinstance(node, ast.Attribute) and len(names) < 5:
        names.append(node.attr)
        node = node.value
    names.append(node.id if isinstance(node, ast.Name) else "...")
    return ".".join(reversed(names))[:100]


def _measure(value: Value, most: int) -> tuple[int, int]:
    """Return (number of values, depth) of a value, counted no further than `most`."""
    # A stack and no recursion: depth is not checked yet
    count = deepest = 0
    left = [(value, 0)]

    while left and count <= most:
        held, depth = left.pop()
        deepest = max(deepest, depth)
        count += len(held) // LETTERS_A_VALUE + 1 if isinstance(held, str) else 1
        inner = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
        left.extend((part, depth + 1) for part in inner)

    return count, deepest


def _copy(value: Value) -> Value:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return tuple(map(_copy, value)) if isinstance(value, tuple) else value
