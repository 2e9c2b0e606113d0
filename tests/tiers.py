"""Which tests `make check`, `make test` and `make nightly` run, and what a quick test may not do.

- `system` starts processes: ranks, reader processes, a browser, a server, a verb in a process of its own. This file
  sets it: by the folder, by a fixture, or because code of the tests reaches `subprocess`.
- `slow` takes more than 3 s of CPU time. The test sets it, or a fixture: whole runs use `motion_videos`.
- `nightly` repeats what a case of `make test` shows for one more method, plan, recipe or scheduler, or on a real
  SLURM. The test sets it.

`--tier check` runs the tests without any of these marks, `--tier test` (the default) all but `nightly`, and
`--tier nightly` all. A test without a mark that starts a process fails, in each tier. One that takes more than 3 s of
CPU time is listed by `make check` and fails in `make nightly`. git, which answers in milliseconds, is no such
process (tests/git.py).
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import multiprocessing.util
import os
import sys
import time
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_TESTS = str(ROOT / "tests") + os.sep
_GIT = f"{_TESTS}git.py"
TIERS = ("check", "test", "nightly")
MARKS = ("system", "slow", "nightly")
CPU_SECONDS = 3.0
CPU_PROPERTY = "cpu_seconds"
# Of git calls that take milliseconds, and of matplotlib the first time that it lists the fonts of a machine.
HARMLESS = ("git", "fc-list")
_EVENTS = {
    "subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "pty.spawn",
    "zoetrope.spawn",
}  # fmt: skip

# Folders and files whose tests start processes through product code, so that the rule below does not see it.
SYSTEM_FILES = (
    "tests/fake_cuda/*",
    "tests/faults/*",
    "tests/gpu/*",
    "tests/slurm/*",
    "tests/launch/test_scheduler.py",  # jobs of this machine
    "tests/launch/test_slurm_request.py",  # stand-ins for sbatch, squeue and scancel
    "tests/launch/test_slurm_verbs.py",
    "tests/datasets/test_workers.py",  # reader processes
    "tests/datasets/test_dump.py",
    "tests/datasets/test_dali_loader.py",
    "tests/datasets/test_metadata_cache.py",
)
SYSTEM_FIXTURES = {"started_browser", "slurm", "exported"}
SLOW_FIXTURES = {"motion_videos"}  # whole runs: training, evaluation, their results
# A test whose code, or that of its fixtures and helpers, has one of these names starts processes.
_STARTERS = {"subprocess", "multiprocessing", "Popen", "fork", "posix_spawn", "ProcessPoolExecutor"}
# In this order, before all others: a file that ends last must be a short one.
LONG_FILES = (
    "tests/faults/test_nth_call.py",
    "tests/test_one_gpu.py",
    "tests/slurm/test_slurm.py",
    "tests/fake_cuda/test_steps_of_clips.py",
    "tests/fake_cuda/test_steps_of_images.py",
    "tests/anal_tools/test_export.py",
    "tests/utils/test_dist.py",
    "tests/test_training_parts.py",
    "tests/test_train.py",
    "tests/test_soak.py",
    "tests/fake_cuda/test_breaks.py",
    "tests/fake_cuda/test_order.py",
    "tests/fake_cuda/test_catches.py",
    "tests/utils/test_watchdog.py",
    "tests/test_toy_method.py",
    "tests/test_starting.py",
    "tests/fuzz/test_fuzz.py",
)


# ------------------------------------------------------------------------------------------------------- which tests
def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts processes, leave out what the tier does not run, and put the long files first."""
    for item in items:
        if is_system(item):
            item.add_marker("system")
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")

    left_out = {"check": set(MARKS), "test": {"nightly"}, "nightly": set()}[str(config.getoption("--tier"))]
    gone = [item for item in items if marks_of(item) & left_out]
    kept = [item for item in items if not marks_of(item) & left_out]
    if gone:
        config.hook.pytest_deselected(items=gone)
    items[:] = sorted(kept, key=_place)


def marks_of(item: pytest.Item) -> set[str]:
    """Return which of the marks of this file a test has."""
    return {name for name in MARKS if item.get_closest_marker(name)}


def _place(item: pytest.Item) -> int:
    name = item.path.relative_to(ROOT).as_posix()
    return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)


def is_system(item: pytest.Item) -> bool:
    """Return True if the folder, a fixture, or the code of a test starts processes."""
    name = item.path.relative_to(ROOT).as_posix()
    fixtures = set(getattr(item, "fixturenames", ()))
    if fixtures & SYSTEM_FIXTURES or any(fnmatch.fnmatch(name, pattern) for pattern in SYSTEM_FILES):
        return True
    return isinstance(item, pytest.Function) and any(starts_processes(code) for code in _functions_of(item))


