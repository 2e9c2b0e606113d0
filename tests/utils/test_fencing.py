"""A run that changes hands: tokens, names that one start keeps for itself, and what a process does that wakes up."""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import io
import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from anal_tools.evaluate.network import choose_weights
from tests.odd import put_something_odd
from tests.utils.test_checkpoint import names, state
from tests.utils.test_run_dir import plant
from utils import checkpoint, checkpoint_names, errors, processes, run_lock, writers
from utils.checkpoint import BEST, LATEST, PREVIOUS
from utils.checkpoint_names import kept_name
from utils.errors import UserError
from utils.run_dir import RunDir


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("common:\n")
    return tmp_path


def start(exp: Path, *, fresh: bool = False) -> RunDir:
    """Begin as `main.train` does: lock, look for a checkpoint, take the token."""
    run = RunDir.open(exp)
    checkpoint.take_over(run, None if fresh else checkpoint.find(exp), fresh=fresh)
    return run


def save(run: RunDir, name: str, step: int) -> None:
    """Write a checkpoint as `Run.save` does."""
    with run.saving(name) as check:
        keep_as = run.token if run.has_predecessor else None
        checkpoint.save(run.exp, name, state(step) | {"token": run.token}, check=check, keep_as=keep_as)


def saved(exp: Path, name: str) -> tuple[int, int]:
    """(token, step) of what readers find."""
    path = checkpoint.newest(exp, name)
    assert path is not None
    content = checkpoint.load(path)
    return content["token"], content["step"]


def hand_over(run: RunDir, exp: Path) -> None:
    """Make `run` look like one of another machine that is silent."""
    for file in (exp / "jobs/lock.json", exp / f"jobs/writer-{run.token}.json"):
        record = json.loads(file.read_text()) | {"host": "node7", "machine": "node7 other"}
        file.write_text(json.dumps(record))
    old = time.time() - 1000
    os.utime(exp / "jobs/lock.json", (old, old))


def lose(run: RunDir, exp: Path) -> RunDir:
    """Make `run` look so, and start its successor."""
    hand_over(run, exp)
    return start(exp)


def test_every_start_has_a_higher_token_and_an_undisturbed_run_leaves_no_trace(exp: Path) -> None:
    for token in (1, 2, 3):
        with start(exp) as run:
            assert run.token == token
            assert [path.name for path in (exp / "jobs").glob("writer-*")] == [f"writer-{token}.json"]
            save(run, LATEST, 10 * token)
            save(run, BEST, 10 * token)
        assert not list((exp / "jobs").iterdir())
    assert names(exp) == {"config.yaml", "jobs", LATEST, PREVIOUS, BEST}
    assert saved(exp, LATEST) == (3, 30)


def test_the_token_of_an_owner_that_died_before_it_wrote_is_passed_over(exp: Path) -> None:
    (exp / "jobs").mkdir()
    (exp / "jobs/writer-1.json").write_text("")  # its owner is unknown
    put_something_odd(exp / "jobs/writer-2.json", "fifo")
    (exp / "jobs/writer-3.json").write_text(json.dumps({"token": "0" * 32, "pid": 1, "machine": processes.machine()}))
    with start(exp) as run:
        assert run.token == 4
        assert run.has_predecessor
        assert not (exp / "jobs/writer-3.json").exists(), "that process is known to be dead"
    old = time.time() - writers.FORGOTTEN_SECONDS - 1
    for number in (1, 2):
        (exp / f"jobs/writer-{number}.json").unlink()
    path = exp / "jobs/writer-5.json"
    path.write_text(json.dumps({"token": "0" * 32, "pid": 1, "machine": "elsewhere"}))
    os.utime(path, (old, old))
    with start(exp) as run:
        assert run.token == 6
        assert not run.has_predecessor, "a week without a sign of life"


