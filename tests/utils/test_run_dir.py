from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from utils import processes, run_dir, run_lock
from utils.errors import UserError
from utils.run_dir import RunDir


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("common:\n")
    return tmp_path


def lock_of(exp: Path) -> dict:
    return json.loads((exp / "jobs/lock.json").read_text())


def plant(exp: Path, *, silent: float = 0.0, **fields: object) -> Path:
    """A lock that some other process left."""
    record = {"token": "0" * 32, "host": "node7", "pid": 4242, "machine": "node7 other", "since": "yesterday"} | fields
    path = exp / "jobs/lock.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))
    written = time.time() - silent
    os.utime(path, (written, written))
    return path


def test_lock_names_its_holder_and_goes_away(exp: Path) -> None:
    with RunDir.open(exp) as run:
        record = lock_of(exp)
        assert (record["host"], record["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .* since .*remove .*lock\.json"):
            RunDir.open(exp)
        with RunDir.open(exp, "eval-best"):
            assert sorted(p.name for p in (exp / "jobs").iterdir()) == ["lock-eval-best.json", "lock.json"]
        assert run.path("log.txt") == exp / "log.txt"
    assert list((exp / "jobs").iterdir()) == []


def test_dead_process_of_this_machine_is_replaced_at_once(exp: Path, repo_root: Path) -> None:
    code = f"import os; from utils.run_dir import RunDir; RunDir.open({str(exp)!r}); print(1, flush=True); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(repo_root)}, check=False)
    old = lock_of(exp)
    assert old["pid"] != os.getpid()
    with RunDir.open(exp):
        assert lock_of(exp)["pid"] == os.getpid()
    assert list((exp / "jobs").iterdir()) == []


def test_same_pid_started_later_is_another_process(exp: Path) -> None:
    plant(exp, machine=processes.machine(), pid=os.getpid(), ticks=1)
    with RunDir.open(exp):
        assert lock_of(exp)["token"] != "0" * 32


def test_another_machine_is_judged_by_its_heartbeat(exp: Path) -> None:
    plant(exp, silent=200)
    with pytest.raises(UserError, match=r"process 4242 on node7 since yesterday \(last sign of life 200 s ago\)"):
        RunDir.open(exp)
    plant(exp, silent=400)
    RunDir.open(exp).close()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"token": "../../x"}', b"\xff\xfe"])
def test_lock_that_cannot_be_understood(exp: Path, content: bytes) -> None:
    path = plant(exp)
    path.write_bytes(content)
    with pytest.raises(UserError, match="in use by process"):
        RunDir.open(exp)
    written = time.time() - 400
    os.utime(path, (written, written))
    RunDir.open(exp).close()