def _functions_of(item: pytest.Function) -> Iterator[types.FunctionType]:
    """Yield the test and the fixtures that it uses."""
    yield _unwrapped(item.function)
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        yield from (_unwrapped(definition.func) for definition in definitions)


def _unwrapped(function: Any) -> Any:
    """Return the function below decorators and fixtures; hypothesis keeps the test beside its own loop."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.hypothesis.inner_test if hasattr(function, "hypothesis") else function


@functools.cache
def starts_processes(function: object) -> bool:
    """Return True if a function of the tests, or one of the tests that it reaches, has a name of `_STARTERS`."""
    open_ends, seen = [function], {id(function)}
    while open_ends:
        reached = open_ends.pop()
        for code in _codes(reached):
            if _STARTERS & set(code.co_names):
                return True
            for value in _reached(reached, code):
                if id(value) not in seen:
                    seen.add(id(value))
                    open_ends.append(value)
    return False


def _reached(value_or_test: Any, code: types.CodeType) -> Iterator[object]:
    """Yield the functions and classes of the tests that `code` names, imported inside it or not."""
    names = code.co_names
    known = [function.__globals__ for function in _members(value_or_test)][:1]
    modules = [value for space in known for name in names if isinstance(value := space.get(name), types.ModuleType)]
    modules += [importlib.import_module(name) for name in names if name.startswith("tests.")]
    known += [vars(module) for module in modules if module.__name__.startswith("tests.")]
    for name in names:
        for space in known:
            value = _unwrapped(space.get(name))
            files = {function.__code__.co_filename for function in _members(value)}
            if any(file.startswith(_TESTS) and file != _GIT for file in files):
                yield value


def _members(value: Any) -> list[types.FunctionType]:
    """Return a function, or the methods of a class."""
    members = list(vars(value).values()) if isinstance(value, type) else [value]
    return [function for member in members if isinstance(function := _unwrapped(member), types.FunctionType)]


def _codes(value: object) -> Iterator[types.CodeType]:
    """Yield the code of a function or of the methods of a class, with the functions inside."""
    stack = [function.__code__ for function in _members(value)]
    while stack:
        code = stack.pop()
        yield code
        stack += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


# --------------------------------------------------------------------------------------------- what a quick test does
class Guard:
    """Watch the running test: the processes that it starts, and its CPU time."""

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.test: str | None = None  # the quick test that runs
        self.started: list[str] = []
        self.cpu_before = 0.0

    def install(self) -> None:
        """Hear of every process that this interpreter starts; the hook stays until it ends."""
        spawn = multiprocessing.util.spawnv_passfds

        def heard(path: Any, args: Any, passfds: Any) -> int:
            sys.audit("zoetrope.spawn", path, args)  # multiprocessing raises no event of its own
            return spawn(path, args, passfds)

        multiprocessing.util.spawnv_passfds = heard
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _EVENTS or self.test is None:
            return
        words = args[1] if len(args) > 1 else ()
        if event == "subprocess.Popen" and words and os.path.basename(str(words[0])) in HARMLESS:
            return
        self.started.append(f"{event} {str(words)[:100]}")
        raise RuntimeError(f"{self.test} starts a process ({event}); mark it, its fixture or its file `system`")

    def begin(self, item: pytest.Item) -> None:
        """Watch a test from here on."""
        self.test = None if marks_of(item) else item.nodeid
        self.started = []
        self.cpu_before = time.process_time()

    def end(self) -> None:
        """Stop watching."""
        self.test = None

    def judge(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Fail the last report of a quick test that started a process, and in `make nightly` of one that is slow."""
        if self.test is None or report.when != "teardown":
            self.test = None if report.failed else self.test
            return
        seconds = time.process_time() - self.cpu_before
        report.user_properties.append((CPU_PROPERTY, seconds))
        why = f"started a process: {self.started[0]}" if self.started else None
        has_more_examples = getattr(getattr(item, "function", None), "is_hypothesis_test", False)
        if seconds > CPU_SECONDS and self.tier == "nightly" and not has_more_examples:
            why = (
                why or f"took {seconds:.1f} s of CPU time, more than {CPU_SECONDS:g}; mark it `slow` or make it faster"
            )
        if why and report.passed:
            report.outcome, report.longrepr = "failed", f"{item.nodeid} {why} (tests/tiers.py)"


def slow_ones(reports: Iterable[object]) -> list[tuple[float, str]]:
    """Return (CPU seconds, test) of the quick tests that are none, longest first."""
    slow = []
    for report in reports:
        if isinstance(report, pytest.TestReport):
            seconds = dict(report.user_properties).get(CPU_PROPERTY, 0.0)
            if isinstance(seconds, float) and seconds > CPU_SECONDS:
                slow.append((seconds, report.nodeid))
    return sorted(slow, reverse=True)
