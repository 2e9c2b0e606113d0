"""Hooks of mkdocs: add the pages of the repository that are not in docs/, and translate the links between pages.

On the site, a link to a page leads to that page. A link to source code becomes its name, since the site has no source.
A link to a file that does not exist stays as it is, so that `mkdocs build --strict` fails on it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: file of the repository -> its page on the site
ELSEWHERE = {
    "README.md": "index.md",
    "data/README.md": "data_layout.md",
    "pretrained/README.md": "pretrained.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    for source, page in ELSEWHERE.items():
        # docs/index.md is a page of its own, to which links to the README lead
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translate the links of a page into links to pages of the site."""
    sources = {name: source for source, name in ELSEWHERE.items() if name != "index.md"}
    folder = (ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def moved(link: re.Match[str]) -> str:
        """Return a link as the site needs it."""
        text, target, anchor = link[1], link[2], link[3] or ""
        if ":" in target:  # a web address
            return link[0]
        # From the folder of this page to a path in the repository
        path = os.path.relpath(folder / target, ROOT)
        if path in ELSEWHERE:
            return f"[{text}]({ELSEWHERE[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        return text if (ROOT / path).exists() else link[0]

    return _LINK.sub(moved, markdown)