@pytest.mark.system
@pytest.mark.parametrize(
    ("answer", "alive"),
    [
        ("echo '77|77|RUNNING|None|77'", True),
        ("echo '77|77|COMPLETED|None|77'", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
    ],
)
def test_slurm_is_asked(exp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, alive: bool) -> None:
    tool = tmp_path / "bin" / "squeue"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --jobs 77 --format %i|%F|%T|%r|%A" ] || exit 3\n{answer}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    plant(exp, job="77", silent=400 if alive else 0)  # the heartbeat says the opposite
    if alive:
        with pytest.raises(UserError, match="job 77"):
            RunDir.open(exp)
    else:
        RunDir.open(exp).close()


@pytest.mark.system
def test_requeued_job_does_not_wait_for_its_own_earlier_start(exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    plant(exp, job="77", restarts="1")
    RunDir.open(exp).close()
    plant(exp, job="77", restarts="2")
    with pytest.raises(UserError, match="in use"):
        RunDir.open(exp)


CONTEND = """
import os, sys, time
from pathlib import Path
from utils import run_lock
from utils.errors import UserError
lock, rounds, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dead = lock.read_bytes()
won = []
for number in range(rounds):
    for left in lock.parent.iterdir():
        left.unlink()
    lock.write_bytes(dead)
    os.utime(lock, (1, 1))
    if number % 2:  # the process that was about to take over died as well, its claim is left
        claim = lock.with_name(lock.name + ".claim-" + "0" * 32)
        claim.write_bytes(dead.replace(b"0" * 32, b"1" * 32))
        os.utime(claim, (1, 1))
    start, children = time.monotonic() + 0.02, []
    reading, writing = os.pipe()
    hold_reading, hold_writing = os.pipe()
    for _ in range(size):
        child = os.fork()
        if child == 0:
            os.close(hold_writing)
            while time.monotonic() < start:
                pass
            try:
                run_lock.take(lock)
                os.write(writing, b"1")
            except UserError:
                os.write(writing, b"0")
            os.read(hold_reading, 1)  # live on until all have answered
            os._exit(0)
        children.append(child)
    answers = b""
    while len(answers) < size:
        answers += os.read(reading, 100)
    os.close(hold_writing)
    for child in children:
        os.waitpid(child, 0)
    for end in (reading, writing, hold_reading):
        os.close(end)
    won.append(answers.count(b"1"))
print(sorted(set(won)))
"""


def test_exactly_one_of_many_takes_over(exp: Path, repo_root: Path) -> None:
    path = plant(exp, silent=1000)
    done = subprocess.run(
        [sys.executable, "-c", CONTEND, str(path), "60", "6"],
        env={**os.environ, "PYTHONPATH": str(repo_root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "[1]", done.stdout + done.stderr


@pytest.mark.parametrize("point", ["run_dir.claimed", "run_dir.locked"])
def test_killed_while_taking_the_lock(exp: Path, repo_root: Path, point: str) -> None:
    plant(exp, silent=1000)
    code = f"from utils.run_dir import RunDir; RunDir.open({str(exp)!r})"
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "ZOETROPE_FAILPOINT": f"{point}:0:1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -9
    with RunDir.open(exp):
        assert lock_of(exp)["pid"] == os.getpid()


def test_heartbeat_and_loss(exp: Path) -> None:
    held = run_lock.take(exp / "lock")
    os.utime(exp / "lock", (1, 1))
    held.start_heartbeat(0.01)
    deadline = time.monotonic() + 20
    while (exp / "lock").stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (exp / "lock").stat().st_mtime > 2
    (exp / "lock").unlink()
    other = run_lock.take(exp / "lock")
    os.utime(exp / "lock", (1, 1))
    time.sleep(0.2)
    assert (exp / "lock").stat().st_mtime == 1, "a process that lost its lock keeps its successor's alive"
    held.release()
    assert (exp / "lock").exists(), "a process that lost its lock removed its successor's"
    other.release()
    assert not (exp / "lock").exists()


def test_file_system_without_hard_links(exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with RunDir.open(exp):
        assert lock_of(exp)["pid"] == os.getpid()
        with pytest.raises(UserError, match="in use"):
            RunDir.open(exp)


def test_wrong_folders_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml here"):
        RunDir.open(tmp_path)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "jobs").write_text("a file where a folder must be")
    with pytest.raises(UserError, match="cannot be written"):
        RunDir.open(tmp_path)
    for kind in ("", "..", "eval-../x", "a\nb"):
        with pytest.raises(UserError, match="cannot be part of a file name"):
            RunDir(tmp_path, kind)


def test_folder_of_somebody_else(repo_root: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can play another user")
    with tempfile.TemporaryDirectory() as name:
        exp = Path(name)
        exp.chmod(0o755)
        (exp / "config.yaml").touch()
        code = (
            f"import os, sys; sys.path.insert(0, {str(repo_root)!r}); from utils.run_dir import RunDir\n"
            "from utils.errors import UserError\nos.setuid(65534)\n"
            f"try: RunDir.open({name!r})\nexcept UserError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "cannot be written (Permission denied)" in done.stdout, done.stderr


def test_move_to_old(exp: Path) -> None:
    assert RunDir(exp).move_to_old() is None
    for _ in range(2):  # twice within one second
        with RunDir.open(exp) as run:
            for name in ("ckpt.pth.tar", "log.txt", "train.sh"):
                (exp / name).write_text(name)
            (exp / "events").mkdir()
            moved = run.move_to_old()
            assert moved is not None
            assert sorted(p.name for p in moved.iterdir()) == ["ckpt.pth.tar", "events", "log.txt"]
            assert sorted(p.name for p in exp.iterdir()) == ["config.yaml", "jobs", "old", "train.sh"]
            assert (exp / "jobs/lock.json").exists()
    assert len(list((exp / "old").iterdir())) == 2


def test_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert run_dir.revision(tmp_path) == "unknown"
    git("init", "-q")
    assert run_dir.revision(tmp_path) == "unknown"  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "x")
    clean = git("rev-parse", "--short=12", "HEAD")
    assert run_dir.revision(tmp_path) == clean
    (tmp_path / "a").write_text("2")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # what a git hook sets
    assert run_dir.revision(tmp_path) == f"{clean}+dirty"
    (tmp_path / "sub").mkdir()
    assert run_dir.revision(tmp_path / "sub") == "unknown"
    monkeypatch.setenv("PATH", "")
    assert run_dir.revision(tmp_path) == "unknown"


def test_needs_no_torch(repo_root: Path) -> None:
    code = "import sys, utils.run_dir, utils.log; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_close_twice(exp: Path) -> None:
    run = RunDir.open(exp)
    run.close()
    with contextlib.closing(run):
        run.close()


def test_a_removed_lock_is_put_back_before_a_checkpoint_is_written(exp: Path) -> None:
    with RunDir.open(exp) as run:
        mine = lock_of(exp)
        for path in (exp / "jobs/lock.json", exp / "jobs"):
            path.unlink() if path.is_file() else path.rmdir()
        with run.saving():
            assert lock_of(exp) == mine
            (exp / "ckpt.pth.tar").write_text("ours")
        (exp / "jobs/lock.json").unlink()
        with run.saving():
            assert lock_of(exp) == mine
        with pytest.raises(UserError, match="in use by process"):
            RunDir.open(exp)
    assert not (exp / "jobs/lock.json").exists()


def test_nothing_is_written_once_another_process_has_the_folder(exp: Path, repo_root: Path) -> None:
    with RunDir.open(exp) as run:
        (exp / "jobs/lock.json").unlink()
        code = f"from utils.run_dir import RunDir; RunDir.open({str(exp)!r}); print(1, flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(repo_root)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as other:  # fmt: skip
            assert other.stdout is not None
            assert other.stdout.readline() == b"1\n"
            theirs = lock_of(exp)
            assert theirs["pid"] == other.pid
            with pytest.raises(UserError, match="another process has taken this folder"), run.saving():
                pytest.fail("it went on to write")
            other.communicate(b"\n")
        # Dead or not: it may have written checkpoints of its own.
        with pytest.raises(UserError, match="another process has taken this folder"), run.saving():
            pytest.fail("it went on to write")
    assert lock_of(exp) == theirs, "the loser removed the winner's lock"


def test_a_lock_is_not_put_back_over_the_work_of_somebody_who_came_and_went(exp: Path) -> None:
    with RunDir.open(exp) as run:
        with run.saving():
            (exp / "ckpt.pth.tar").write_text("ours")
        (exp / "jobs/lock.json").unlink()
        with RunDir.open(exp) as other, other.saving():
            (exp / "ckpt.new").write_text("theirs")
            (exp / "ckpt.new").replace(exp / "ckpt.pth.tar")
        with pytest.raises(UserError, match="another process has taken this folder"), run.saving():
            pytest.fail("it went on to write")


def test_what_was_told_of_bad_samples_goes_to_old_with_the_run_or_alone(exp: Path) -> None:
    (exp / "jobs").mkdir()
    for everything in (True, False):
        for name in ("log.txt", "jobs/bad_samples.json", "jobs/bad_samples.jsonl", "jobs/log-1.txt"):
            (exp / name).write_text("x")
        moved = RunDir(exp).move_to_old(everything=everything)
        assert moved is not None
        assert sorted(p.name for p in (moved / "jobs").iterdir()) == ["bad_samples.json", "bad_samples.jsonl"]
        assert [p.name for p in (exp / "jobs").iterdir()] == ["log-1.txt"]
        assert (exp / "log.txt").exists() != everything
