"""Names that want to be more than names: no script of theirs runs, no path leaves the folder."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest

from anal_tools import analyze
from anal_tools.evaluate.results import Results
from anal_tools.report import build
from tests.chromium import visit
from tests.evaluated import guessed, motion_results, write_results
from tests.experiment import make as make_experiment

SCRIPT = "window.pwned=1"
NAMES = [
    f"<img src=x onerror={SCRIPT}>",
    f"</script><script>{SCRIPT}</script>",
    f"<!--<script>{SCRIPT}",
    f"\"><svg onload={SCRIPT}>",
    "../../../../etc/passwd",
    "two\nlines\r\u2028\x00\x1b[31m",
    "bytes \udcff\udc80 not UTF-8",
    f"javascript:{SCRIPT}",
    "\u202egnp.exe",
    "x" * 255,
    "\u65e5\u672c\u8a9e \U0001f3ac",
    "${title} $style %s {0}",
]  # fmt: skip


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every name as a class, as a video, in the folder's name and in the summary."""
    root = tmp_path_factory.mktemp("hostile")
    exp = root / f"<img src=x onerror={SCRIPT}>" / "b\nc \udcff"
    count = len(NAMES)
    write_results(
        exp, labels=list(range(count)) * 2, logits=guessed([0] * count + list(range(count)), count), names=NAMES,
        ids=[f"videos/{name}.mp4" for name in NAMES] + [f"{name}/{k}" for k, name in enumerate(NAMES)],
        list=NAMES[0], weights=NAMES[1], config={NAMES[0]: NAMES[1], NAMES[2]: {NAMES[3]: 1}},
    )  # fmt: skip
    write_results(
        root / "second", labels=list(range(count)), logits=guessed([1] * count, count), names=NAMES,
        ids=[f"videos/{name}.mp4" for name in NAMES], config={NAMES[0]: "other"}, name=f"r{NAMES[0]}",
    )  # fmt: skip
    (exp / "config.yaml").write_text("common: {}\n")
    (exp / "events").mkdir()
    (exp / "events/scalars.jsonl").write_text('{"step": 1, "<img src=x onerror=window.pwned=1>": 1, "loss_train": 1}\n')
    assert "onerror" in analyze.run(exp)
    return build.build([str(exp), str(root / "second")])


def test_no_name_becomes_more_than_text(started_browser: Any, index: Path) -> None:
    with visit(started_browser, index.as_uri()) as visited:
        dialogs: list[str] = []
        visited.page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        for name in ("summary", "matrix", "errors", "classes", "videos", "labels", "compare"):
            visited.page.evaluate("(hash) => { location.hash = hash; }", name)
            visited.page.wait_for_selector(f'html[data-section="{name}"]', state="attached")
            for details in visited.page.locator("details").all():
                details.locator("summary").click()
            if name == "matrix":
                visited.page.locator("canvas.matrix").focus()
                for key in ("n", "Enter", "ArrowDown", "Enter"):
                    visited.page.keyboard.press(key)
        visited.page.evaluate(
            "(hash) => { location.hash = hash; }",
            f"videos?text=<img src=x onerror={SCRIPT}>&truth=<b>&rival=9-x&outcome=",
        )
        visited.page.wait_for_selector('html[data-section="videos"]', state="attached")
        assert visited.page.evaluate("window.pwned") is None
        assert (
            visited.page.evaluate("document.querySelectorAll('main img, main script, svg[onload], [onerror]').length")
            == 0
        )
        assert dialogs == []
        assert visited.errors == []
        assert visited.outside(index.parent) == []
        visited.page.evaluate("() => { location.hash = '#classes'; }")
        visited.page.wait_for_selector('html[data-section="classes"]', state="attached")
        seen = "\n".join(visited.page.locator("tbody td:first-child").all_inner_texts())
        assert NAMES[0] in seen
        assert "two\\nlines\\r\\u2028\\x00\\x1b[31m" in seen
        assert "bytes \\udcff\\udc80 not UTF-8" in seen
        assert NAMES[10] in seen


def test_the_policy_stops_a_script_that_got_in_all_the_same(started_browser: Any, index: Path) -> None:
    injected = index.with_name("injected.html")
    text = index.read_text()
    injected.write_text(
        text.replace(
            "<footer>",
            f"<footer><script>{SCRIPT}</script><img src=x onerror={SCRIPT}><a href='javascript:{SCRIPT}'>x</a>",
        )
    )
    (index.parent / "foreign.js").write_text(SCRIPT)
    with visit(started_browser, injected.as_uri()) as visited:
        page = visited.page
        page.locator("footer a").click()
        page.evaluate("() => { const s = new Image(); s.src = 'https://example.org/x.png'; document.body.append(s); }")
        with pytest.raises(Exception, match="TrustedHTML"):
            page.evaluate("() => { document.body.innerHTML = '<b>'; }")
        page.wait_for_timeout(100)
        assert page.evaluate("window.pwned") is None
        assert sum("Content Security Policy" in text for text in visited.errors) >= 3
        assert "https://example.org/x.png: csp" in visited.errors  # refused before anything was sent
    injected.unlink()
    (index.parent / "foreign.js").unlink()


def test_names_of_the_page_are_ours(index: Path) -> None:
    text = index.read_text()
    assert "\udcff" not in text
    for attribute in re.findall(r'\b(?:src|href)="([^"]*)"', re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)):
        assert attribute.startswith("#")
    assert sorted(path.name for path in index.parent.iterdir()) == ["index.html", "label_suspects.csv"]
    table = (index.parent / "label_suspects.csv").read_text("utf-8", errors="surrogateescape")
    rows = list(csv.DictReader(io.StringIO(table)))
    assert rows
    assert {row["path"] for row in rows} <= set(Results.load(index.parent.parent).ids)


def test_hostile_files_get_pictures_under_our_names(tmp_path: Path, motion_videos: Path, started_browser: Any) -> None:
    lines = (motion_videos / "lists/val.txt").read_text().splitlines()
    data = tmp_path / "data"
    (data / "lists").mkdir(parents=True)
    names = [f"<img src=x onerror={SCRIPT}>.mp4", "a\tb \udcff.mp4", "x" * 251 + ".mp4", "..hidden <b>.mp4"]
    rows = []
    for line, name in zip(lines, names, strict=False):
        os.link(motion_videos / line.split()[0], data / name)
        rows.append(f"{name} 16 {line.split()[-1]}\n")
    (data / "lists/val.txt").write_text("".join(rows), "utf-8", errors="surrogateescape")
    (data / "lists/classInd.txt").write_text((motion_videos / "lists/classInd.txt").read_text())
    exp = make_experiment(tmp_path / "exp", motion_videos)
    motion_results(exp, data, [0, 0, 0, 0])
    index = build.build([str(exp)])
    media = sorted(path.name for path in (index.parent / "media").iterdir())
    assert len(media) == 8
    assert all(re.fullmatch(r"[0-9a-f]{20}\.(jpg|webm)", name) for name in media)
    with visit(started_browser, index.as_uri() + "#videos") as visited:
        assert visited.page.locator("img.sheet").count() == 4
        visited.page.locator("button.play").first.click()
        visited.page.wait_for_function("() => document.querySelector('video').currentTime > 0.1")
        assert visited.page.evaluate("window.pwned") is None
        assert visited.errors == []
        assert visited.outside(index.parent) == []
