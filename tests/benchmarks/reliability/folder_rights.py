"""Row `folder_rights`: umasks, set-gid folders, read-only data, several users in one experiment.

Each case plays users with real user and group numbers and calls the real commands. It must work, or be refused with
one sentence and exit code 2, and then nothing in the folder has changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import main
from datasets.demo import verb as demo
from tests import users
from tests.experiment import few_videos, make
from tests.users import ANNE, BERT, CARL, GROUP, User
from utils import checkpoint, errors

Case = Callable[["Place"], list[str]]


class Place:
    """A folder for one case.

    Args:
        root: an empty folder that everybody may enter.
        data: videos that everybody may read.
        seed: of the experiments.
    """

    def __init__(self, root: Path, data: Path, seed: int) -> None:
        self.root, self.data, self.seed = root, data, seed
        self.output = root / "output"
        self.exp = make(root / "exp", data, steps=4, val_freq=2)
        self.words = ["--set", few_videos(self.exp, data), "--set", f"common.seed={seed}"]

    def give(self, owner: User, mode: int) -> None:
        """Give the experiment to a user and the common group; files keep their mode."""
        for path in (self.exp, *self.exp.iterdir()):
            os.chown(path, owner.uid, GROUP)
        self.exp.chmod(mode)

    def act(self, user: User, *argv: str, umask: int = 0o022, **environment: str) -> int:
        """Call a verb as a user; returns the exit code."""
        self.output.write_bytes(b"")
        return users.run(self.output, lambda: self._as(user, umask, argv), **environment)

    def _as(self, user: User, umask: int, argv: tuple[str, ...]) -> int:
        user.become(umask)
        os.chdir("/")
        return main.main([argv[0], str(self.exp), *argv[1:], *self.words])

    def start(self, user: User, *argv: str, umask: int, **environment: str) -> int:
        """The same without waiting; returns the pid."""
        return users.start(self.output, lambda: self._as(user, umask, argv), **environment)

    def state(self) -> dict[str, tuple[int, int]]:
        """Return (mode, time of the last change) of each file of the experiment."""
        statuses = {path.relative_to(self.exp): os.lstat(path) for path in self.exp.rglob("*") if not path.is_dir()}
        return {str(path): (status.st_mode, status.st_mtime_ns) for path, status in statuses.items()}

    def works(self, user: User, *argv: str, umask: int = 0o022, **environment: str) -> list[str]:
        """Check that a verb works for a user."""
        code = self.act(user, *argv, umask=umask, **environment)
        return [] if code == 0 else [f"{argv[0]} by {user.uid} left with {code}: {self.output.read_text()[-300:]}"]

    def refused(self, user: User, *argv: str, umask: int = 0o022, word: str) -> list[str]:
        """Check that a verb is refused with one sentence that holds `word`, and that nothing has changed."""
        before = self.state()
        code, output = self.act(user, *argv, umask=umask), self.output.read_text()
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        wrong = [] if code == 2 else [f"it left with {code}"]
        wrong += [] if len(errors) == 1 and word in errors[0] else [f"not one sentence with {word!r}"]
        wrong += ["a trace"] if "Traceback" in output else []
        wrong += ["the folder has changed"] if self.state() != before else []
        return [f"{argv[0]} by {user.uid}: {text} ({output[-300:]})" for text in wrong]

    def finished(self) -> list[str]:
        """Check that the run is finished and undamaged."""
        newest = checkpoint.find(self.exp)
        return [] if newest and newest.state["step"] == 4 else ["the run is not finished"]


def a_umask(umask: int) -> Case:
    """One user with this umask: everything works, and no file is open to more than the umask allows."""

    def case(place: Place) -> list[str]:
        place.give(ANNE, 0o700)
        wrong = place.works(ANNE, "train", umask=umask) + place.works(ANNE, "eval", umask=umask) + place.finished()
        for path in place.exp.rglob("*"):
            mine = os.lstat(path).st_uid == ANNE.uid and path.name not in ("config.yaml", "few.txt")
            if mine and stat.S_IMODE(os.lstat(path).st_mode) & umask:
                wrong.append(f"{path.name} has mode {oct(os.lstat(path).st_mode)}")
        return wrong

    return case


def shared(umask: int, mode: int, outcome: str | None) -> Case:
    """Anne is stopped after two iterations, Bert continues; outcome: a word of the refusal, None where it works."""

    def case(place: Place) -> list[str]:
        place.give(ANNE, mode)
        code = place.act(ANNE, "train", umask=umask, ZOETROPE_FAILPOINT="checkpoint.done:0:2:term")
        wrong = [] if code in (0, 75) else [f"Anne left with {code}: {place.output.read_text()[-300:]}"]
        if outcome is not None:
            return wrong + place.refused(BERT, "train", umask=umask, word=outcome)
        wrong += place.works(BERT, "train", umask=umask) + place.works(ANNE, "eval", umask=umask) + place.finished()
        if mode & stat.S_ISGID:
            other = [path.name for path in place.exp.rglob("*") if os.lstat(path).st_gid != GROUP]
            wrong += [f"of another group: {other}"] if other else []
        return wrong

    return case


def a_dead_lock_of_another_user(place: Place) -> list[str]:
    """Anne's run is killed; Bert takes the folder at once."""
    place.give(ANNE, 0o2775)
    code = place.act(ANNE, "train", umask=0o002, ZOETROPE_FAILPOINT="checkpoint.done:0:2:kill")
    wrong = [] if code == -signal.SIGKILL else [f"Anne left with {code}"]
    wrong += place.works(BERT, "train", umask=0o002) + place.finished()
    return wrong + [f"left: {path.name}" for path in (place.exp / "jobs").iterdir()]


