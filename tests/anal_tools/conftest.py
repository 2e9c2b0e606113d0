"""A browser for the tests of pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests import chromium


@pytest.fixture(scope="session")
def started_browser() -> Iterator[Any]:
    """A headless Chromium; tests that need it skip where there is none."""
    if reason := chromium.why_not():
        pytest.skip(reason)
    with chromium.browser() as started:
        yield started
