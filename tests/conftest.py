"""What all tests share: where the real data is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import chromium

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds main.py."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real videos, lists and golden tables beside the checkout; tests that need them skip where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared test data (../shared/data) is not on this machine")
    return folder


@pytest.fixture(scope="session")
def motion_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of the demo's kind, made by its own verb: 48 training and 23 validation videos, 64x64."""
    from datasets.demo import verb as demo

    folder = tmp_path_factory.mktemp("motion")
    assert demo.main(["--out", str(folder), "--train", "48", "--val", "24", "--workers", "2"]) == 0
    val = folder / "lists" / "val.txt"
    val.write_text("".join(val.read_text().splitlines(keepends=True)[:23]))
    return folder


@pytest.fixture(scope="session")
def started_browser() -> Iterator[Any]:
    """A headless Chromium; tests that need it skip where there is none."""
    if reason := chromium.why_not():
        pytest.skip(reason)
    with chromium.browser() as started:
        yield started


@pytest.fixture(autouse=True, scope="module")
def ordinary_priority() -> Iterator[None]:
    """Fail the module that gave this process real-time priority, as libsvtav1 does: it starves all other processes."""
    yield
    if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        pytest.fail("a test of this module left real-time priority behind")