def test_of_many_starts_each_gets_a_token_of_its_own(exp: Path) -> None:
    (exp / "jobs").mkdir()
    children = []
    reading, writing = os.pipe()
    for _ in range(8):
        child = os.fork()
        if child == 0:
            for _ in range(5):
                taken = writers.StartToken.enter(exp / "jobs", run_lock.this_process(), above=0)
                os.write(writing, f"{taken.token}\n".encode())
            os._exit(0)
        children.append(child)
    os.close(writing)
    for child in children:
        os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        tokens = [int(line) for line in stream]
    assert sorted(tokens) == list(range(1, 41))


def test_a_late_rename_hides_nothing(exp: Path, tmp_path: Path) -> None:
    first = start(exp)
    for step in (10, 20):
        save(first, LATEST, step)
    save(first, BEST, 20)
    old = {name: (exp / name).read_bytes() for name in (LATEST, BEST)}
    second = lose(first, exp)
    assert second.token == 2
    for name in (LATEST, BEST):
        save(second, name, 60)
    second.close()
    assert names(exp) >= {kept_name(LATEST, 2), kept_name(BEST, 2)}
    assert os.path.samefile(exp / LATEST, exp / kept_name(LATEST, 2)), "it costs no bytes"

    for name, target in ((LATEST, LATEST), (BEST, BEST), (LATEST, PREVIOUS)):
        (exp / "late").write_bytes(old[name])
        (exp / "late").replace(exp / target)
    assert (saved(exp, LATEST), saved(exp, BEST)) == ((2, 60), (2, 60))
    resumed = checkpoint.find(exp)
    assert resumed is not None
    assert (resumed.path.name, resumed.state["step"]) == (kept_name(LATEST, 2), 60)
    assert f"{LATEST} is skipped: it is older (step 20, of start 1 and not 2)" in resumed.messages
    for choice, kind in (("latest", LATEST), ("best", BEST), (None, BEST)):
        assert choose_weights(exp, choice) == exp / kept_name(kind, 2)

    with pytest.raises(UserError, match="another process has taken this folder"):
        save(first, LATEST, 30)
    first.close()
    with start(exp) as third:  # the first has left: the plain names are put right, the others go
        assert third.token == 3
        assert names(exp) == {"config.yaml", "jobs", LATEST, PREVIOUS, BEST}
        assert checkpoint.load(exp / LATEST)["step"] == checkpoint.load(exp / BEST)["step"] == 60


def test_without_kept_names_the_highest_token_of_the_three_wins(exp: Path) -> None:
    for name, token, step in ((LATEST, 1, 90), (PREVIOUS, 2, 30), (BEST, 2, 40)):
        torch.save(state(step) | {"token": token}, exp / name)
    resumed = checkpoint.find(exp)
    assert resumed is not None
    assert (resumed.path.name, resumed.state["step"]) == (BEST, 40)
    assert choose_weights(exp, "latest").name == BEST
    torch.save(state(99), exp / BEST)  # from before there were tokens
    resumed = checkpoint.find(exp)
    assert resumed is not None
    assert (resumed.path.name, resumed.state["step"]) == (PREVIOUS, 30)
    (exp / LATEST).write_bytes(b"damaged")
    assert choose_weights(exp, "latest").name == LATEST, "who reads it says that it is damaged"
    (exp / BEST).unlink()
    assert choose_weights(exp, None).name == LATEST
    (exp / BEST).symlink_to("nowhere")
    assert choose_weights(exp, None).name == BEST, "not the latest in its place"


def test_a_checkpoint_with_an_odd_token_is_no_checkpoint(exp: Path) -> None:
    checkpoint.save(exp, LATEST, state(10))
    checkpoint.save(exp, LATEST, state(20))
    for token in ("2", -1, True, 1.5, None):
        torch.save(state(30) | {"token": token}, exp / LATEST)
        resumed = checkpoint.find(exp)
        assert resumed is not None
        assert (resumed.path.name, resumed.state["step"]) == (PREVIOUS, 10)


