"""The report in a real browser, opened from disk: every page, every control, no error, nothing from outside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from anal_tools.evaluate.protocols import Protocol
from anal_tools.evaluate.results import Results
from anal_tools.report import build
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec
from tests.chromium import Visit, visit
from tests.evaluated import motion_results, write_results
from tests.experiment import make as make_experiment


@pytest.fixture(scope="module")
def exps(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> list[Path]:
    """Two experiments on 23 real videos: the first calls nearly all `left`, the second has most right."""
    root = tmp_path_factory.mktemp("page")
    labels = [int(line.split()[-1]) for line in (motion_videos / "lists/val.txt").read_text().splitlines()]
    first: list[int | None] = [0 if row % 3 else label for row, label in enumerate(labels)]
    first[labels.index(7)] = None
    second: list[int | None] = [label if row % 5 else (label + 1) % 8 for row, label in enumerate(labels)]
    for name, guesses, rate in (("a", first, 0.02), ("b", second, 0.01)):
        exp = make_experiment(root / "tests" / name, motion_videos)
        motion_results(exp, motion_videos, guesses, config={"lr": rate}, cost={"gmacs_per_view": 1.5})
        (exp / "events").mkdir()
        lines = [f'{{"step": {k}, "loss_train": {2 / k}, "top1_train": {5 * k}, "lr": {rate}}}\n' for k in range(1, 9)]
        lines.append('{"step": 8, "loss_val": 0.5, "top1_val": 60.0}\n')
        (exp / "events/scalars.jsonl").write_text("".join(lines))
    return [root / "tests/a", root / "tests/b"]


@pytest.fixture(scope="module")
def index(exps: list[Path]) -> Path:
    return build.build([str(exp) for exp in exps], pictures=23, clips=12)


@pytest.fixture
def shown(started_browser: Any, index: Path) -> Iterator[Visit]:
    """The page, fresh; the test fails if the browser complained or anything left the folder."""
    with visit(started_browser, index.as_uri()) as visited:
        yield visited
        assert visited.errors == []
        assert visited.outside(index.parent) == []


def go(visited: Visit, name: str) -> None:
    visited.page.click(f'nav a[href="#{name}"]')
    visited.page.wait_for_selector(f'html[data-section="{name}"]', state="attached")


def page_text(visited: Visit) -> str:
    return visited.page.locator("#page").inner_text()


def texts(visited: Visit, selector: str) -> list[str]:
    return visited.page.locator(selector).all_inner_texts()


def test_first_paint_and_every_page(shown: Visit) -> None:
    assert shown.first_paint() < 2.0
    assert shown.page.title() == "tests/a and tests/b"
    for name in ("matrix", "errors", "classes", "videos", "labels", "compare", "summary"):
        go(shown, name)
        assert shown.page.locator("nav a[aria-current]").get_attribute("href") == f"#{name}"
        assert shown.page.locator("#page section").count() >= 1
        assert shown.page.locator("#page h2").first.is_visible()


def test_summary(shown: Visit, exps: list[Path]) -> None:
    results = Results.load(exps[0])
    right = int((results.scores[~results.failed].argmax(axis=1) == results.labels[~results.failed]).sum())
    assert f"{100 * right / 23:.2f} %" in texts(shown, ".headline b")
    overview = texts(shown, "table.overview tr")
    for title in ("top-1", "top-5", "mean class accuracy", "calibration error"):
        (line,) = (line for line in overview if line.startswith(title + "\t"))
        assert all(re.search(r"% +\([\d.]+ to [\d.]+\)", cell) for cell in line.split("\t")[1:]), line
    assert "95 % interval" in texts(shown, ".headline span")[0]
    assert "eval EXP --views 2x3" in page_text(shown)  # what the sampling of these experiments allows
    assert any("short side 64" in line for line in overview if line.startswith("protocol"))
    titles = texts(shown, "figcaption")
    assert titles == ["Loss", "Top-1", "Learning rate"]
    assert shown.page.locator("svg.chart path.line").count() >= 6
    assert shown.page.locator("svg.chart circle").count() == 4
    assert "1.50" in "".join(texts(shown, "#page table td"))
    shown.page.locator("ul.plain a").first.click()
    shown.page.wait_for_selector('html[data-section="videos"]', state="attached")
    assert shown.page.locator(".card.is-right").count() == 0
    shown.page.go_back()
    shown.page.wait_for_selector('html[data-section="summary"]', state="attached")


def test_accuracy_against_cost(started_browser: Any, tmp_path: Path) -> None:
    spec = EvalSpec(Sampling("mmaction2_1x", 1, 8, 8), 10, "three", 256, 256)
    logits = np.random.default_rng(0).normal(size=(60, 30, 4))
    exp = write_results(
        tmp_path, labels=[row % 4 for row in range(60)], logits=logits, names=list("abcd"),
        protocol=Protocol(spec).to_dict(), cost={"gmacs_per_view": 2.0},
    )  # fmt: skip
    index = build.build([str(exp)])
    with visit(started_browser, index.as_uri()) as visited:
        assert texts(visited, "figcaption") == ["Top-1 with all kept views and with fewer"]
        assert visited.page.locator("svg.chart circle").count() == 10
        assert visited.page.locator("svg.chart .axis").all_text_contents() == ["GMACs per video", "top-1, per cent"]
        assert texts(visited, "#page table:not(.overview) tbody tr")[-1].split("\t")[1:3] == ["10 x 3", "60.00"]
        assert visited.page.locator("nav a").count() == 6  # nothing to compare
        assert visited.errors == []


def cell_at(visited: Visit, row: int, column: int, size: int = 8) -> tuple[float, float]:
    """Where the middle of a cell of the whole matrix is on the screen."""
    box = visited.page.locator("canvas.matrix").bounding_box()
    gutter = min(132, 0.3 * box["width"])
    side = (box["width"] - gutter - 1) / size
    return box["x"] + gutter + (column + 0.5) * side, box["y"] + gutter + (row + 0.5) * side


def pixel(visited: Visit, x: float, y: float) -> list[int]:
    """Red, green, blue on the screen; the browser warns of a page that reads its canvas often."""
    picture = visited.page.screenshot(clip={"x": round(x), "y": round(y), "width": 1, "height": 1})
    pixels = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    return pixels[0, 0, ::-1].astype(int).tolist()


def test_matrix_with_the_mouse(shown: Visit, exps: list[Path]) -> None:
    go(shown, "matrix")
    page, info = shown.page, shown.page.locator(".info")
    results = Results.load(exps[0])
    count = int(((results.labels == 2) & (results.scores.argmax(axis=1) == 0)).sum())
    x, y = cell_at(shown, 2, 0)
    page.mouse.move(x, y)
    assert re.match(rf"up mistaken for left: {count} \(", info.inner_text())
    red, green, blue = pixel(shown, x - 8, y - 8)
    assert red > blue + 20, (red, green, blue)  # an error is warm, a diagonal cell cool
    red, green, blue = pixel(shown, *(value - 8 for value in cell_at(shown, 0, 0)))
    assert blue > red + 20
    page.mouse.click(x, y)
    assert texts(shown, ".side h3") == ["up mistaken for left"]
    assert page.locator(".side .card").count() == count
    assert page.locator("#announce").inner_text().startswith(f"{count} video")
    scrolled = page.evaluate("scrollY")
    page.mouse.wheel(0, -300)  # it has the focus now: the wheel zooms and the page stays
    page.wait_for_timeout(50)
    assert page.evaluate("scrollY") == scrolled
    page.mouse.move(x + 1, y)
    assert info.inner_text().startswith("up mistaken for left")
    before = info.inner_text()
    page.mouse.down()
    page.mouse.move(x + 200, y + 150, steps=4)
    page.mouse.up()
    page.mouse.move(x, y)
    assert texts(shown, ".side h3") == ["up mistaken for left"]  # a drag is no click
    page.get_by_label("show the whole matrix").click()
    page.mouse.move(*cell_at(shown, 2, 0))
    assert info.inner_text() == before
    page.get_by_label("zoom in").click()
    page.get_by_label("zoom out").click()
    page.mouse.dblclick(*cell_at(shown, 5, 0))


def test_matrix_without_the_focus_lets_the_page_scroll(shown: Visit) -> None:
    go(shown, "matrix")
    shown.page.set_viewport_size({"width": 1000, "height": 500})
    shown.page.mouse.move(*cell_at(shown, 0, 0))
    shown.page.mouse.wheel(0, 200)
    shown.page.wait_for_function("() => scrollY > 100")


def test_matrix_with_the_keyboard(shown: Visit, exps: list[Path]) -> None:
    go(shown, "matrix")
    page, info = shown.page, shown.page.locator(".info")
    page.locator("canvas.matrix").focus()
    page.keyboard.press("ArrowDown")
    assert info.inner_text().startswith("left recognised")
    page.keyboard.press("ArrowDown")
    assert info.inner_text().startswith("right mistaken for left")
    page.keyboard.press("ArrowRight")
    assert info.inner_text().startswith("right recognised")
    for key in ("ArrowUp", "ArrowUp", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    assert info.inner_text().startswith("left recognised")
    page.keyboard.press("n")
    results = Results.load(exps[0])
    matrix = [
        [int(((results.labels == a) & (results.scores.argmax(axis=1) == b) & ~results.failed).sum()) for b in range(8)]
        for a in range(8)
    ]
    largest = max(matrix[a][b] for a in range(8) for b in range(8) if a != b)
    assert f": {largest} (" in info.inner_text()
    page.keyboard.press("Enter")
    assert page.locator(".side .card").count() == min(6, largest)
    for key in ("+", "+", "-", "0", "N"):
        page.keyboard.press(key)
    assert page.locator("#announce").inner_text() == info.inner_text()


def test_matrix_orders_and_colours(shown: Visit) -> None:
    go(shown, "matrix")
    page, info = shown.page, shown.page.locator(".info")
    for order, first in (("name", "clockwise"), ("list", "left"), ("hardest", None), ("videos", None), ("alike", None)):
        page.get_by_label("Order").select_option(order)
        page.mouse.move(5, 5)
        page.mouse.move(*cell_at(shown, 0, 0))
        assert "recognised" in info.inner_text()
        assert first is None or info.inner_text().startswith(first)
    page.get_by_label("Order").select_option("list")
    place = [value - 8 for value in cell_at(shown, 0, 0)]
    by_share = pixel(shown, *place)
    page.get_by_label("Colour").select_option("count")
    page.get_by_label("go to the next most frequent error").click()
    assert pixel(shown, *place) != by_share or info.inner_text()


def test_errors_with_frames_and_clips(shown: Visit, index: Path) -> None:
    go(shown, "errors")
    page = shown.page
    first = page.locator(".card").first
    sheet = first.locator("img.sheet")
    sheet.scroll_into_view_if_needed()
    page.wait_for_function(
        "(image) => image.complete && image.naturalWidth === 4 * 128 + 12", arg=sheet.element_handle()
    )
    assert sheet.get_attribute("alt") == "What the model saw: frames 1, 3, 5, 7, 9, 11, 13, 15"
    assert not any(url.endswith(".webm") for url in shown.requests)  # clips wait until they are asked for
    first.locator("button.play").click()
    video = first.locator("video").element_handle()
    page.wait_for_function("(video) => video.currentTime > 0.2 && !video.error", arg=video)
    assert page.evaluate("(video) => [video.videoWidth, video.videoHeight]", video) == [64, 64]
    box = sheet.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.8)  # the sixth: frame 11
    page.wait_for_function("(video) => video.paused && Math.abs(video.currentTime - 5.5 / 8) < 0.02", arg=video)
    second = page.locator(".card").nth(1)
    second.locator("img.sheet").click(position={"x": 5, "y": 5})  # without having played before
    page.wait_for_function(
        "(video) => video.readyState > 1 && Math.abs(video.currentTime - 0.5 / 8) < 0.02",
        arg=second.locator("video").element_handle(),
    )
    pair = page.locator("details.pair").first
    pair.locator("summary").click()
    page.wait_for_function("(details) => details.querySelectorAll('.card').length > 0", arg=pair.element_handle())
    counts = [int(text.split(" of ")[0]) for text in texts(shown, "details.pair summary .number")]
    assert counts == sorted(counts, reverse=True)
    confidence = [
        float(text.split()[0]) for text in texts(shown, "section:first-child .card ol li:first-child .number")
    ]
    assert confidence == sorted(confidence, reverse=True)


def test_pictures_below_the_screen_are_not_loaded(started_browser: Any, index: Path) -> None:
    with visit(started_browser, index.as_uri() + "#errors", width=360, height=300) as visited:
        visited.page.wait_for_timeout(300)
        loaded = sum(url.endswith(".jpg") for url in visited.requests)
        assert 0 < loaded < visited.page.locator("img.sheet").count()


def test_classes(shown: Visit) -> None:
    go(shown, "classes")
    page = shown.page
    rows = page.locator("#page tbody tr")
    assert rows.count() == 8
    assert page.locator("#page tbody tr").first.locator(".bar").count() == 2  # one for each experiment
    page.get_by_role("button", name="class", exact=True).click()
    assert texts(shown, "#page tbody td:first-child")[0] == "clockwise"
    page.get_by_role("button", name="class", exact=True).click()
    assert texts(shown, "#page tbody td:first-child")[0] == "up"
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="videos", exact=True).click()
    counts = [int(text) for text in texts(shown, "#page tbody td:nth-child(7)")]
    assert counts == sorted(counts, reverse=True)
    page.get_by_label("Find").fill("WISE")
    assert rows.count() == 2
    rows.first.locator("a").first.click()
    page.wait_for_selector('html[data-section="videos"]', state="attached")
    assert "truth=" in page.evaluate("location.hash")


def test_videos(shown: Visit, exps: list[Path]) -> None:
    go(shown, "videos")
    page = shown.page
    assert texts(shown, "main .note")[0] == "23 videos, most confident first"
    page.get_by_label("Outcome").select_option("unread")
    assert texts(shown, "main .note")[0].startswith("1 video,")
    assert "could not be read: counts as wrong" in page.locator(".card").inner_text()
    page.get_by_label("Outcome").select_option("all")
    page.get_by_label("True class").select_option("2")
    page.get_by_label("Predicted").select_option("0")
    results = Results.load(exps[0])
    expected = [
        name
        for name, label, row in zip(results.ids, results.labels, results.scores, strict=True)
        if label == 2 and row.argmax() == 0
    ]
    assert sorted(texts(shown, ".card .path")) == sorted(expected)
    assert "truth=2" in page.evaluate("location.hash")
    page.reload()  # the address has the question
    page.wait_for_selector("html[data-ready]", state="attached")
    assert sorted(texts(shown, ".card .path")) == sorted(expected)
    page.get_by_label("True class").select_option("")
    page.get_by_label("Predicted").select_option("")
    page.get_by_label("Find").fill(results.ids[5])
    page.get_by_label("Find").press("Enter")
    assert texts(shown, ".card .path") == [results.ids[5]]
    page.get_by_label("Find").fill("no such video")
    page.get_by_label("Find").press("Enter")
    assert page.locator(".card").count() == 0


def test_label_errors(shown: Visit) -> None:
    go(shown, "labels")
    assert "Northcutt" in texts(shown, "main .note")[0]
    assert shown.page.locator("#page section").count() >= 1


def test_comparison_and_the_other_experiment(shown: Visit, exps: list[Path]) -> None:
    go(shown, "compare")
    page = shown.page
    cells = texts(shown, "section:first-child tbody td")
    assert cells[:3] == ["tests/a", "tests/b", "23"]
    only_b = int(cells[4])
    assert "lr" in "".join(texts(shown, "section:last-child td:first-child"))
    page.locator("section:first-child tbody td a").nth(1).click()
    page.wait_for_selector('html[data-section="videos"]', state="attached")
    assert page.locator(".card").count() == only_b
    page.get_by_label("Predictions of").select_option("1")
    assert page.locator(".card.is-right").count() == only_b  # the second experiment has them right
    go(shown, "classes")
    recall = [float(text.rstrip(" %")) for text in texts(shown, "#page tbody td:nth-child(3)") if text != "–"]
    assert sum(recall) / len(recall) > 60


def test_with_the_keyboard_alone(shown: Visit) -> None:
    page = shown.page
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.hash") == "#matrix"
    page.keyboard.press("Enter")
    page.wait_for_selector('html[data-section="matrix"]', state="attached")
    go(shown, "errors")
    page.locator("details.pair summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details.pair").first.get_attribute("open") is not None
    page.locator("button.play").first.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_light_dark_and_narrow(started_browser: Any, index: Path, width: int, dark: bool) -> None:
    with visit(started_browser, index.as_uri(), width=width, dark=dark) as visited:
        colour = visited.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", colour))) < 300) == dark
        for name in ("summary", "matrix", "errors", "classes", "videos", "labels", "compare"):
            go(visited, name)
            assert visited.page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert visited.errors == []
