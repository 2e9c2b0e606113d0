"""The experiment folder while a process works in it: the lock, the old run, the code's revision. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from utils import checkpoint_names, run_lock, writers
from utils.checkpoint_names import BEST, LATEST, PREVIOUS
from utils.faults import UserError, fail_point, refuse_odd_file

# What a training run leaves in its folder, in the order --fresh moves it: the latest checkpoint goes last, so that a
# process killed in between leaves either the old run or none. Of jobs/ only what is told of bad samples: the rest is
# our own lock and scheduler output.
_BAD_SAMPLES = ("jobs/bad_samples.json", "jobs/bad_samples.jsonl")
_CHECKPOINTS = (BEST, PREVIOUS, LATEST)
_OF_A_RUN = ("report", "results", "events", "log.txt", *_BAD_SAMPLES)
_FILES = ("config.yaml", "log.txt", "events/scalars.jsonl", "jobs/lock.json", *_BAD_SAMPLES, *_CHECKPOINTS)

Stamp = tuple[int, ...]

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
        self._writer: writers.Writer | None = None
        self._latest: Stamp | None = None  # the latest checkpoint when we last looked or wrote

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
        for name in _FILES if self._lock_file.name == "lock.json" else ("config.yaml",):
            refuse_odd_file(self.exp / name)
        if not (self.exp / "config.yaml").is_file():
            raise UserError(
                f"{self.exp}: no config.yaml here; name an experiment folder "
                f"(`python main.py new {self.exp} --from EXP` makes one)"
            )
        with self._writing():
            if self._lock_file.name == "lock.json":
                _require_writable(self.exp)
            self._lock_file.parent.mkdir(exist_ok=True)
            self._held = run_lock.take(self._lock_file)
        self._latest = self._latest_now()
        fail_point("run_dir.locked")
        self._held.start_heartbeat()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{error.filename or self.exp}: cannot be written ({error.strerror or error})") from error

    def enter(self, *, above: int = 0) -> None:
        """Take the token of this start, between `lock` and the first checkpoint; see docs/cluster.md.

        From here on every earlier start that wakes up finds a higher token before it renames anything, or finds its
        temporary file gone.

        Args:
            above: the highest token among the checkpoints that were found.

        Raises:
            UserError: the folder cannot be written, or is no longer ours.
        """
        assert self._held is not None, "between lock and close"
        self.look(before_writing=True)
        kept = [checkpoint_names.split_name(path.name)[1] for path in checkpoint_names.kept(self.exp)]
        with self._writing():
            self._writer = writers.Writer.enter(self._lock_file.parent, self._held.holder, above=max([above, *kept]))
            self._held.on_beat = self._writer.beat
        try:
            self.look(before_writing=True)  # we may have been frozen before the token was ours
        except UserError:
            self._writer.leave()
            raise
        fail_point("run_dir.entered")
        with self._writing():
            checkpoint_names.remove_temporary_files(self.exp)
            for left in self._lock_file.parent.glob("bad_samples.json.*.tmp"):
                left.unlink(missing_ok=True)
        self._latest = self._latest_now()

    @property
    def token(self) -> int:
        """The token of this start, as its checkpoints carry it; 0 before `enter` and on ranks that do not write."""
        return self._writer.token if self._writer else 0

    @property
    def has_predecessor(self) -> bool:
        """Whether an earlier start of this run may still wake up: then this one keeps names of its own."""
        return self._writer is not None and self._writer.has_predecessor()

    def settle(self) -> None:
        """Put right what an earlier start may have renamed when it woke up. Does nothing once the folder is lost."""
        if self._held is not None and self._writer is not None and self._is_ours():
            checkpoint_names.settle(self.exp, self.token, keep=self.has_predecessor)
            self._latest = self._latest_now()

    def look(self, *, before_writing: bool = False) -> None:
        """Check that the folder is still ours. Any rank may ask; where this process holds no lock it always is.

        A lock that was merely removed is put back, unless the latest checkpoint shows that somebody else was here.

        Args:
            before_writing: a lock that cannot be read is an error too, not a hiccup of the file system.

        Raises:
            UserError: another process has taken the folder, as it may when we were suspended for minutes.
        """
        if self._held is None:
            return
        try:
            ours = self._is_ours()
        except OSError as error:
            if not before_writing:
                return
            raise UserError(
                f"{self._lock_file}: the run's lock cannot be read ({error.strerror or error}); nothing was written"
            ) from error
        if not ours:
            raise UserError(
                f"{self.exp}: another process has taken this folder while this one was silent or its lock was gone; "
                f"this one writes nothing more. Let that one go on, or stop it and start again ({self._lock_file})"
            )

    def _is_ours(self) -> bool:
        assert self._held is not None, "asked after `close`"
        if not self._held.keep(put_back=self._latest_now() == self._latest):
            return False
        later = [path for path in checkpoint_names.kept(self.exp)[:1] if self._writer is not None]
        if any(checkpoint_names.split_name(path.name)[1] > self.token for path in later):
            return False
        return self._writer is None or self._writer.keep()

    @contextlib.contextmanager
    def saving(self, name: str = LATEST) -> Iterator[Callable[[Path], None]]:
        """Write the checkpoint `name` within this: it begins and ends only if the folder is still ours.

        Yields:
            What to call with the finished temporary file right before it is renamed; errors as `look`.

        Raises:
            UserError: as `look`, also when that is the reason why the block failed.
        """
        assert self._held is not None, "between lock and close"
        self.look(before_writing=True)
        written: list[Stamp] = []

        def check(tmp: Path) -> None:
            self.look(before_writing=True)
            written.append(_stamp(os.stat(tmp)))

        try:
            yield check
        except UserError:
            self.look()
            raise
        if name == LATEST:  # not what stands there now: that may be the work of a process that came meanwhile
            self._latest = written[-1] if written else self._latest_now()
        self.look()
        with contextlib.suppress(OSError):  # the kept names stay until it can be done
            self.settle()

    def _latest_now(self) -> Stamp | None:
        try:
            return _stamp(os.lstat(self.exp / LATEST))
        except OSError:
            return None

    def path(self, name: str) -> Path:
        """Where a file of the run stands."""
        return self.exp / name

    def move_to_old(self, *, everything: bool = True) -> Path | None:
        """Move what an earlier run left to ``old/<UTC time>/``; returns that folder, None if there was nothing.

        Args:
            everything: False: only what is told of bad samples. A run that starts where no checkpoint was ever saved
                has met none yet.
        """
        kept = [path.name for path in checkpoint_names.kept(self.exp)]
        names = (*_OF_A_RUN, *kept, *_CHECKPOINTS) if everything else _BAD_SAMPLES
        left = [name for name in names if os.path.lexists(self.exp / name)]
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
                self.look(before_writing=True)
                (target / name).parent.mkdir(exist_ok=True)
                (self.exp / name).rename(target / name)
            self._latest = self._latest_now()
        except OSError as error:
            raise UserError(
                f"{self.exp}: the old run cannot be moved to {target} ({error.strerror or error})"
            ) from error
        return target

    def close(self) -> None:
        """Give token and lock back, if they are held."""
        if self._held is None:
            return
        with contextlib.suppress(OSError, UserError):
            self.settle()
        if self._writer is not None:
            self._writer.leave()
        self._held.release()
        self._held = self._writer = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_writable(folder: Path) -> None:
    """Raise the OSError that the first checkpoint would meet, hours from now, in a folder of another user."""
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    status, me = folder.stat(), os.geteuid()
    if not status.st_mode & stat.S_ISVTX or me in (0, status.st_uid):
        return
    for name in _CHECKPOINTS:  # a sticky folder, such as one in /tmp: only the owner of a file may rename or replace it
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(folder / name).st_uid != me:
                why = "another user's, and the folder is sticky: chmod -t it"
                raise PermissionError(errno.EPERM, why, str(folder / name))


def _stamp(status: os.stat_result) -> Stamp:
    """What tells a file from another that later has its name."""
    return status.st_ino, status.st_mtime_ns, status.st_size


def revision(root: Path | None = None) -> str:
    """The git revision of the code, such as ``1a2b3c4d5e6f+dirty``; ``unknown`` outside a repository of its own.

    Args:
        root: the folder that holds main.py; default: ours.
    """
    root = (root or Path(__file__).parents[1]).resolve()
    if (root / REVISION_FILE).is_file():
        return (root / REVISION_FILE).read_text(encoding="utf-8").strip()
    # A copy unpacked inside somebody else's repository has not that repository's revision.
    top, short = git(root, "rev-parse", "--show-toplevel"), git(root, "rev-parse", "--short=12", "--verify", "HEAD")
    changes = git(root, "status", "--porcelain", "--untracked-files=no")
    if not top or not short or changes is None or Path(os.fsdecode(top.rstrip(b"\n"))).resolve() != root:
        return "unknown"
    return short.decode().strip() + ("+dirty" if changes else "")


def git(root: Path, *arguments: str) -> bytes | None:
    """Return what git prints about the repository at `root`; None if it cannot."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, check=True, timeout=120, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
