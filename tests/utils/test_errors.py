"""What a command leaves behind when it cannot go on: one sentence, an exit code, no trace of Python."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import main
from tests.experiment import few_videos, make
from tests.odd import KINDS, put_something_odd
from tests.ranks import ROOT
from utils import errors
from utils.errors import AgreedError, RankLostError, UserError

DEMO = "exps/demo_exps/tsm_resnet18/motion8"


def failing(error: BaseException):
    def action() -> int:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "start_of_text"),
    [
        (UserError("a.mp4: fix it"), 2, "error: a.mp4: fix it"),
        (RankLostError("rank 0 lost contact"), 1, "error: rank 0 lost contact"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device; make room"),
        (OSError(errno.EIO, "Input/output error"), 2, "error: Input/output error; the disk or the file server failed"),
        (OSError(errno.ESTALE, "Stale", "/nfs/a"), 2, "error: /nfs/a: Stale; the file server has forgotten this file"),
        (TimeoutError(errno.ETIMEDOUT, "Timed out"), 2, "error: Timed out; a file server or another machine did not"),
        (OSError(errno.EACCES, "Permission denied", b"/a\xff"), 2, "error: /a\\udcff: Permission denied"),
    ],
)
def test_one_sentence(error: BaseException, code: int, start_of_text: str, capsys: pytest.CaptureFixture) -> None:
    assert errors.run_cli(failing(error)) == code
    assert capsys.readouterr().err.startswith(start_of_text)


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "no file named"), OSError(errno.EBADF, "Bad", "/a"), KeyError()]
)
def test_a_bug_shows_its_trace(error: Exception) -> None:
    with pytest.raises(type(error)):
        errors.run_cli(failing(error))


@pytest.mark.parametrize("action", ["stop", "term", "int", "kill", None])
def test_a_fail_point_sends_its_signal_at_the_count(action: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(errors.os, "kill", lambda pid, number: sent.append(number))
    monkeypatch.setattr(errors, "_arrivals", Counter())
    monkeypatch.setenv("ZOETROPE_FAILPOINT", "here:0:2" + (f":{action}" if action else ""))
    errors.fail_point("elsewhere")
    errors.fail_point("here")
    assert sent == []
    errors.fail_point("here")
    errors.fail_point("here")
    assert [signal.Signals(number).name for number in sent] == [f"SIG{(action or 'kill').upper()}"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_named_without_opening_it(kind: str, tmp_path: Path) -> None:
    assert errors.kind_of_file(tmp_path / "absent") is None
    (tmp_path / "file").touch()
    assert errors.kind_of_file(tmp_path / "file") is None
    errors.refuse_odd_file(tmp_path / "file")
    odd = put_something_odd(tmp_path / "odd", kind)
    with pytest.raises(UserError, match=r"odd: a (named pipe|socket|device|folder) is where a file should be"):
        errors.refuse_odd_file(odd)


def test_another_rank_speaks_for_itself_unless_all_agreed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("ZOETROPE_EXIT_FILE", raising=False)
    errors.report_error(AgreedError("known to all"))
    assert capsys.readouterr().err == ""
    errors.report_error(UserError("node without data"))
    assert capsys.readouterr().err.startswith("error: rank 3 on ")
    monkeypatch.setenv("ZOETROPE_EXIT_FILE", str(tmp_path / "code"))
    errors.report_error(UserError("node without data"))
    assert capsys.readouterr().err == "", "the launcher prints it, once"
    assert (tmp_path / "code.3.error").read_text() == "node without data"


def test_a_reader_that_has_seen_enough() -> None:
    """`main.py config EXP | head -1`."""
    command = [sys.executable, "main.py", "config", DEMO]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, b"")


def test_training_goes_on_without_its_terminal(tmp_path: Path, motion_videos: Path) -> None:
    exp = make(tmp_path / "exp", motion_videos, print_freq=1)
    command = [sys.executable, "main.py", "train", str(exp), "--set", few_videos(exp, motion_videos)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr.decode()
    assert "finished: 6 iterations" in (exp / "log.txt").read_text()


def test_a_closed_terminal_saves_the_run(tmp_path: Path, motion_videos: Path) -> None:
    exp = make(tmp_path / "exp", motion_videos, steps=4000, val_freq=4000, print_freq=1)
    command = [sys.executable, "main.py", "train", str(exp)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup: inherited
    )
    log = exp / "log.txt"
    end = time.monotonic() + 120
    while not (log.exists() and "Iter: [" in log.read_text()):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr.decode()
    assert "stopped by SIGHUP" in log.read_text()
    assert (exp / "ckpt.pth.tar").is_file()


@pytest.mark.parametrize(("name", "expected"), [("log.txt", "a folder is where a file"), ("jobs", "cannot be written")])
def test_something_else_is_in_the_way(
    name: str, expected: str, tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture
) -> None:
    exp = make(tmp_path / "exp", motion_videos)
    (exp / name).mkdir() if name == "log.txt" else (exp / name).touch()
    assert main.main(["train", str(exp)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert name in message
    assert expected in message
    assert len(message.splitlines()) == 1


def test_what_ended_a_run_stands_in_its_log(tmp_path: Path, motion_videos: Path) -> None:
    exp = make(tmp_path / "exp", motion_videos, steps=40, val_freq=40)
    words = ["--set", "common.lr_scheduler.base_lr=1e12", "--set", "common.lr_scheduler.warmup_lr=1e30"]
    assert main.main(["train", str(exp), *words]) == 2
    lines = (exp / "log.txt").read_text().splitlines()
    assert sum("error: the loss of iteration" in line for line in lines) == 1


FAILING = """
import subprocess, sys, time
from pathlib import Path
from utils import errors, watchdog
reader = subprocess.Popen(["sleep", "60"]) if sys.argv[1] == "reader" else None
watch = watchdog.Watchdog(Path("."), seconds=60)
for step in range(3):
    watch.phase("optimiser step", step)
    with watch.during("validation"):
        watch.progress()
    print(step, flush=True)
print("reader", reader.wait(timeout=10) if reader else None)
"""


@pytest.mark.parametrize(
    ("point", "action", "code", "printed"),
    [
        ("phase.optimiser step", "kill", -signal.SIGKILL, ["0"]),
        ("phase.validation", "usr2", -signal.SIGUSR2, ["0"]),
        ("progress.validation", "term", -signal.SIGTERM, ["0"]),
        ("phase.optimiser step", "reader", 0, ["0", "1", "2", f"reader {-signal.SIGKILL}"]),
    ],
)
def test_fail_points_of_the_phases(point: str, action: str, code: int, printed: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    env = {"PYTHONPATH": str(ROOT), "ZOETROPE_FAILPOINT": f"{point}:0:2:{action}", "ZOETROPE_FAILPOINT_LOG": str(log)}
    argv = [sys.executable, "-c", FAILING, action]
    done = subprocess.run(argv, cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (code, printed), done.stderr
    assert log.read_text() == f"{point}:0:2:{action}\n"
