"""The figures of tests/house/measure.py: they count what they claim to, and none of them gets worse."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.house import measure

# figure: (bound that holds now, goal)
BOUNDS: dict[str, tuple[float, float]] = {
    "loop_names": (30, 55),
    "loop_names_per_code_line": (0.66, 0.40),
    "circles": (0, 0),
    "c901_above_12": (0, 0),
    "any": (188, 250),
    # 25,611 before video transformers, folds, `start`, `import`, `doctor`, loggers and the table of old names
    "code_lines": (35_200, 23_000),
}
TRACED_BOUNDS = {"clip_functions": (60, 40), "validation_crossings": (0, 0)}
UPWARD = {"launch/job.py -> main"}  # by file and module


@functools.cache
def figures() -> dict[str, Any]:
    return measure.measure()


@pytest.mark.parametrize("name", BOUNDS)
def test_no_figure_gets_worse(name: str) -> None:
    assert figures()[name] <= BOUNDS[name][0]


@pytest.mark.nightly
@pytest.mark.skipif(sys.version_info < (3, 11), reason="the tracer needs Python 3.11")
@pytest.mark.parametrize("name", TRACED_BOUNDS)
def test_no_traced_figure_gets_worse(name: str) -> None:
    assert traced()[name] <= TRACED_BOUNDS[name][0]


@functools.cache
def traced() -> dict[str, Any]:
    return measure.traced(measure.ROOT)


def test_no_new_upward_import() -> None:
    imports = {f"{line.split(':')[0]} -> {line.split(' -> ')[1]}" for line in figures()["upward_imports_named"]}
    assert imports <= UPWARD


def test_a_name_is_the_longest_chain_and_counts_once() -> None:
    code = "run.bad.note(loader.ledger.take(), run.bad.note)\nlocal = f().attribute\nlog.line(step)"
    assert measure.dotted_names([ast.parse(code)]) == {"run.bad.note", "loader.ledger.take", "log.line"}


def test_bodies_have_room_and_the_code_gives_reasons() -> None:
    assert figures()["comments_per_100_lines"] >= 5.0
    assert figures()["blank_lines_in_bodies_percent"] >= 6.0


def test_blank_lines_comments_and_docstrings_are_no_code() -> None:
    text = '"""Module."""\n\n# alone\ndef f(x):\n    """Say\n    it."""\n    return [\n        x,  # why\n    ]\n'
    assert measure.code_lines(text) == {4, 7, 8, 9}


@pytest.fixture
def toy(tmp_path: Path) -> measure.Tree:
    """Four files of a repository, without git."""
    files = {
        "utils/a.py": "def f():\n    from utils import b\n",
        "utils/b.py": "import utils.a\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import launch.c\n",
        "launch/c.py": "import main\n",
        "main.py": 'VERBS = {"c": "launch.c", "a": "utils.a"}\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tree = measure.Tree.__new__(measure.Tree)
    tree.root, tree.names = tmp_path, sorted(files)
    return tree


def test_circles_hold_imports_of_functions_and_verbs_named_by_strings(toy: measure.Tree) -> None:
    assert measure.circles(toy) == [["launch/c.py", "main.py"], ["utils/a.py", "utils/b.py"]]


def test_upward_imports_hold_verbs_named_by_strings_and_no_types(toy: measure.Tree) -> None:
    assert measure.upward(toy) == ["launch/c.py:1 -> main", "main.py:1 -> launch.c"]
