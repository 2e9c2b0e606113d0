"""Two users of one group in one experiment folder: it works, or is refused with one sentence and nothing changed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import users
from tests.users import ANNE, BERT, CARL, GROUP, User
from tests.utils.test_fencing import save, saved, start
from utils import checkpoint, errors, processes
from utils.checkpoint import BEST, LATEST
from utils.run_dir import RunDir


@pytest.fixture
def shared() -> Iterator[Path]:
    """An experiment of Anne's that her group may write to; pytest's own folders are closed to others."""
    if reason := users.why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as name:
        exp = Path(name)
        (exp / "config.yaml").write_text("common:\n")
        os.chown(exp, ANNE.uid, GROUP)
        exp.chmod(0o2775)
        yield exp


def act(user: User, exp: Path, action: Callable[[], object], umask: int) -> tuple[int, str]:
    """Do something as a user; returns the exit code and what was printed."""
    output = exp.with_name(f"{exp.name}.output")

    def as_user() -> int:
        user.become(umask)
        action()
        return 0

    try:
        return users.run(output, lambda: errors.run_cli(as_user)), output.read_text()
    finally:
        output.unlink()


def a_turn(exp: Path, step: int) -> None:
    """Start, write both checkpoints, end."""
    with start(exp) as run:
        save(run, LATEST, step)
        save(run, BEST, step)


@pytest.mark.parametrize(("umask", "works"), [(0o002, True), (0o022, False), (0o077, False)])
def test_two_users_take_turns(umask: int, works: bool, shared: Path) -> None:
    assert act(ANNE, shared, lambda: a_turn(shared, 10), umask) == (0, "")
    before = {path: path.stat().st_ino for path in shared.rglob("*")}
    code, message = act(BERT, shared, lambda: a_turn(shared, 20), umask)
    if works:
        assert (code, message) == (0, "")
        assert act(ANNE, shared, lambda: a_turn(shared, 30), umask) == (0, "")
        assert saved(shared, LATEST) == (3, 30)
        assert {path.stat().st_gid for path in shared.rglob("*ckpt*")} == {GROUP}
    else:
        assert code == 2
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert "ermission denied" in message
        assert {path: path.stat().st_ino for path in shared.rglob("*")} == before


@pytest.mark.parametrize(
    ("mode", "user", "word"),
    [(0o3775, BERT, "sticky"), (0o2755, BERT, "cannot be written"), (0o2775, CARL, "cannot be written")],
)
def test_what_the_first_save_would_meet_is_said_at_the_start(mode: int, user: User, word: str, shared: Path) -> None:
    assert act(ANNE, shared, lambda: a_turn(shared, 10), 0o002) == (0, "")
    (shared / "jobs").chmod(0o777)
    shared.chmod(mode)
    code, message = act(user, shared, lambda: a_turn(shared, 20), 0o002)
    assert (code, message.count("\n")) == (2, 1)
    assert word in message
    assert saved(shared, LATEST) == (1, 10)


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over_for_an_older_one(shared: Path) -> None:
    for step in (10, 20):
        assert act(ANNE, shared, lambda step=step: a_turn(shared, step), 0o002) == (0, "")
    (shared / LATEST).chmod(0o600)
    code, message = act(BERT, shared, lambda: a_turn(shared, 30), 0o002)
    assert (code, message.count("\n")) == (2, 1)
    assert f"{LATEST}: cannot be read (Permission denied)" in message
    assert checkpoint.load(shared / LATEST)["step"] == 20


def test_a_live_process_that_proc_does_not_show_keeps_its_lock(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid other users' processes are not in /proc; the kernel still says that they are there."""
    monkeypatch.setattr(processes, "start_ticks", lambda pid: -1 if pid != os.getpid() else 7)
    reading, writing = os.pipe()
    more, stop = os.pipe()

    def hold() -> int:
        os.close(stop)
        ANNE.become(0o002)
        RunDir.open(shared)
        os.write(writing, b"1")
        os.read(more, 1)
        os._exit(0)

    child = users.start(shared.with_name(f"{shared.name}.holder"), hold)
    os.read(reading, 1)
    code, message = act(BERT, shared, lambda: a_turn(shared, 20), 0o002)
    os.close(stop)
    os.waitpid(child, 0)
    shared.with_name(f"{shared.name}.holder").unlink()
    assert (code, "in use by process" in message) == (2, True)
    for descriptor in (reading, writing, more):
        os.close(descriptor)
