"""The commands on the pages of the site: where they stand, their normal form, and what their parser says to them.

A command is a line of a block marked `sh`, or code in a sentence that begins like one, such as `main.py eval EXP`. As
on manual pages, `[--cam]` may be left out, `a|b` is one of both, words in capitals stand for values, `...` for more.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib
import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import main
from docs.site_pages import ELSEWHERE
from launch import __main__ as launch
from launch import options
from tests import git
from tests.benchmarks.issues import ISSUES
from tests.conftest import ROOT
from utils.errors import UserError
from utils.options import Parser

# What begins a command, in a block or in a sentence.
STARTS = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:[\w./-]*(?:python |main\.py |pytest |\b(?:train|eval)\.sh\b)|make |pip |torchrun -)"
)
_FENCE = re.compile(r"^( *)(```+)(\w*)[^\n]*\n(.*?)^ *\2 *$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_STEP = re.compile(r"^ *(?:\d\. |created by )(.+?)(?:  .*)?$")  # `2. python main.py scan LISTS ...    what it is for`
_EITHER = re.compile(r"\[([^][]*?) \| ([^][]*?)\]")
# EXP, N, EXP:NAME, R=FOLDER, KEY=A,B, FILE.onnx, CLIPSxCROPS, $EXP, <name>
_VALUE = re.compile(r"(?:\w+=)?[A-Z][A-Z0-9_]*(?:[=.:x,/]\w+)*|.*\$\{?[A-Z].*")

# Experiments that the reader of a page makes, and folders that he fills.
OF_READERS = (
    "data/", "pretrained/", "exps/mine", "exps/other", "exps/my_exps/", "exps/probe",
    "exps/ucf101_exps/tsm_resnet50/my_first",
)  # fmt: skip

# Programs that every Unix has.
SHELL = {"head", "mkdir", "mv", "unrar", "unzip"}


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a page."""

    place: str  # page:line
    text: str
    words: tuple[str, ...]  # of one alternative
    whole: bool  # it stands in a block, so all words that it needs are there

    @functools.cached_property
    def form(self) -> str:
        """What runs, and the names of the options in alphabetical order: `main.py eval --list --root`."""
        return " ".join((*self.subject, *self.options))

    @functools.cached_property
    def options(self) -> list[str]:
        """The names of the options, without values."""
        return sorted({word.partition("=")[0] for word in self.rest if re.match(r"--?[a-z]", word)})

    @functools.cached_property
    def subject(self) -> tuple[str, ...]:
        """What runs, without options."""
        kind, rest = self.kind, self.rest
        if starter := next((word for word in self.words if word in ("srun", "torchrun")), ""):
            kind = f"{starter} {kind}"
        first = [word for word in rest if not word.startswith("-")][:1]
        if kind.endswith("main.py"):
            with_kind = first in (["benchmark"], ["lists"]) and len(rest) > 1 and re.fullmatch("[a-z0-9]+", rest[1])
            return (kind, *first, *(rest[1:2] if with_kind else ()))
        if kind in ("train.sh", "eval.sh") or (kind == "launch" and first == ["sweep"]):
            where = "local" if "local" in rest else "..." if rest[:1] in ([], ["..."]) else "PARTITION"
            return (kind, *(first if kind == "launch" else ()), where)
        if kind == "make":
            return (kind, *first, *sorted(word.partition("=")[0] for word in rest[1:] if "=" in word))
        return (kind, *first) if kind in ("launch", "python") or kind.endswith("python -m") else (kind,)

    @functools.cached_property
    def kind(self) -> str:
        """`main.py`, `launch`, `train.sh`, `eval.sh`, `make`, `pytest`, `python -m`, `python`, or another program."""
        return self._parts[0]

    @functools.cached_property
    def rest(self) -> list[str]:
        """The words after what `kind` names."""
        return self._parts[1]

    @functools.cached_property
    def _parts(self) -> tuple[str, list[str]]:
        words = list(self.words)
        while words and re.match(r"[A-Z_]+=", words[0]):  # a variable for this command
            words.pop(0)
        names = [Path(word).name for word in words]
        name = names[0] if names else ""
        if "main.py" in (names[:2] if name in ("main.py", "python") else names):
            return "main.py", words[names.index("main.py") + 1 :]
        if name in ("python", "torchrun") and "-m" in words:
            module, rest = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
            return (module, rest) if module in ("launch", "pytest") else ("python -m", [module, *rest])
        return name, words[1:]


