"""A name says what its value is: `matches`, `videos` or `message`, and never only that it was found, made or said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests import git
from tests.conftest import ROOT

WORDS = frozenset({"said", "told", "made", "found", "own", "wanted", "plain"})
# A line that may hold such a name before its comment: parsing only these files halves the time of the test.
LINE = re.compile(rf"^[^#\n]*?(?<![a-z0-9])(?:{'|'.join(sorted(WORDS))})(?![a-z0-9])", re.IGNORECASE | re.MULTILINE)


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of all identifiers, those inside f-strings too; keys of dicts are texts, and stay."""
    for node in ast.walk(tree):
        parts = [getattr(node, field, None) for field in ("id", "arg", "attr", "name", "asname", "rest")]
        parts += getattr(node, "names", []) if isinstance(node, ast.Global | ast.Nonlocal) else []
        yield from ((getattr(node, "lineno", 0), name) for part in parts if part for name in str(part).split("."))


def is_empty(name: str) -> bool:
    """Return True if a name consists only of such words: `found`, `_own`, `PLAIN`, `found_own`."""
    return set(name.lower().strip("_").split("_")) <= WORDS


def test_no_name_is_a_word_that_says_nothing_of_its_value() -> None:
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in git.files() if name.endswith(".py")}
    empty = [
        f"{file}:{line}: {name}"
        for file, text in texts.items()
        if LINE.search(text)
        for line, name in names(ast.parse(text))
        if is_empty(name)
    ]
    assert not empty, "\n".join(empty)


@pytest.mark.parametrize(
    "code",
    [
        "found = 1", "def run(_own): ...", "run(wanted=1)", "self.told", "f'{said:>{plain}}'", "class Found: ...",
        "PLAIN = 1", "from a.b import c as made", "found_own = 1", "[told for told in ()]", "def f():\n global said",
    ],
)  # fmt: skip
def test_every_kind_of_name_counts(code: str) -> None:
    assert LINE.search(code)
    assert any(is_empty(name) for _, name in names(ast.parse(code)))


def test_texts_comments_and_longer_names_do_not_count() -> None:
    code = 'found_at = {"found": 1}  # found\n"""What was found."""\nplain_decode(is_own)'
    assert not any(is_empty(name) for _, name in names(ast.parse(code)))
