"""Manage the experiment folder of a running process: lock, old run, code revision. Needs no torch."""

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
from utils.errors import UserError, fail_point, refuse_odd_file

# What a training run leaves in its folder, in the order in which --fresh moves it. The latest checkpoint goes last, so
# that a process killed in between leaves either the old run or none. In jobs/ only the reports on bad samples move: the
# rest is our lock and the scheduler's output.
_BAD_SAMPLES = ("jobs/bad_samples.json", "jobs/bad_samples.jsonl")
_CHECKPOINTS = (BEST, PREVIOUS, LATEST)
_OF_A_RUN = ("report", "results", "events", "log.txt", *_BAD_SAMPLES)
_FILES = ("config.yaml", "log.txt", "events/scalars.jsonl", "jobs/lock.json", *_BAD_SAMPLES, *_CHECKPOINTS)

Stamp = tuple[int, ...]  # identifies one version of a file, see `_stamp`

REVISION_FILE = "REVISION"  # in the copy of the code that a job runs; launch/snapshot.py writes it


class RunDir:
    """One experiment folder.

    Args:
        exp: the folder; it holds config.yaml and may be anywhere.
        kind: "train": one live run per folder. Any other ("eval-<result name>"): one live run of that kind.
    """

    def __init__(self, exp: Path, kind: str = "train") -> None:
        self.exp = Path(exp)
        if kind in ("", ".", "..") or "/" in kind or not kind.isprintable():
            raise UserError(f"{kind!r} cannot be part of a file name; choose a name of letters, digits, - and _")
        self._lock_file = self.exp / "jobs" / ("lock.json" if kind == "train" else f"lock-{kind}.json")
        self._held: run_lock.Held | None = None
        self._writer: writers.StartToken | None = None
        self._latest: Stamp | None = None  # the latest checkpoint when this process last looked or wrote

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
        """Take the lock; its heartbeat runs until `close`. Raises the errors of `open`."""
        for name in _FILES if self._lock_file.name == "lock.json" else ("config.yaml",):
            refuse_odd_file(self.exp / name)

        if not (self.exp / "config.yaml").is_file():
            raise UserError(
                f"{self.exp}: no config.yaml here; name an experiment folder "
                f"(`python main.py new {self.exp} --from EXP` makes one)"
            )

        with self._writing():
            # Only a training run writes and renames checkpoints.
            if self._lock_file.name == "lock.json":
                _require_writable(self.exp)
            self._lock_file.parent.mkdir(exist_ok=True)
            self._held = run_lock.take(self._lock_file)

        # From here on a changed checkpoint means that another process was here.
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

        From here on an earlier start that wakes up finds a higher token before it renames anything, or its temporary
        file is gone.

        Args:
            above: the highest token among the checkpoints that were found.

        Raises:
            UserError: the folder cannot be written, or another process has taken it.
        """
        assert self._held is not None, "between lock and close"
        self.look(before_writing=True)

        # Tokens only grow: higher than any in a checkpoint, a kept name or an earlier start.
        kept = [checkpoint_names.split_name(path.name)[1] for path in checkpoint_names.kept(self.exp)]
        with self._writing():
            self._writer = writers.StartToken.enter(
                self._lock_file.parent, self._held.holder, above=max([above, *kept])
            )
            self._held.on_beat = self._writer.beat

        try:
            self.look(before_writing=True)  # the process may have been frozen before it got the token
        except UserError:
            self._writer.leave()
            raise

        fail_point("run_dir.entered")
        # Earlier starts can no longer rename what is removed here.
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
        """Whether an earlier start of this run may still wake up: then this one keeps second names."""
        return self._writer is not None and self._writer.has_predecessor()

    def settle(self) -> None:
        """Undo what an earlier start may have renamed when it woke up. Does nothing once the folder is lost."""
        if self._held is not None and self._writer is not None and self._is_ours():
            checkpoint_names.settle(self.exp, self.token, keep=self.has_predecessor)
            self._latest = self._latest_now()

    def look(self, *, before_writing: bool = False) -> None:
        """Check that this process still owns the folder, on any rank; without a lock it always does.

        A lock that was merely deleted is written again, unless the latest checkpoint shows another process at work.

        Args:
            before_writing: a lock that cannot be read is an error too, not a hiccup of the file system.

        Raises:
            UserError: another process has taken the folder, for example while this one was suspended for minutes.
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
                f"this one writes nothing more. Let that one continue, or stop it and start again ({self._lock_file})"
            )

    def _is_ours(self) -> bool:
        assert self._held is not None, "asked after `close`"
        # Two signs of another process: the lock is not ours, or a higher token exists.
        if not self._held.keep(put_back=self._latest_now() == self._latest):
            return False

        later = [path for path in checkpoint_names.kept(self.exp)[:1] if self._writer is not None]
        if any(checkpoint_names.split_name(path.name)[1] > self.token for path in later):
            return False
        return self._writer is None or self._writer.keep()

    @contextlib.contextmanager
    def saving(self, name: str = LATEST) -> Iterator[Callable[[Path], None]]:
        """Write the checkpoint `name` within this context, which begins and ends only if the folder is still ours.

        Yields:
            A function to call with the finished temporary file right before it is renamed; it raises what `look`
            raises.

        Raises:
            UserError: as `look`, even if that is why the block failed.
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
            self.look()  # a lost folder explains the failure better than the file system's error does
            raise

        # Not the file that has the name now: it may be the work of another process that came in between.
        if name == LATEST:
            self._latest = written[-1] if written else self._latest_now()
        self.look()
        with contextlib.suppress(OSError):  # the kept names stay until it succeeds
            self.settle()

    def _latest_now(self) -> Stamp | None:
        try:
            return _stamp(os.lstat(self.exp / LATEST))
        except OSError:
            return None

    def path(self, name: str) -> Path:
        """Return the path of a file of the run."""
        return self.exp / name

    def move_to_old(self, *, everything: bool = True) -> Path | None:
        """Move the files of an earlier run to ``old/<UTC time>/``; return that folder, or None if there were none.

        Args:
            everything: False: only the reports on bad samples. A run that starts without any checkpoint has met none
                yet.
        """
        kept = [path.name for path in checkpoint_names.kept(self.exp)]
        names = (*_OF_A_RUN, *kept, *_CHECKPOINTS) if everything else _BAD_SAMPLES
        left = [name for name in names if os.path.lexists(self.exp / name)]
        if not left:
            return None

        # Two moves within a second get a number.
        name = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        target, number = self.exp / "old" / name, 1
        while target.exists():
            number += 1
            target = self.exp / "old" / f"{name}-{number}"

        try:
            target.mkdir(parents=True)
            for name in left:
                self.look(before_writing=True)  # each rename could take a file of a process that came in between
                (target / name).parent.mkdir(exist_ok=True)
                (self.exp / name).rename(target / name)
            self._latest = self._latest_now()
        except OSError as error:
            raise UserError(
                f"{self.exp}: the old run cannot be moved to {target} ({error.strerror or error})"
            ) from error

        return target

    def close(self) -> None:
        """Release token and lock, if they are held."""
        if self._held is None:
            return

        with contextlib.suppress(OSError, UserError):
            self.settle()

        # The token goes before the lock: the next holder of the lock finds no live predecessor.
        if self._writer is not None:
            self._writer.leave()
        self._held.release()
        self._held = self._writer = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_writable(folder: Path) -> None:
    """Raise the error that the first checkpoint would meet hours later in another user's folder."""
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    status, me = folder.stat(), os.geteuid()
    if not status.st_mode & stat.S_ISVTX or me in (0, status.st_uid):
        return
    # In a sticky folder, such as /tmp, only the owner of a file may rename or replace it.
    for name in _CHECKPOINTS:
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(folder / name).st_uid != me:
                why = "another user's, and the folder is sticky: chmod -t it"
                raise PermissionError(errno.EPERM, why, str(folder / name))


