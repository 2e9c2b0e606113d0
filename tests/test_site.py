"""The documentation as a site: it builds, no link is broken, and its pages ask no other host for anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("mkdocs", reason="needs mkdocs, of the extra dev")


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / ".mkdocs.yml", out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_of_the_docs_is_on_the_site(site: Path) -> None:
    pages = {page.stem for page in site.glob("*.html")} - {"404"}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= pages
    assert {"contributing", "changelog", "data_layout", "pretrained"} <= pages


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r'<(?:script|img|iframe|source)[^>]*\ssrc="(?:https?:)?//|<link[^>]*rel="stylesheet"[^>]*href="http'
    )
    assert [page.name for page in site.glob("*.html") if loads.search(page.read_text())] == []


def test_links_lead_to_pages_and_not_to_source(site: Path) -> None:
    contributing = (site / "contributing.html").read_text()
    assert 'href="decisions.html"' in contributing
    assert "docs/decisions.md" not in re.findall(r'href="([^"]*)"', contributing)
    assert not any(link.endswith((".py", ".md")) for link in re.findall(r'href="([^"]*)"', contributing))


@pytest.mark.parametrize("link", ["nowhere.md", "../nowhere.py", "start.md#nowhere"])
def test_a_broken_link_is_an_error(tmp_path: Path, link: str) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "pretrained/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / ".mkdocs.yml", tmp_path)
    (tmp_path / "docs" / "doctor.md").write_text(f"# Doctor\n\nSee [there]({link}).\n")
    done = build(tmp_path / ".mkdocs.yml", tmp_path / "out")
    assert done.returncode != 0
    assert "doctor.md" in done.stderr