def test_the_temporary_file_of_a_frozen_writer_is_removed_so_that_it_cannot_be_renamed(exp: Path) -> None:
    first = start(exp)
    save(first, LATEST, 10)
    seconds: list[RunDir] = []

    def frozen(check):
        def check_then_freeze(tmp: Path) -> None:
            check(tmp)
            seconds.append(lose(first, exp))

        return check_then_freeze

    with pytest.raises(UserError, match="another process has taken this folder"), first.saving(LATEST) as check:
        checkpoint.save(exp, LATEST, state(20) | {"token": 1}, check=frozen(check))
    assert saved(exp, LATEST) == (1, 10)
    save(seconds[0], LATEST, 30)
    first.close()
    assert saved(exp, LATEST) == (2, 30)
    seconds[0].close()
    assert not list((exp / "jobs").iterdir())
    assert not checkpoint_names.kept(exp), "the predecessor has left before it ended"


def test_a_writer_that_wakes_up_in_a_finished_folder_does_not_take_the_file_there_for_its_own(exp: Path) -> None:
    first = start(exp)
    with contextlib.ExitStack() as stack:
        check = stack.enter_context(first.saving(LATEST))
        checkpoint.save(exp, LATEST, state(10) | {"token": 1}, check=check)
        second = lose(first, exp)  # frozen after the renames
        save(second, LATEST, 60)
        second.close()
        with pytest.raises(UserError, match="another process has taken"):
            stack.close()
    with pytest.raises(UserError, match="another process has taken"):
        first.look()
    first.close()
    assert saved(exp, LATEST) == (2, 60)


def test_a_removed_jobs_folder_is_put_back_with_lock_and_token(exp: Path) -> None:
    with start(exp) as run:
        save(run, LATEST, 10)
        for path in (exp / "jobs").iterdir():
            path.unlink()
        (exp / "jobs").rmdir()
        save(run, LATEST, 20)
        assert {path.name for path in (exp / "jobs").iterdir()} == {"lock.json", "writer-1.json"}
    assert not list((exp / "jobs").iterdir())


def test_fresh_leaves_nothing_of_the_old_run_that_a_reader_would_take(exp: Path) -> None:
    first = start(exp)
    save(first, LATEST, 10)
    second = lose(first, exp)
    save(second, LATEST, 60)
    second.close()
    assert checkpoint_names.kept(exp)
    with start(exp, fresh=True) as third:
        assert third.token == 3
        assert checkpoint.find(exp) is None
        (old,) = (exp / "old").iterdir()
        assert {LATEST, kept_name(LATEST, 2)} <= names(old)
        save(third, LATEST, 5)
    assert saved(exp, LATEST) == (3, 5)