def a_live_lock_of_another_user(umask: int, word: str) -> Case:
    """Anne's run is alive (and stands still); Bert is refused, and Anne's run ends well."""

    def case(place: Place) -> list[str]:
        place.give(ANNE, 0o2775)
        anne = place.start(ANNE, "train", umask=umask, ZOETROPE_FAILPOINT="checkpoint.done:0:2:stop")
        os.waitpid(anne, os.WUNTRACED)
        wrong = place.refused(BERT, "train", umask=umask, word=word)
        wrong += place.refused(BERT, "train", "--fresh", umask=umask, word=word)
        os.kill(anne, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(anne, 0)[1])
        return wrong + ([] if code == 0 else [f"Anne left with {code}"]) + place.finished()

    return case


def read_only_data(place: Place) -> list[str]:
    """The videos and lists belong to root and are read-only."""
    data = place.root / "data"
    shutil.copytree(place.data, data)
    for path in (data, *data.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    config = place.exp / "config.yaml"
    config.write_text(config.read_text().replace(str(place.data), str(data)))
    place.give(ANNE, 0o755)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    wrong = place.works(ANNE, "train") + place.works(ANNE, "eval") + place.finished()
    return wrong + (["it changed"] if before != {path: path.stat().st_mtime_ns for path in data.rglob("*")} else [])


def unreadable(name: str, *argv: str) -> Case:
    """A file that the user may not read."""

    def case(place: Place) -> list[str]:
        path = place.exp / name
        place.give(ANNE, 0o755)
        if name != "config.yaml":  # a whole run, of which this one file is not the user's
            assert place.act(ANNE, "train", ZOETROPE_FAILPOINT="checkpoint.done:0:2:term") in (0, 75)
        os.chown(path, 0, 0)
        path.chmod(0o600)
        return place.refused(ANNE, *argv, word="ermission denied")

    return case


def a_folder_of_another_user(*argv: str) -> Case:
    """A user of no common group looks into a finished experiment and may not write."""

    def case(place: Place) -> list[str]:
        place.give(ANNE, 0o755)
        wrong = place.works(ANNE, "train")
        return wrong + place.refused(CARL, *argv, word="cannot be written (Permission denied)")

    return case


def results_of_another_user(place: Place) -> list[str]:
    """`results/` belongs to somebody else: the evaluation is refused before it scores anything."""
    place.give(ANNE, 0o755)
    wrong = place.works(ANNE, "train")
    (place.exp / "results").mkdir(mode=0o755)
    return wrong + place.refused(ANNE, "eval", word="ermission denied")


def a_sticky_folder(place: Place) -> list[str]:
    """In a folder like /tmp Bert may not rename Anne's files away: he is refused before he trains."""
    place.give(ANNE, 0o3775)
    code = place.act(ANNE, "train", umask=0o002, ZOETROPE_FAILPOINT="checkpoint.done:0:2:term")
    wrong = [] if code in (0, 75) else [f"Anne left with {code}"]
    return wrong + place.refused(BERT, "train", umask=0o002, word="sticky")


CASES: dict[str, Case] = {
    "umask 077": a_umask(0o077),
    "umask 027": a_umask(0o027),
    "umask 002": a_umask(0o002),
    "set-gid folder, umask 002": shared(0o002, 0o2775, None),
    "group-writable folder, umask 002": shared(0o002, 0o775, "ermission denied"),
    "set-gid folder, umask 022": shared(0o022, 0o2775, "ermission denied"),
    "set-gid folder, umask 027": shared(0o027, 0o2770, "ermission denied"),
    "set-gid folder, umask 077": shared(0o077, 0o2770, "ermission denied"),
    "folder of the group, not writable": shared(0o002, 0o2755, "ermission denied"),
    "dead lock of another user": a_dead_lock_of_another_user,
    "live lock of another user": a_live_lock_of_another_user(0o002, "in use by process"),
    "live lock of another user that is not readable": a_live_lock_of_another_user(0o077, "ermission denied"),
    "read-only data": read_only_data,
    "config not readable": unreadable("config.yaml", "train"),
    "log.txt not readable": unreadable("log.txt", "train"),
    "checkpoint not readable, train": unreadable(checkpoint.LATEST, "train"),
    "previous checkpoint not readable, train": unreadable(checkpoint.PREVIOUS, "train"),
    "checkpoint not readable, eval": unreadable(checkpoint.BEST, "eval"),
    "folder of another user, train": a_folder_of_another_user("train"),
    "folder of another user, fresh": a_folder_of_another_user("train", "--fresh"),
    "folder of another user, eval": a_folder_of_another_user("eval"),
    "results of another user": results_of_another_user,
    "sticky folder": a_sticky_folder,
}


def row(names: list[str] | None = None) -> dict:
    """Play all cases; returns how many held."""
    reason = users.why_not()
    if reason:
        return {"measured": f"not measured: {reason}", "holds": False}
    torch.set_num_threads(1)
    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(1 << 20))
    root = Path(tempfile.mkdtemp(prefix="zoetrope-rights-"))
    root.chmod(0o755)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # here as well: a child without rights can import no more
            demo.main(["--out", str(root / "data"), "--train", "16", "--val", "8", "--workers", "1"])
            warm = Place(_folder(root / "warm"), root / "data", seed)
            for verb in ("train", "eval"):
                assert main.main([verb, str(warm.exp), *warm.words]) == 0
        with contextlib.suppress(errors.UserError):
            raise errors.UserError("warm")
        wrong = {}
        for number, name in enumerate(names or CASES):
            began = time.monotonic()
            wrong[name] = CASES[name](Place(_folder(root / f"case{number}"), root / "data", seed))
            print(f"{name}: {wrong[name] or 'holds'} ({time.monotonic() - began:.1f} s)", file=sys.stderr)
    finally:
        shutil.rmtree(root)
    bad = {name: what for name, what in wrong.items() if what}
    return {
        "seed": seed,
        "measured": {"held": len(wrong) - len(bad), "cases": len(wrong), "wrong": bad},
        "holds": not bad,
    }


def _folder(path: Path) -> Path:
    path.mkdir()
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    print(json.dumps(row()))
