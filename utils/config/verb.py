"""`python main.py config EXP`: the resolved config as YAML, and where each value comes from.

`--docs` and `--schema` write the two files that are generated from the schema.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic.fields import FieldInfo

from utils.config.lengths import to_dict
from utils.config.loader import load
from utils.config.paths import ROOT
from utils.config.schema import BatchNorm, Config, is_free, leaves
from utils.errors import UserError
from utils.options import Parser

DOCS = Path("docs/config.md")
SCHEMA = Path("exps/config.schema.json")


def main(argv: Sequence[str], *, check: Callable[[Config], Sequence[str]] = lambda _: ()) -> int:
    """Print a config, or write the generated files.

    Args:
        argv: the words of the command.
        check: returns the problems of the files that a config names, one text each.

    Raises:
        UserError: the config is wrong, or `check` found a problem; the config is printed first in that case.
    """
    parser = Parser(prog="main.py config", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("exp", nargs="?", type=Path, help="experiment folder, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value")
    parser.add_argument("--keys-only", action="store_true", help="do not check lists, roots and other files")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCS}")
    parser.add_argument("--schema", action="store_true", help=f"write {SCHEMA}, for completion in editors")
    args = parser.parse_args(argv)

    if not (args.exp or args.docs or args.schema):
        raise UserError("name an experiment folder, as in `python main.py config exps/demo_exps/tsm_resnet18/motion8`")

    # Files that are generated from the schema
    for requested, file, text in ((args.docs, DOCS, markdown), (args.schema, SCHEMA, json_schema)):
        if requested:
            (ROOT / file).parent.mkdir(exist_ok=True)
            (ROOT / file).write_text(text(), encoding="utf-8")
            print(f"wrote {file}")

    # Print the config before its files are checked: it helps to find the mistake
    if args.exp:
        cfg = load(args.exp, args.set)
        print(as_yaml(cfg), flush=True)
        if not args.keys_only and (problems := check(cfg)):
            raise UserError("\n".join([f"training would stop: {len(problems)} problem(s) with files", *problems]))
    return 0


def as_yaml(cfg: Config) -> str:
    """Return the config as YAML that loads as the same config; a comment after each value names its origin."""
    return "\n".join(["common:", *_lines(cfg, to_dict(cfg), "")])


def _lines(cfg: Config, tree: Mapping[str, object], prefix: str) -> Iterator[str]:
    indent = "    " * (prefix.count(".") + 1)
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(cfg, value, f"{key}.")
        else:
            origin = cfg.origin(key).rpartition("/")[2]  # without the folder: it is the same in all lines
            yield f"{f'{indent}{name}: {json.dumps(value)}':<60}  # {origin}"


def json_schema() -> str:
    """Return the JSON schema of the whole file. `model.kwargs` is open: methods/ and networks/ decide on it."""
    inner = Config.model_json_schema()
    definitions = inner.pop("$defs")
    # pydantic's definitions must be at the root: its references point there
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Zoetrope experiment",
        "type": "object",
        "properties": {"common": inner},
        "required": ["common"],
        "additionalProperties": False,
        "$defs": definitions,
    }
    return json.dumps(_without_own_words(schema), indent=1) + "\n"


def _without_own_words(node: object) -> object:
    """Drop our own words (`free`, `why`), and pydantic's titles, which only repeat the names of keys."""
    if isinstance(node, dict):
        kept = {name: _without_own_words(value) for name, value in node.items() if name not in ("free", "why")}
        if isinstance(kept.get("title"), str) and "description" in kept:
            del kept["title"]
        return kept
    return [_without_own_words(item) for item in node] if isinstance(node, list) else node


def markdown() -> str:
    """Return the reference page of all keys, in Markdown."""
    text = [
        "# config.yaml, key by key",
        "",
        "Written by `python main.py config --docs` from `utils/config/schema.py`; do not edit by hand.",
        "",
        "All keys go under `common:`. A key without a default is required. `resume` shows whether a key may",
        "change when a run is continued: *yes* means that the change does not alter what the run means, *no*",
        "that it is refused (start again with `--fresh`). Every number has an upper limit that no known",
        "recipe comes near; a larger one is refused, with the reason. `--set common.key=value` overrides a",
        "key for one run. If two keys are for the same setting, like `max_iter` and `max_epoch`, setting one",
        "this way replaces the other. Relative paths are looked for in the repository first, then next to",
        "the config.",
        "",
        "`python main.py config EXP` prints a config with all defaults and where each value comes from, and",
        "checks the files that it names: lists, labels, class names, roots, a few videos. It exits with 2 if",
        "something would stop the run; `--keys-only` skips the files, for a machine that has no data.",
        "",
        *_table(leaves()),
        "",
        "## model.kwargs",
        "",
        "These are the options of the method (parameters of `build` in `methods/<type>.py`) and of the",
        "backbone (parameters of its builder in `networks/`), by their names there, and the following:",
        "",
        *_table((f"model.kwargs.{name}", info) for name, info in leaves(BatchNorm)),
        "",
    ]
    return "\n".join(text)


def _table(fields: Iterable[tuple[str, FieldInfo]]) -> Iterator[str]:
    yield "| key | type | range | default | resume | meaning |"
    yield "|---|---|---|---|---|---|"
    for key, info in fields:
        default = "required" if info.is_required() else f"`{_value(info.get_default(call_default_factory=True))}`"
        meaning = (info.description or "").replace("|", "\\|")
        limits, resume = _range([*info.metadata, info.annotation]), "yes" if is_free(key) else "no"
        yield f"| `{key}` | {_type(info.annotation)} | {limits} | {default} | {resume} | {meaning} |"


def _range(parts: Sequence[object]) -> str:
    """Return the limits of a number, or of each number of a list, as text; "" without limits.

    Args:
        parts: types, and the constraints that pydantic attaches to them.
    """
    bounds: dict[str, str] = {}

    def walk(part: object) -> None:
        # `kinds.within` keeps its limits on the check function, pydantic on its constraints
        if limits := getattr(getattr(part, "func", None), "limits", None):
            bounds.update(zip((">=", "<="), (f"{limit:g}" for limit in limits), strict=True))
        for sign, name in _SIGNS.items():
            limit = getattr(part, name, None)
            if isinstance(limit, (int, float)):
                bounds.setdefault(sign, f"{int(limit):,}" if limit == int(limit) and limit < 1e15 else f"{limit:g}")
        # Constraints may be nested: on the items of a list, or on one of two types
        for inner in [*typing.get_args(part), *getattr(part, "metadata", ())]:
            walk(inner)

    for part in parts:
        walk(part)
    if ">=" in bounds:
        bounds.pop(">", None)
    return ", ".join(f"{sign} {limit}" for sign, limit in bounds.items())


def _value(value: object) -> str:
    if value is None:
        return "null"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


_SIGNS = {">": "gt", ">=": "ge", "<": "lt", "<=": "le"}
_WORDS: dict[object, str] = {bool: "true, false", int: "integer", float: "number", str: "text"}


def _type(kind: object) -> str:
    """Return a type in words: `number`, `list of integers`, `A, B` for a choice."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _type(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in typing.get_args(kind) if part is not type(None))
    if origin is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    if origin is tuple:
        words = _type(typing.get_args(kind)[0])
        return f"list of ({words})" if " " in words else f"list of {words}s"
    return _WORDS.get(kind, "section")
