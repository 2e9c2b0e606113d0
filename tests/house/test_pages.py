"""The pages speak of projects and papers by their names, not by words that only who wrote them knows."""

from __future__ import annotations

import ast
import re

from tests import git
from tests.conftest import ROOT

# Names of documents that no reader has.
INTERNAL = re.compile(r"\bseed (document )?00\d\b|\bhouse plan\b|\bissue \d\d\b", re.IGNORECASE)


def test_no_page_names_a_document_that_readers_do_not_have() -> None:
    pages = [name for name in git.files() if name.endswith(".md") and not name.startswith("tests/")]
    places = {
        f"{name}:{number}: {line[:80]}"
        for name in pages
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if INTERNAL.search(line)
    }
    assert not places


def events_of(code: str) -> set[str]:
    """Return `component: name` of each event of log.txt that code writes."""
    titles = set()
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func).split(".")[-1]
        words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        if function in ("event", "format_event") and len(words) >= 2:
            titles.add(f"{words[0]}: {words[1]}")
        elif words and "remark" in (function, ast.unparse(node.args[0]).split(".")[-1]):  # also functools.partial
            titles.add(f"{words[0]}: remark")
    return titles


def test_the_page_on_the_log_lists_the_events_that_the_code_writes() -> None:
    names = [name for name in git.files("utils", "datasets", "launch", "main.py") if name.endswith(".py")]
    written = set().union(*(events_of((ROOT / name).read_text(encoding="utf-8")) for name in names))
    table = (ROOT / "docs/training.md").read_text(encoding="utf-8").partition("## The lines of log.txt")[2]
    listed = set(re.findall(r"`([a-z0-9_]+: [a-z_]+)`", table.partition("\n## ")[0]))
    assert {"run: start", "run: finished", "data: bad_sample"} <= written
    assert written == listed