# ------------------------------------------------------------------------------------------------------- on the pages
def pages() -> list[str]:
    """Return the files that the site is made of."""
    return sorted({*(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")), *ELSEWHERE})


@functools.cache
def commands_of(page: str) -> tuple[Command, ...]:
    """Return the commands of a page."""
    return tuple(commands_in(page, (ROOT / page).read_text(encoding="utf-8")))


def commands_in(page: str, text: str) -> Iterator[Command]:
    """Yield the commands of the text of a page, `a|b` as two."""
    for fence in _FENCE.finditer(text):
        line = text.count("\n", 0, fence.start(4)) + 1
        if fence[3] in ("", "sh"):
            yield from _of_block(page, line, fence[4], is_shell=fence[3] == "sh", is_script=fence[4].startswith("#!"))

    sentences = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for number, indented in enumerate(sentences.splitlines(), 1):
        if indented.startswith("    ") and STARTS.match(indented.strip()):
            yield from _split(f"{page}:{number}", indented.strip(), whole=True)
    for span in _SPAN.finditer(sentences):
        words = " ".join(span[1].split())
        if short := _as_command(words):
            yield from _split(f"{page}:{sentences.count(chr(10), 0, span.start()) + 1}", short, whole=False)


def _of_block(page: str, line: int, block: str, *, is_shell: bool, is_script: bool) -> Iterator[Command]:
    """Yield the commands of a block: all lines of a shell block, the lines of a script that start main.py, steps."""
    begun = ""
    for number, row in enumerate(block.splitlines(), line):
        step = None if is_shell else _STEP.match(row)
        words = begun + (step[1] if step else row).strip()
        begun = words[:-1] if words.endswith("\\") else ""
        is_command = "main.py" in words if is_script else is_shell and words and not words.startswith("#")
        if not begun and (is_command or (step and STARTS.match(words))):
            yield from _split(f"{page}:{number}", words, whole=not step)


def unmarked(page: str) -> list[str]:
    """Return the places of lines that look like commands, in blocks that are not marked `sh`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        f"{page}:{text.count(chr(10), 0, fence.start(4)) + number}: {row}"
        for fence in _FENCE.finditer(text)
        for number, row in enumerate(fence[4].splitlines(), 1)
        if not fence[3] and STARTS.match(row)
    ]


def _as_command(words: str) -> str | None:
    """Return code of a sentence as a command, or None; verbs stand there also without `python main.py`."""
    first, _, rest = words.partition(" ")
    if first == "launch":
        return f"python -m {words}"
    if first in main.VERBS and (" --" in words or re.match(r"[A-Z]{3,}\b", rest)):
        return f"python main.py {words}"
    if first in launch.VERBS and re.match(r"EXP\b", rest):
        return f"python -m launch {words}"
    # `train.sh` alone is a file
    return words if STARTS.match(words) and rest else None


def _launch_verbs() -> set[str]:
    return {*launch.VERBS, *launch.STARTS}


def _split(place: str, text: str, *, whole: bool) -> Iterator[Command]:
    """Yield the command of each alternative, and of each part of a pipe."""
    seen = set()
    line = text.replace("\\|", "|")
    either = _EITHER.search(line)
    for variant in [_EITHER.sub(rf"[\{side}]", line) for side in (1, 2)] if either else [line]:
        for part in _parts_of(variant):
            bare = map(_unbracketed, part)
            choices = [word.split("|") if re.fullmatch(r"[\w|.-]+", word) else [word] for word in bare]
            for words in itertools.product(*choices):
                command = Command(place, text, tuple(filter(None, words)), whole)
                if command.words and command not in seen:
                    seen.add(command)
                    yield command


def _unbracketed(word: str) -> str:
    """Return a word without the brackets of what may be left out, and without dots that stand for more words."""
    word = word if word.startswith((".", "[ ", "/")) else word.strip("[]")
    return word if "/" in word or word == "..." else word.removesuffix("...")


def _parts_of(line: str) -> Iterator[list[str]]:
    """Yield the words of each command of a line with `&&` or a pipe."""
    words = shlex.split(line, comments=True)
    # `--annotations ...`: these dots stand for a value
    words = [
        "FILE" if word == "..." and before.startswith("--") else word
        for before, word in zip(["", *words], words, strict=False)
    ]
    for is_join, part in itertools.groupby(words, lambda word: word in ("&&", "|")):
        names = list(part)
        if not is_join and names[0] not in SHELL:
            yield names


# ------------------------------------------------------------------------------------------------------ does it parse
def mistake(command: Command) -> str | None:
    """Return what is wrong with a command, None if nothing is."""
    if "--help" in command.words:
        return None
    if problem := next((f"there is no {word}" for word in command.words if _is_missing(word)), None):
        return problem
    check = _CHECKS.get(command.kind)
    return check(command) if check else None


def _is_missing(word: str) -> bool:
    """Return True for a path of the repository that is not there."""
    word = word.removeprefix("./")
    top = word.partition("/")[0]
    if "/" not in word or top not in _top() or "..." in word or word.startswith(OF_READERS) or "/report/" in word:
        return False
    return not (ROOT / word).exists()


@functools.cache
def _top() -> set[str]:
    return {name.partition("/")[0] for name in git.files() if "/" in name} - {"utils"}


def _of_main(command: Command) -> str | None:
    words = command.rest
    if not words or words[0] == "--version":
        return None
    verb, *rest = words
    if verb not in main.VERBS:
        return f"main.py has no verb {verb}"
    if verb == "train":
        return _parsed(options.train_parser(), rest, command)
    if not rest and not command.whole:
        return None  # the name of a verb, not a command
    if verb == "benchmark" and not rest[1:] and not command.whole:
        return None if rest[0] in importlib.import_module("anal_tools.benchmark").KINDS else f"no benchmark {rest[0]}"
    return _of_function(importlib.import_module(main.VERBS[verb][0]).main, rest, command)


def _of_launch(command: Command) -> str | None:
    words = command.rest
    if not words or words[0].startswith("-") or (len(words) == 1 and not command.whole and words[0] in _launch_verbs()):
        return None
    if words[0] in launch.VERBS:
        return _of_function(launch.VERBS[words[0]], words[1:], command)
    return _of_start(words[0], words[1:], command)


def _of_script(command: Command) -> str | None:
    """Check `EXP/train.sh PARTITION N ...`: what the launcher does not know goes to the verb."""
    rest = command.rest
    rest = ["PARTITION", "N", *rest[1:]] if rest[:1] == ["..."] else rest  # `eval.sh ... --views 10x3`
    if command.whole or len(rest) > 1:
        return _of_start(command.kind.removesuffix(".sh"), ["EXP", *rest], command)
    return None


def _of_start(verb: str, words: list[str], command: Command) -> str | None:
    if verb not in launch.STARTS:
        return f"launch has no verb {verb}"
    unknown: list[str] = []
    problem = _parsed(launch._parser(), [verb, *words], command, unknown)
    return problem or _parsed(options.parser_of(verb), ["EXP", *(word for word in unknown if word != "--")], command)


class _Caught(Exception):
    """Carries the parser that a verb made, and its words."""


def _of_function(run: Callable[[Any], int], words: list[str], command: Command) -> str | None:
    """Check words with the parser that the main function of a verb makes; nothing after the parser runs."""

    def caught(parser: Parser, argv: list[str], *_: object) -> None:
        raise _Caught(parser, list(argv))

    names = ("parse_args", "parse_known_args", "parse_intermixed_args")
    with mock.patch.multiple(Parser, **dict.fromkeys(names, caught)):
        try:
            run(words)
        except UserError as error:
            return str(error)
        except _Caught as call:
            parser, argv = call.args
        else:
            return None
    return _parsed(parser, argv, command)


def _parsed(
    parser: argparse.ArgumentParser, words: list[str], command: Command, unknown: list[str] | None = None
) -> str | None:
    """Return the parser's message; words that stand for values fit everywhere."""
    for action in parser._actions:
        action.type = _lenient(action.type)
        if action.choices is not None:
            action.choices = _Choices(action.choices)
    parse = getattr(parser, "parse_intermixed_args" if "export" in parser.prog else "parse_args")
    try:
        if unknown is None:
            parse([word for word in words if word != "..."])
        else:
            unknown += parser.parse_known_args(words)[1]
    except UserError as error:
        left_out = "required" in str(error) or re.search(r"expected .*argument", str(error))
        return None if left_out and not command.whole else str(error)
    return None


def _lenient(convert: Any) -> Callable[[str], object]:
    """Return a conversion that leaves words which stand for a value as they are."""

    def converted(word: str) -> object:
        return word if convert is None or _VALUE.fullmatch(word) else convert(word)

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse says it
    return converted


class _Choices(list[Any]):
    """The choices of an option, and all words that stand for one."""

    def __contains__(self, word: object) -> bool:
        return super().__contains__(word) or bool(_VALUE.fullmatch(str(word)))


def _of_make(command: Command) -> str | None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", text, re.MULTILINE)
    variables = re.findall(r"^([A-Z]+) \?=|\$\(([A-Z]+)\)", text, re.MULTILINE)
    values = dict(word.split("=", 1) for word in command.rest if "=" in word)
    if unknown := [word for word in command.rest if "=" not in word and word not in (*targets, "...")]:
        return f"the Makefile has no target {unknown[0]}"
    if unknown := sorted(set(values) - set(itertools.chain(*variables))):
        return f"the Makefile has no variable {unknown[0]}"
    issue, rows = values.get("ISSUE", "nn"), values.get("ROWS", "...").split(",")
    if issue == "nn":
        return None
    if issue not in ISSUES:
        return f"no rows for issue {issue}"
    return next((f"issue {issue} has no row {row}" for row in rows if row not in (*ISSUES[issue], "...", "")), None)


def _of_module(command: Command) -> str | None:
    """Check `python -m tests.benchmarks.TOPIC.NAME`: the file, and that it has the options and the rows."""
    name = command.rest[0]
    if re.search(r"\.[A-Z]+\b", name):
        return None
    file = ROOT / name.replace(".", "/")
    file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    return _of_text(file, command) if file.is_file() else f"there is no module {name}"


def _of_file(command: Command) -> str | None:
    page = (ROOT / command.place.partition(":")[0]).read_text(encoding="utf-8")
    if f"<!-- test: {command.rest[0]} -->" in page:
        return None  # a program of this page
    file = ROOT / command.rest[0]
    if not file.is_file():
        return f"there is no {command.rest[0]}"
    return _of_text(file, command)


def _of_text(file: Path, command: Command) -> str | None:
    text = file.read_text(encoding="utf-8")
    if "run_rows" in text:
        text += (ROOT / "tests/benchmarks/rows.py").read_text(encoding="utf-8")
    needed = [*command.options]
    if "--rows" in command.rest[:-1]:
        needed += command.rest[command.rest.index("--rows") + 1].split(",")
    return next((f"{file.relative_to(ROOT)} knows no {word}" for word in needed if word not in text), None)


def _of_pip(command: Command) -> str | None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"\.\[([\w,-]+)\]", " ".join(command.words))
    return next((f"there is no extra {name}" for name in extras if not re.search(rf"^{name} = \[", text, re.M)), None)


_CHECKS: dict[str, Callable[[Command], str | None]] = {
    "main.py": _of_main,
    "launch": _of_launch,
    "train.sh": _of_script,
    "eval.sh": _of_script,
    "make": _of_make,
    "python -m": _of_module,
    "python": _of_file,
    "pip": _of_pip,
}


# ------------------------------------------------------------------------------------------------- which test runs it
def words_of(test: str) -> set[str]:
    """Return the words in the texts of a test, and of the functions of its file and of tests/ that it uses.

    Args:
        test: `tests/file.py::test_name` or `tests/file.py::Class::test_name`.

    Raises:
        LookupError: there is no such test.
    """
    file, _, name = test.partition("::")
    if not (ROOT / file).is_file() or name.replace("::", ".") not in _file(file).functions:
        raise LookupError(test)
    words, waiting, seen = set(), [(file, name.replace("::", "."))], set()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        texts, used = _function(*place)
        words |= texts
        waiting += used
    return words


def lacking(command: Command, tests: list[str]) -> set[str]:
    """Return the words of a command's normal form that no text of the tests has.

    Raises:
        LookupError: there is no such test.
    """
    words = set().union(*(words_of(test) for test in tests))
    first, *needed = [word for word in command.form.split() if word not in ("PARTITION", "...", "python", "-m")]
    if first not in ("main.py", "make"):
        needed.append(first.removesuffix(".sh") if first not in words else first)
    return {word for word in needed if word not in words and not set(word.split("/")) <= words}


@dataclasses.dataclass
class _File:
    functions: dict[str, ast.AST]  # also constants, and Class.method
    imports: dict[str, str]  # name -> module, or module.name


@functools.cache
def _file(name: str) -> _File:
    definitions = _File({}, {})
    for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
        _add(definitions, node)
    return definitions


def _add(definitions: _File, node: ast.AST) -> None:
    """Note what a statement of a file defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        definitions.functions[node.name] = node
    if isinstance(node, ast.ClassDef):
        definitions.functions |= {
            f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)
        }
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        definitions.functions |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.Import):
        definitions.imports |= {alias.asname or alias.name: alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        definitions.imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}


@functools.cache
def _function(file: str, name: str) -> tuple[set[str], list[tuple[str, str]]]:
    """Return the words of one function, and (file, name) of what it uses."""
    known, node = _file(file), _file(file).functions[name]
    words: set[str] = set()
    used = []
    nodes = list(ast.walk(node))
    docstrings = {id(inner.value) for inner in nodes if isinstance(inner, ast.Expr)}
    for inner in nodes:
        if isinstance(inner, ast.Import | ast.ImportFrom):
            _add(known, inner)
    for inner in nodes:
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and id(inner) not in docstrings:
            words |= set(re.split(r"[\s=/]+", inner.value))
        elif isinstance(inner, ast.Name | ast.arg):
            used += _defined(file, known, inner.id if isinstance(inner, ast.Name) else inner.arg)
        elif isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
            module = known.imports.get(inner.value.id, "")
            words |= _verbs_of(module, inner.attr)
            if module.startswith("tests."):
                used += _defined_in(module, inner.attr)
    return words, used


def _verbs_of(module: str, function: str) -> set[str]:
    """Return the verb that a call `module.function` runs."""
    if module == "main" and function == "train":
        return {"train"}
    if module == "launch.verbs" and function in launch.VERBS:
        return {"launch", function}
    if function == "main":
        return {verb for verb, (name, _) in main.VERBS.items() if name == module} | set(module.split("."))
    return set()


def _defined(file: str, known: _File, name: str) -> list[tuple[str, str]]:
    """Return where a name of a file is defined: there, in another file of the tests, or as a fixture of all tests."""
    if name in known.functions:
        return [(file, name)]
    if known.imports.get(name, "").startswith("tests."):
        return _defined_in(*known.imports[name].rsplit(".", 1))
    for folder in (Path(file).parent, Path("tests")):
        shared = f"{folder}/conftest.py"
        if (ROOT / shared).is_file() and name in _file(shared).functions:
            return [(shared, name)]
    return []


def _defined_in(module: str, name: str) -> list[tuple[str, str]]:
    file = module.replace(".", "/") + ".py"
    return [(file, name)] if (ROOT / file).is_file() and name in _file(file).functions else []
