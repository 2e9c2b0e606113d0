"""The pages speak of projects and papers by their names, not by words that only who wrote them knows."""

from __future__ import annotations

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