def _stamp(status: os.stat_result) -> Stamp:
    """Return what identifies a file, to recognise another one that later has its name."""
    return status.st_ino, status.st_mtime_ns, status.st_size


def revision(root: Path | None = None) -> str:
    """Return the git revision, such as ``1a2b3c4d5e6f+dirty``; ``unknown`` if the code is not a repository itself.

    Args:
        root: the folder of main.py; default: this code's.
    """
    root = (root or Path(__file__).parents[1]).resolve()
    if (root / REVISION_FILE).is_file():
        return (root / REVISION_FILE).read_text(encoding="utf-8").strip()

    # A copy unpacked inside another repository does not have that repository's revision.
    top, short = git(root, "rev-parse", "--show-toplevel"), git(root, "rev-parse", "--short=12", "--verify", "HEAD")
    changes = git(root, "status", "--porcelain", "--untracked-files=no")

    if not top or not short or changes is None or Path(os.fsdecode(top.rstrip(b"\n"))).resolve() != root:
        return "unknown"
    return short.decode().strip() + ("+dirty" if changes else "")


def git(root: Path, *arguments: str) -> bytes | None:
    """Return git's output about the repository at `root`; None if git fails."""
    # Within a git hook GIT_DIR names the repository of the hook.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, check=True, timeout=120, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
