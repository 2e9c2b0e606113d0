"""Programs in the pages of the documentation: the code blocks below a comment `<!-- test: NAME -->`, joined."""

from __future__ import annotations

import re
import textwrap

from tests.conftest import ROOT

_MARK = re.compile(r"^ *<!-- test: (\S+) -->$", re.MULTILINE)
_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def program(page: str, name: str, *, all_blocks: bool = False) -> str:
    """The code below the comment that names a program.

    Args:
        page: path in the repository.
        name: of the program.
        all_blocks: all code to the end of the page, not the first block alone.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    (mark,) = (mark for mark in _MARK.finditer(text) if mark[1] == name)
    blocks = [textwrap.dedent(block[2]) for block in _BLOCK.finditer(text, mark.end())]
    assert blocks, f"{page}: no code below {mark[0]}"
    return "\n".join(blocks if all_blocks else blocks[:1])
