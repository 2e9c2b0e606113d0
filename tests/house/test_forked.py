"""A forked Python behaves as one that `subprocess` starts: arguments, environment, folder, streams, signals, end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.conftest import ROOT

SHOW = """
import json, os, sys, __main__
shown = {"argv": sys.argv, "path": [p for p in sys.path if "site-packages" not in p][:2], "folder": os.getcwd()}
shown |= {"flag": os.environ.get("FLAG"), "home": "HOME" in os.environ, "name": __name__, "text": sys.stdin.read()}
shown |= {"tests": [name for name in sys.modules if name.split(".")[0] in ("tests", "main", "utils", "datasets")]}
shown |= {"main": vars(__main__) is globals(), "fds": sorted(os.listdir("/proc/self/fd"))}
print(json.dumps(shown))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture(params=["file", "-c", "-m"])
def command(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """SHOW with two arguments, in each form that an interpreter takes."""
    (tmp_path / "shows.py").write_text(SHOW)
    form = {"file": ["shows.py"], "-c": ["-c", SHOW], "-m": ["-m", "shows"]}[request.param]
    return [sys.executable, *form, "a b", "--c"]


def test_what_a_program_sees_is_what_it_sees_in_a_new_interpreter(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "input").write_text("é\n")
    answers = []
    for run in (subprocess.run, forked.run):
        with open(tmp_path / "input") as stdin:
            options: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "FLAG": "é", "PYTHONPATH": "/nowhere"}}
            del options["env"]["HOME"]
            answers.append(run(command, stdin=stdin, capture_output=True, text=True, check=False, **options))
    fresh, fork = answers
    assert (fork.returncode, fork.stdout, fork.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)
    assert (fork.returncode, fork.stderr) == (7, "to stderr\n")


@pytest.mark.parametrize(
    "code", ["1 / 0", "raise SystemExit('no')", "import os; os._exit(4)", "import os, signal; os.kill(os.getpid(), 9)"]
)
def test_ends_are_those_of_a_new_interpreter(code: str) -> None:
    fresh, fork = (run([sys.executable, "-c", code], capture_output=True) for run in (subprocess.run, forked.run))
    assert fork.returncode == fresh.returncode
    assert fork.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_pytorch_computes_in_processes_that_are_forked_one_after_the_other() -> None:
    code = "import torch; x = torch.ones(300, 300, requires_grad=True); (x @ x).sum().backward(); print(x.grad[0, 0])"
    for _ in range(2):
        assert forked.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "tensor(600.)\n"


WAITS = "import sys, time; print('ready', flush=True); print(sys.stdin.readline(), flush=True); time.sleep(60)"


@pytest.fixture
def waiting() -> Iterator[forked.Process]:
    """A process that answers one line and then sleeps."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with forked.Process([sys.executable, "-c", WAITS], text=True, start_new_session=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_it_is_talked_to_waited_for_and_signalled(waiting: forked.Process) -> None:
    assert waiting.poll() is None
    assert os.getpgid(waiting.pid) == waiting.pid
    waiting.stdin.write("hello\n")
    assert waiting.stdout.readline() == "hello\n"
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.01)
    waiting.send_signal(signal.SIGSTOP)
    until(lambda: Path(f"/proc/{waiting.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    assert waiting.poll() is None
    os.killpg(waiting.pid, signal.SIGKILL)
    assert waiting.wait(10) == -signal.SIGKILL
    waiting.send_signal(signal.SIGTERM)  # it has ended: nothing happens
    assert not Path(f"/proc/{waiting.pid}").exists()


def test_ctrl_c_reaches_it(waiting: forked.Process) -> None:
    waiting.send_signal(signal.SIGINT)
    out, _ = waiting.communicate(timeout=10)
    assert "KeyboardInterrupt" in out
    assert waiting.returncode in (1, -signal.SIGINT)


def test_a_program_that_runs_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run([sys.executable, "-c", WAITS], stdin=subprocess.DEVNULL, capture_output=True, timeout=0.2)


def test_the_server_ends_with_pytest_and_takes_its_processes_along(tmp_path: Path) -> None:
    code = "import os, sys; from tests import forked; "
    code += "process = forked.Process([sys.executable, '-c', 'import time; time.sleep(60)']); "
    code += "print(process.pid, forked._server()._process.pid, flush=True); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    for pid in done.stdout.split():
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists())


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens within a second on an idle machine."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("words", "variables", "reason"),
    [
        (["-W", "error", "-c", "1"], {}, "only a file"),
        ([], {}, "only a file"),
        (["-c", "1"], {"OMP_NUM_THREADS": "2"}, "OMP_NUM_THREADS is read"),
        (["-c", "1"], {"MALLOC_PERTURB_": "85"}, "MALLOC_PERTURB_ is read"),
        (["-c", "1"], {"LONG": "x" * 200_000}, "bytes of arguments"),
    ],
)
def test_what_needs_a_new_interpreter_is_refused(words: list[str], variables: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        forked.run([sys.executable, *words], env={**os.environ, **variables})
