"""The choices of `model.type`, `model.backbone` and `model.kwargs`, read from the source of methods/ and networks/.

The files are parsed, never imported, so a config is checked without torch. A new method is one new file: the signature
of its `build(*, ...)` defines its options by name, type and default.

- a method is a file `methods/NAME.py` that defines `build`; names that start with `_` are not methods
- a backbone is a public function of a file in networks/ whose parameters are all keyword-only
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST, MOST_ITEMS, MOST_LETTERS = 65_536, 1000, 4000  # limits of one option: absolute value, items, letters
GIVEN_BY_US = {"type", "backbone", "num_class", "num_segments", "dropout", "pretrained"}  # have their own config keys


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter."""

    name: str
    annotation: str  # as written: "int", "float | None", "Literal['a', 'b']"; "" if absent
    default: str | None  # as written; None: must be given
    where: str  # the file that defines it, relative to the root


@dataclass(frozen=True)
class Builder:
    """The `build` of a method, or a function that builds a backbone."""

    name: str
    where: str
    options: tuple[Option, ...]
    takes_more: bool  # has **kwargs, and passes them on to the backbone


@functools.cache
def methods(root: Path = ROOT) -> Mapping[str, Builder]:
    """Return the legal values of model.type."""
    builders = {}
    for file in sorted((root / "methods").glob("*.py")):
        if not file.name.startswith("_"):
            for function in _functions(file):
                if function.name == "build":
                    builders[file.stem] = _builder(function, file.stem, file, root)
    return builders


@functools.cache
def backbones(root: Path = ROOT) -> Mapping[str, Builder]:
    """Return the legal values of model.backbone."""
    builders = {}
    for file in sorted((root / "networks").glob("*.py")):
        if not file.name.startswith("_"):
            for function in _functions(file):
                by_keyword = function.args.kwonlyargs or function.args.kwarg
                positional = function.args.args or function.args.posonlyargs or function.args.vararg
                if by_keyword and not positional and not function.name.startswith("_"):
                    builders[function.name] = _builder(function, function.name, file, root)
    return builders


def options(method: str, backbone: str, root: Path = ROOT) -> dict[str, Option]:
    """Return the options in model.kwargs of a method on a backbone; an unknown name counts as all of its kind."""
    known_methods, known_backbones = methods(root), backbones(root)
    builders = [known_methods[method]] if method in known_methods else list(known_methods.values())
    networks = [known_backbones[backbone]] if backbone in known_backbones else list(known_backbones.values())

    # Methods last: their own option wins over one of that name in a backbone
    if any(builder.takes_more for builder in builders):
        builders = [*networks, *builders]
    by_name = {option.name: option for builder in builders for option in builder.options}
    return {name: option for name, option in by_name.items() if name not in GIVEN_BY_US}


def mismatch(value: object, annotation: str) -> str | None:
    """Return why a plain value does not fit an annotated parameter; None if it fits or the annotation is not simple.

    Simple types are bool, int, float, str, None, unions, Literal, tuple/list/Sequence of these; an int fits a float.
    """
    try:
        tree = ast.parse(annotation, mode="eval").body if annotation else None
    except SyntaxError:
        tree = None
    if tree is None or _fits(value, tree):
        return None
    return f"must be {_in_words(tree)}, not {shown(value)}"


def excess(value: object) -> str | None:
    """Return why the size of a value is too large for any option, or None.

    An option's own code decides what it accepts. These limits keep out numbers that could only cause an overflow or
    exhaust the memory.
    """
    numbers = value if isinstance(value, tuple) else (value,)
    if len(numbers) > MOST_ITEMS:
        return f"must hold at most {MOST_ITEMS:,} values, not {len(numbers):,}"

    for number in numbers:
        if isinstance(number, tuple) and (reason := excess(number)):
            return reason
        if isinstance(number, str) and len(number) > MOST_LETTERS:
            return f"must have at most {MOST_LETTERS:,} characters, not {len(number):,}"
        if isinstance(number, float) and not math.isfinite(number):
            return f"must be a finite number, not {shown(number)}"
        if isinstance(number, (int, float)) and abs(number) > MOST:
            return f"must lie between -{MOST:,} and {MOST:,}, not {shown(number)}: no network has so many of anything"
    return None


def shown(value: object) -> str:
    """Return a value as YAML would write it, shortened."""
    text = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    if text is None:
        text = "null" if value is None else "a section" if isinstance(value, dict) else repr(value)
    if isinstance(value, tuple):
        text = "[" + ", ".join(shown(item) for item in value) + "]"
    return shortened(text)


def shortened(text: str, letters: int = 60) -> str:
    """Return at most `letters` letters of a text."""
    return text if len(text) <= letters else text[: letters - 3] + "..."


def _functions(file: Path) -> list[ast.FunctionDef]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []  # importing the file reports the error
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def _builder(function: ast.FunctionDef, name: str, file: Path, root: Path) -> Builder:
    where = str(file.relative_to(root))
    arguments = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    parameters = tuple(
        Option(
            name=argument.arg,
            annotation=ast.unparse(argument.annotation) if argument.annotation else "",
            default=None if default is None else ast.unparse(default),
            where=where,
        )
        for argument, default in arguments
    )
    return Builder(name=name, where=where, options=parameters, takes_more=function.args.kwarg is not None)


_KINDS = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}
_WORDS = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "a text", "None": "null"}


def _fits(value: object, annotation: ast.expr) -> bool:
    # bool is a subclass of int, so it is checked before numbers and excluded from them
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id=("int" | "float" | "str") as name):
            return isinstance(value, _KINDS[name]) and not isinstance(value, bool)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return any(value == choice and type(value) is type(choice) for choice in _literal(choices))
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, ast.Constant(value=second)])):
            return isinstance(value, tuple) and second is ... and all(_fits(part, item) for part in value)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=items)):
            return isinstance(value, tuple) and len(value) == len(items) and all(map(_fits, value, items))
        case ast.Subscript(value=ast.Name(id=("list" | "Sequence")), slice=item):
            return isinstance(value, tuple) and all(_fits(part, item) for part in value)
    return True


def _literal(choices: ast.expr) -> list[object]:
    value = ast.literal_eval(choices)
    return list(value) if isinstance(choices, ast.Tuple) else [value]


def _in_words(annotation: ast.expr) -> str:
    match annotation:
        case ast.BinOp(left=left, right=right):
            return f"{_in_words(left)} or {_in_words(right)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            return "one of " + ", ".join(shown(choice) for choice in _literal(choices))
    text = ast.unparse(annotation)
    return _WORDS.get(text, f"a value of type {text}")