def test_a_file_system_without_hard_links(exp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = start(exp)
    save(first, LATEST, 10)
    second = lose(first, exp)
    assert second.token == 2
    for step in (20, 30):
        save(second, LATEST, step)
    second.close()
    torch.save(state(10) | {"token": 1}, exp / LATEST)
    assert saved(exp, LATEST) == (2, 30)
    first.close()
    start(exp).close()
    assert names(exp) == {"config.yaml", "jobs", LATEST, PREVIOUS}
    assert checkpoint.load(exp / LATEST)["step"] == 30


def test_a_damaged_kept_name_is_said_and_passed_over(exp: Path) -> None:
    checkpoint.save(exp, LATEST, state(10) | {"token": 1})
    (exp / kept_name(LATEST, 2)).write_bytes(b"x")
    resumed = checkpoint.find(exp)
    assert resumed is not None
    assert resumed.state["step"] == 10
    assert any(kept_name(LATEST, 2) in message for message in resumed.messages)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
@pytest.mark.parametrize(
    "name", [LATEST, BEST, PREVIOUS, "log.txt", "config.yaml", "jobs/lock.json", "events/scalars.jsonl"]
)
def test_what_is_no_file_is_refused_at_the_start(name: str, kind: str, exp: Path) -> None:
    (exp / name).unlink(missing_ok=True)
    (exp / name).parent.mkdir(exist_ok=True)
    put_something_odd(exp / name, kind)
    what = {"fifo": "named pipe"}.get(kind, kind)
    with pytest.raises(UserError, match=rf"{re.escape(name)}: a {what} is where a file should be"):
        RunDir.open(exp)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
@pytest.mark.parametrize("name", [LATEST, PREVIOUS, BEST])
def test_a_save_does_not_open_or_replace_what_is_no_file(name: str, kind: str, exp: Path) -> None:
    checkpoint.save(exp, LATEST, state(1))
    (exp / name).unlink(missing_ok=True)
    put_something_odd(exp / name, kind)
    before = os.lstat(exp / name).st_ino
    with pytest.raises(checkpoint.CheckpointError, match=r"could not be written \(.* is a .*, not a file"):
        checkpoint.save(exp, BEST if name == BEST else LATEST, state(2))
    assert os.lstat(exp / name).st_ino == before


def test_a_start_that_was_frozen_before_it_had_its_token_moves_nothing_away(
    exp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a token above its successor's, but the lock is no longer its own."""
    with start(exp) as earlier:
        save(earlier, LATEST, 10)
    enter, seconds = writers.StartToken.enter, []
    late = RunDir.open(exp)

    def frozen(folder: Path, me: run_lock.Holder, *, above: int) -> writers.StartToken:
        monkeypatch.setattr(writers.StartToken, "enter", enter)
        plant(exp, silent=1000)
        seconds.append(start(exp))
        save(seconds[0], LATEST, 60)
        return enter(folder, me, above=above)

    monkeypatch.setattr(writers.StartToken, "enter", frozen)
    with pytest.raises(UserError, match="another process has taken"):
        checkpoint.take_over(late, None, fresh=True)
    late.close()
    save(seconds[0], LATEST, 70)
    seconds[0].close()
    assert saved(exp, LATEST) == (2, 70)
    assert not (exp / "old").exists()
    assert not list((exp / "jobs").iterdir())


def test_two_containers_of_one_name_and_pid_share_no_temporary_file(tmp_path: Path, repo_root: Path) -> None:
    code = (
        "import os, socket; os.getpid = lambda: 7; socket.gethostname = lambda: 'trainer-0'\n"
        "from pathlib import Path; from utils import checkpoint_names as names\n"
        f"path = names.temporary_name(Path({str(tmp_path)!r}, names.LATEST)); path.touch(); print(path)"
    )
    environment = os.environ | {"PYTHONPATH": str(repo_root)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)
    temporaries = checkpoint_names.temporary_files(tmp_path)
    assert len(temporaries) == 2
    assert {(host, pid) for _, host, pid in temporaries} == {("trainer-0", "7")}


FROZEN = """
import sys
from pathlib import Path
from tests.utils.test_fencing import save, start
from utils.checkpoint import LATEST
with start(Path(sys.argv[1])) as run:
    for step in (10, 20):
        save(run, LATEST, step)
"""


def test_a_real_process_frozen_between_look_and_rename(exp: Path, repo_root: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(repo_root), "ZOETROPE_FAILPOINT": "checkpoint.checked:0:2:stop"}
    with subprocess.Popen(
        [sys.executable, "-c", FROZEN, str(exp)], env=environment, stderr=subprocess.PIPE, text=True
    ) as writer:
        _, status = os.waitpid(writer.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        plant(exp, silent=1000)  # its lock, as that of a silent machine
        with start(exp) as second:
            assert second.token == 2
            save(second, LATEST, 40)
        writer.send_signal(signal.SIGCONT)
        _, message = writer.communicate(timeout=60)
    assert writer.returncode == 1
    assert "UserError" in message
    assert "another process has taken this folder" in message
    assert saved(exp, LATEST) == (2, 40)
    assert not list((exp / "jobs").glob("writer-*"))


class Fault:
    """Makes the n-th of the calls below a folder fail, once; counts them all.

    Args:
        folder: paths below it count; a descriptor always does.
        names: functions of `os`, or "open" for Python's own.
        number: errno.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], n: int, number: int) -> None:
        self.folder, self.names, self.n, self.number = str(folder), names, n, number
        self.calls = 0

    def __enter__(self) -> Fault:
        self._patch = pytest.MonkeyPatch()
        for name in self.names:
            places: list[tuple[Any, str]] = [(io, "open"), (builtins, "open")] if name == "open" else [(os, name)]
            of_path = getattr(pathlib, "_normal_accessor", None)  # where Python 3.10 keeps what `Path` calls
            places += [(of_path, name)] if hasattr(of_path, name) else []
            for module, attribute in places:
                self._patch.setattr(module, attribute, self._failing(getattr(module, attribute)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _failing(self, function):
        def call(target, *arguments, **keywords):
            if isinstance(target, int) or os.fspath(target).startswith(self.folder):
                self.calls += 1
                if self.calls == self.n:
                    raise OSError(self.number, os.strerror(self.number), None if isinstance(target, int) else target)
            return function(target, *arguments, **keywords)

        return call


CALLS = (("open",), ("fsync", "write"), ("replace", "rename"), ("link",), ("mkdir",), ("unlink",), ("listdir", "stat"))


@pytest.mark.parametrize("names", CALLS, ids=lambda names: "-".join(names))
def test_any_call_of_a_start_or_a_save_may_fail(names: tuple[str, ...], tmp_path: Path) -> None:
    """With a predecessor that may wake up, which is the longest way. Nothing that was saved is lost.

    Four calls of each kind, drawn; every one with ``ZOETROPE_EVERY_CALL=1``.
    """
    seed = int(os.environ.get("ZOETROPE_SEED") or time.time_ns() % 1_000_000)
    total = one_fault(tmp_path / "counted", names, 0, errno.EIO)
    assert total > 0, "no call was made"
    every = range(1, total + 1)
    chosen = every if os.environ.get("ZOETROPE_EVERY_CALL") else random.Random(seed).sample(every, min(4, total))
    numbers = itertools.cycle((errno.EIO, errno.ENOSPC, errno.ESTALE))
    for n, number in zip(chosen, numbers, strict=False):
        try:
            one_fault(tmp_path / str(n), names, n, number)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, call {n}, errno {number}") from error


def one_fault(exp: Path, names: tuple[str, ...], n: int, number: int) -> int:
    """Let the n-th call fail in a successor's start or saves, then start once more; returns the calls there were."""
    exp.mkdir()
    (exp / "config.yaml").write_text("common:\n")
    first = start(exp)
    save(first, LATEST, 10)
    hand_over(first, exp)
    done, run, failure = 10, None, None
    with Fault(exp, names, n, number) as fault:
        try:
            run = start(exp)
            for step in (20, 30):
                save(run, LATEST, step)
                done = step
                save(run, BEST, step)
        except (UserError, OSError) as error:
            failure = error
        if run is not None:
            run.close()
    assert failure is None or errors.run_cli(functools.partial(raising, failure)) == 2
    first.close()
    (exp / "jobs/lock.json").unlink(missing_ok=True)  # the failed process is dead by now
    with start(exp) as after:
        resumed = checkpoint.find(exp)
        assert resumed is not None
        assert resumed.state["step"] >= done
        save(after, LATEST, 40)
    assert saved(exp, LATEST)[1] == 40
    left = [path.name for path in exp.rglob("*") if ".tmp" in path.name]
    assert len(left) <= ("unlink" in names), left
    return fault.calls


def raising(error: Exception) -> int:
    """Raise what an action raised."""
    raise error
