"""A real headless Chromium for the tests of pages, driven through Playwright; what a page logs and asks for is kept."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@functools.cache
def why_not() -> str | None:
    """Why there is no browser to test with; None if there is one."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "Playwright is not installed (make lint installs it)"
    if executable() is None:
        return "no Chromium on this machine (apt-get install chromium-headless-shell)"
    return None


def executable() -> str | None:
    """The first browser of `PROGRAMS` that is installed."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


@dataclass
class Visit:
    """One open page.

    Attributes:
        page: Playwright's page.
        errors: errors and warnings of the console, uncaught exceptions, failed requests.
        requests: addresses that were asked for.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def outside(self, folder: Path) -> list[str]:
        """Requests that are not for a file below `folder`."""
        base = f"{folder.resolve().as_uri()}/"
        return [url for url in self.requests if not url.startswith(base)]

    def first_paint(self) -> float:
        """Seconds from the start of the navigation to the first contentful paint."""
        code = "() => performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)"
        self.page.wait_for_function("() => performance.getEntriesByName('first-contentful-paint').length > 0")
        return self.page.evaluate(code)[0] / 1000


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A started browser; one is enough for many visits."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Nothing may be resolved: a page that asks for a host gets an error, which a test sees.
        started = playwright.chromium.launch(
            executable_path=executable(), headless=True, args=["--host-resolver-rules=MAP * ~NOTFOUND"]
        )
        try:
            yield started
        finally:
            started.close()


@contextlib.contextmanager
def visit(
    started: Any, url: str, *, width: int = 1280, height: int = 900, dark: bool = False, touch: bool = False
) -> Iterator[Visit]:
    """Open an address in a fresh context and wait until the report's script is through."""
    context = started.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", has_touch=touch
    )
    try:
        page = context.new_page()
        page.set_default_timeout(10_000)
        visited = Visit(page)
        page.on("console", lambda m: visited.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: visited.errors.append(str(error)))
        page.on("request", lambda request: visited.requests.append(request.url))
        page.on("requestfailed", lambda request: visited.errors.append(f"{request.url}: {request.failure}"))
        page.goto(url, wait_until="load")
        page.wait_for_selector("html[data-ready]", state="attached")
        yield visited
    finally:
        context.close()
