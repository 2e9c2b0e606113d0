"""The experiment folder while a process works in it: the lock, the old run, the code's revision. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from utils import run_lock
from utils.faults import UserError, fail_point

# What a training run leaves in its folder, in the order --fresh moves it: the latest checkpoint goes last, so that a
# process killed in between leaves either the old run or none. Of jobs/ only what is told of bad samples: the rest is
# our own lock and scheduler output.
_BAD_SAMPLES = ("jobs/bad_samples.json", "jobs/bad_samples.jsonl")
_CHECKPOINTS = ("ckpt_best.pth.tar", "ckpt_prev.pth.tar", "ckpt.pth.tar")
_OF_A_RUN = ("report", "results", "events", "log.txt", *_BAD_SAMPLES, *_CHECKPOINTS)

REVISION_FILE = "REVISION"  # in the copy of the code that a job runs from; launch/snapshot.py writes it


class RunDir:
    """One experiment folder.

    Args:
        exp: the folder; it holds config.yaml and may stand anywhere.
        kind: "train": one live run per folder. Anything else ("eval-<result name>"): one live run of that kind.
    """

    def __init__(self, exp: Path, kind: str = "train") -> None:
        self.exp = Path(exp)
        if kind in ("", ".", "..") or "/" in kind or not kind.isprintable():
            raise UserError(f"{kind!r} cannot be part of a file name; choose a name of letters, digits, - and _")
        self._lock_file = self.exp / "jobs" / ("lock.json" if kind == "train" else f"lock-{kind}.json")
        self._held: run_lock.Held | None = None
        self._latest: tuple[int, ...] | None = None  # which file the latest checkpoint was when we last looked

    @classmethod
    def open(cls, exp: Path, kind: str = "train") -> RunDir:
        """Check the folder and take its lock.

        Raises:
            UserError: no config.yaml, not writable, or a live process holds the lock.
        """
        folder = cls(exp, kind)
        folder.lock()
        return folder

    def lock(self) -> None:
        """Take the lock; its heartbeat runs until `close`. Errors as `open`."""
        if not (self.exp / "config.yaml").is_file():
            raise UserError(
                f"{self.exp}: no config.yaml here; name an experiment folder "
                f"(`python main.py new {self.exp} --from EXP` makes one)"
            )
        try:
            self._lock_file.parent.mkdir(exist_ok=True)
            self._held = run_lock.take(self._lock_file)
        except OSError as error:
            raise UserError(f"{error.filename or self.exp}: cannot be written ({error.strerror or error})") from error
        self._latest = self._latest_now()
        fail_point("run_dir.locked")
        self._held.start_heartbeat()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Write checkpoints within this: it begins only if the folder is still ours.

        A lock that was merely removed is put back, unless the latest checkpoint shows that somebody else was here.

        Raises:
            UserError: another process has taken the folder, as it may when we were suspended for minutes.
        """
        assert self._held is not None, "between lock and close"
        try:
            ours = self._held.keep(put_back=self._latest_now() == self._latest)
        except OSError as error:
            raise UserError(
                f"{self._lock_file}: the run's lock cannot be read ({error.strerror or error}); nothing was written"
            ) from error
        if not ours:
            raise UserError(
                f"{self.exp}: another process has taken this folder while this one was silent or its lock was gone; "
                f"nothing was written. Let that one go on, or stop it and start again ({self._lock_file})"
            )
        yield
        self._latest = self._latest_now()

    def _latest_now(self) -> tuple[int, ...] | None:
        try:
            status = os.lstat(self.exp / _CHECKPOINTS[-1])
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def path(self, name: str) -> Path:
        """Where a file of the run stands."""
        return self.exp / name

    def move_to_old(self, *, everything: bool = True) -> Path | None:
        """Move what an earlier run left to ``old/<UTC time>/``; returns that folder, None if there was nothing.

        Args:
            everything: False: only what is told of bad samples. A run that starts where no checkpoint was ever saved
                has met none yet.
        """
        left = [name for name in (_OF_A_RUN if everything else _BAD_SAMPLES) if os.path.lexists(self.exp / name)]
        if not left:
            return None
        name = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        target, number = self.exp / "old" / name, 1
        while target.exists():
            number += 1
            target = self.exp / "old" / f"{name}-{number}"
        try:
            target.mkdir(parents=True)
            for name in left:
                (target / name).parent.mkdir(exist_ok=True)
                (self.exp / name).rename(target / name)
            self._latest = self._latest_now()
        except OSError as error:
            raise UserError(
                f"{self.exp}: the old run cannot be moved to {target} ({error.strerror or error})"
            ) from error
        return target

    def close(self) -> None:
        """Give the lock back, if it is held."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def revision(root: Path | None = None) -> str:
    """The git revision of the code, such as ``1a2b3c4d5e6f+dirty``; ``unknown`` outside a repository of its own.

    Args:
        root: the folder that holds main.py; default: ours.
    """
    root = (root or Path(__file__).parents[1]).resolve()
    if (root / REVISION_FILE).is_file():
        return (root / REVISION_FILE).read_text(encoding="utf-8").strip()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*arguments: str) -> list[str]:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=30, stdin=subprocess.DEVNULL
        ).stdout.splitlines()

    try:
        # A copy unpacked inside somebody else's repository has not that repository's revision.
        if [Path(line).resolve() for line in git("rev-parse", "--show-toplevel")] != [root]:
            return "unknown"
        (short,) = git("rev-parse", "--short=12", "--verify", "HEAD")
        return short + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"
