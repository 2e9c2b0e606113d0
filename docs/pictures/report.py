"""Take the pictures of docs/analysis.md: screenshots of a report in a headless Chromium.

python main.py report exps/demo_exps/tsn_resnet18/motion8 exps/demo_exps/tsm_resnet18/motion8
python docs/pictures/report.py exps/demo_exps/tsn_resnet18/motion8/report/index.html

`--maps` takes the picture of the maps instead, from a report made with --cam.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tests import chromium  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Page


# Name of the picture, section of the report, dark, width and height in pixels
PICTURES = (
    ("report_summary", "summary", False, 1120, 860),
    ("report_errors", "errors", False, 1000, 690),
    ("report_classes", "classes", False, 1120, 560),
    ("report_videos", "videos", False, 1120, 690),
    ("report_labels", "labels", False, 1120, 690),
    ("report_matrix", "matrix", True, 1120, 800),
    ("report_comparison", "compare", False, 1120, 760),
    ("report_narrow", "errors", False, 380, 760),
)
MAPS = (("report_maps", "errors", False, 1000, 690),)


def main(index: Path, *, maps: bool = False) -> None:
    """Take the pictures of one report and print their sizes."""
    from PIL import Image  # matplotlib brings it

    address = index.resolve().as_uri()
    with chromium.browser() as browser:
        for name, section, dark, width, height in MAPS if maps else PICTURES:
            with chromium.visit(browser, f"{address}#{section}", width=width, height=height, dark=dark) as visit:
                prepare(visit.page, name)
                # Paths as below the repository, on whichever machine the report was written
                visit.page.evaluate(
                    "root => document.querySelectorAll('td').forEach(cell => cell.textContent.startsWith(root)"
                    " && (cell.textContent = cell.textContent.slice(root.length)))",
                    f"{str(index.resolve()).split('/exps/')[0]}/",
                )
                # Leave the page time to load its images
                visit.page.wait_for_timeout(500)
                picture = Image.open(io.BytesIO(visit.page.screenshot())).convert("RGB")
                picture.save(HERE / f"{name}.png", optimize=True)
                print(f"{name}.png, {(HERE / f'{name}.png').stat().st_size // 1000} kB")


def prepare(page: Page, name: str) -> None:
    """Bring the page into the state that docs/analysis.md describes."""
    # Choose a cell with the keyboard, and open it
    if name == "report_matrix":
        page.locator("canvas.matrix").focus()
        page.keyboard.press("n")
        page.keyboard.press("Enter")
        page.locator(".side img").first.scroll_into_view_if_needed()

    # Show the maps of the first cards
    if name == "report_maps":
        for card in page.locator(".card .maps").all()[:8]:
            card.locator("button").nth(1).click()
        page.evaluate("scrollTo(0, 170)")
        page.wait_for_timeout(500)

    # A video stopped in the middle, without the focus ring of its button
    if name == "report_narrow":
        page.locator(".card button.play").first.click()
        page.wait_for_function("() => document.querySelector('video').currentTime > 0.4")
        page.evaluate("() => { document.querySelector('video').pause(); document.activeElement.blur(); }")
        page.evaluate("() => scrollTo(0, 0)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), maps="--maps" in sys.argv)
