"""What all tests share: the tiers (tests/tiers.py), the real data, a small data set, a browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import chromium, forked, tiers

ROOT = Path(__file__).resolve().parents[1]
GUARD = pytest.StashKey[tiers.Guard]()
KEPT = "session"  # folder of the temporary files that several modules use


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--tier`."""
    parser.addoption("--tier", choices=tiers.TIERS, default="test", help="which tests to run (tests/tiers.py)")


def pytest_configure(config: pytest.Config) -> None:
    """Listen for processes; properties get more examples at night."""
    config.stash[GUARD] = tiers.Guard(str(config.getoption("--tier")))
    config.stash[GUARD].install()
    if config.getoption("--tier") == "nightly":
        import hypothesis

        hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None)
        hypothesis.settings.load_profile("nightly")


def pytest_unconfigure() -> None:
    """End the process that others were forked from."""
    forked.stop()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the tests of the tier."""
    tiers.choose(config, items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Watch each test."""
    guard = item.config.stash[GUARD]
    guard.begin(item)
    try:
        return (yield)
    finally:
        guard.end()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Judge each test when it has ended."""
    report = yield
    item.config.stash[GUARD].judge(item, report)
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List what is no quick test any more."""
    reports = [report for entries in terminalreporter.stats.values() for report in entries]
    for seconds, name in tiers.slow_ones(reports):
        terminalreporter.write_line(f"more than {tiers.CPU_SECONDS:g} s of CPU time: {seconds:.1f} s {name}")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds main.py."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real videos, lists and golden tables beside the checkout; tests that need them skip where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real media, weights and lists without a licence (../shared/data) are not on this machine")
    return folder


def _kept(factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a new folder that lasts until the session ends."""
    folder = factory.getbasetemp() / KEPT / name
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="session")
def tiny_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest data set that the verb makes, for single steps: 8 training and 8 validation videos, 64x64."""
    from datasets.demo import verb as demo

    folder = _kept(tmp_path_factory, "tiny")
    assert demo.main(["--out", str(folder), "--train", "8", "--val", "8", "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="session")
def motion_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of the demo's kind, made by its own verb: 48 training and 23 validation videos, 64x64."""
    from datasets.demo import verb as demo

    folder = _kept(tmp_path_factory, "motion")
    assert demo.main(["--out", str(folder), "--train", "48", "--val", "24", "--workers", "1"]) == 0
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
def freed_disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Delete the temporary files of a module that passed: kept until the session ends, they would fill a small disk.

    pytest deletes `tmp_path` itself after a test that passed; folders of fixtures with a wider scope it keeps.
    """
    base = tmp_path_factory.getbasetemp()
    before = {*base.iterdir(), base / KEPT}
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        for path in set(base.iterdir()) - before:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@pytest.fixture(autouse=True, scope="module")
def ordinary_priority() -> Iterator[None]:
    """Fail the module that gave this process real-time priority, as libsvtav1 does: it starves all other processes."""
    yield
    if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        pytest.fail("a test of this module left real-time priority behind")
