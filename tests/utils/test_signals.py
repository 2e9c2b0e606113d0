"""What a signal prints and sets, and that a rank does not outlive what started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from utils import signals

ROOT = Path(__file__).resolve().parents[2]

BUSY = """\
import hashlib
from utils import signals
with signals.StopFlag(signals.stop_announcement()) as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 6_000_000)  # one long call without the interpreter, as a backward pass
    print(stop.name, flush=True)
"""


def python(code: str, **env: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "SLURM_", "ZOETROPE_"))}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=clean | env, text=True, **pipes)


def test_ctrl_c_is_answered_while_the_interpreter_is_busy() -> None:
    process = python(BUSY)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    line = process.stderr.readline()
    answered = time.monotonic()
    assert line == "stopping: this run saves its state and leaves; press Ctrl-C again to end it immediately\n"
    assert process.stdout.readline() == "SIGINT\n"
    assert time.monotonic() - answered > 0.2, "the line came before the handler could run"
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 0


def test_under_a_launcher_a_rank_leaves_the_line_to_it() -> None:
    code = "from utils import signals; print(signals.stop_announcement())"
    for env in ({"ZOETROPE_EXIT_FILE": "x"}, {"RANK": "1"}, {"SLURM_PROCID": "0"}):
        assert python(code, **env).communicate(timeout=10)[0] == "None\n"


def test_a_trouble_stops_like_a_signal_and_the_first_reason_stays() -> None:
    with signals.StopFlag("line") as stop:
        stop.ask(None)
        assert not stop.received
        stop.ask("readers that do not start")
        stop.ask("something else")
        assert (stop.received, stop.name, stop.trouble) == (True, *["readers that do not start"] * 2)
    assert signal.set_wakeup_fd(-1) == -1, "left as it was"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


FOLLOWER = (
    "import os, time; from utils import signals; signals.follow_launcher(); print('on', flush=True); time.sleep(60)"
)


def test_a_rank_whose_launcher_died_before_it_could_look_leaves_at_once() -> None:
    """The launcher died between the start of torchrun and that of the rank: its number may belong to another now."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    process = python(FOLLOWER, TORCHELASTIC_RUN_ID="x", **{signals.LAUNCHER: f"{gone.pid} 12345"})
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 1


def test_a_rank_that_has_been_adopted_leaves_at_once() -> None:
    """torchrun died: the parent is now the launcher itself, without our process in between."""
    process = python(FOLLOWER, TORCHELASTIC_RUN_ID="x", **signals.launcher_variable())
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 1


def test_a_process_that_no_launcher_started_is_left_alone() -> None:
    process = python(FOLLOWER, **{signals.LAUNCHER: "1 1"})
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    time.sleep(0.6)
    assert process.poll() is None
    process.kill()
    process.communicate()


@pytest.mark.parametrize("dead", [False, True])
def test_the_tie_to_a_parent_notices_one_that_is_dead_already(dead: bool) -> None:
    tie = signals.end_with_parent(1 if dead else os.getpid(), signal.SIGKILL)
    child = os.fork()
    if not child:
        tie()
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (1 if dead else 7)
