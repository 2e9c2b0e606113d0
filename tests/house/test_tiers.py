"""The tiers of tests/tiers.py: what counts as a process, which code is seen to start one, and what is too slow."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests import ranks, tiers


@pytest.fixture
def guard() -> Iterator[tiers.Guard]:
    """A guard of its own beside that of the run, which watches a quick test."""
    new_guard = tiers.Guard("check")
    new_guard.install()
    new_guard.test = "tests/test_a.py::test_b"
    yield new_guard
    new_guard.end()


def spawned() -> None:
    multiprocessing.get_context("spawn").Process(target=print).start()


@pytest.mark.parametrize("start", [lambda: subprocess.run(["true"], check=True), os.fork, spawned])
def test_a_quick_test_cannot_start_a_process(guard: tiers.Guard, start: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="test_b starts a process"):
        start()
    assert len(guard.started) == 1
    assert judged(guard).outcome == "failed", "also when the code under test keeps the error to itself"


def test_git_is_no_process_and_others_may_start_some(guard: tiers.Guard) -> None:
    subprocess.run(["git", "--version"], check=True, capture_output=True)
    assert guard.started == []
    guard.end()
    subprocess.run(["true"], check=True)


def judged(guard: tiers.Guard) -> pytest.TestReport:
    """The last report of the quick test, when the guard has seen it."""
    report = pytest.TestReport("tests/test_a.py::test_b", ("", 0, ""), {}, "passed", None, "teardown")
    item: Any = SimpleNamespace(nodeid="tests/test_a.py::test_b")
    guard.judge(item, report)
    return report


@pytest.mark.parametrize(("tier", "outcome"), [("check", "passed"), ("test", "passed"), ("nightly", "failed")])
def test_a_slow_test_is_listed_and_fails_at_night(tier: str, outcome: str) -> None:
    guard = tiers.Guard(tier)
    guard.test, guard.cpu_before = "tests/test_a.py::test_b", time.process_time() - 4.0
    report = judged(guard)
    assert report.outcome == outcome
    ((seconds, name),) = tiers.slow_ones([report])
    assert 4.0 <= seconds < 5.0
    assert name == "tests/test_a.py::test_b"


class Helper:
    def start(self) -> None:
        ranks.run_ranks(__file__, "spawned", 1)


def by_a_class() -> None:
    Helper().start()


def imported_inside() -> None:
    from tests.ranks import Ranks

    Ranks(__file__, "spawned", 1)


def harmless() -> str:
    return "subprocess"


@pytest.mark.parametrize(
    ("function", "starts"), [(spawned, True), (by_a_class, True), (imported_inside, True), (harmless, False)]
)
def test_code_that_reaches_a_process_is_seen(function: Callable[[], object], starts: bool) -> None:
    assert tiers.starts_processes(function) is starts
