"""A lock file that one live process holds, and that a dead one cannot hold. Needs no torch; no trust in flock on NFS.

The lock appears under its name complete, by a hard link, which only one process can make. A lock whose holder is dead
is replaced by the process that holds the *claim* to it: a lock of the same kind whose name carries the dead lock's
token, so that the right to replace one particular holder is given once. Renaming the dead lock away instead would let a
slow process move the lock of a quick one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from utils import files, processes, schedulers
from utils.faults import UserError, fail_point, refuse_odd_file

HEARTBEAT_SECONDS = 30.0
DEAD_SECONDS = 300.0  # a heartbeat older than this counts as dead where nothing better can be known


@dataclass(frozen=True)
class Holder:
    """Who wrote a lock: enough to find out later whether that process still lives."""

    token: str
    host: str = "?"
    machine: str = ""  # boot and pid namespace: a pid means the same process only where this is equal
    pid: int = 0
    ticks: int = 0  # the process's start in clock ticks since boot
    since: str = "?"
    job: str = ""
    restarts: str = ""  # how often the scheduler had started the job again
    scheduler: str = "slurm"  # older locks have no other


class Held:
    """A lock that this process holds."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder = path, holder
        self.on_beat: Callable[[], object] = lambda: None  # called with every heartbeat, from its thread
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start_heartbeat(self, seconds: float | None = None) -> None:
        """Touch the lock every `seconds` from a daemon thread until `release`."""
        wait = HEARTBEAT_SECONDS if seconds is None else seconds
        self._thread = threading.Thread(target=self._beat, args=(wait,), name="lock heartbeat", daemon=True)
        self._thread.start()

    def _beat(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            with contextlib.suppress(OSError, UserError):  # a hiccup of the file system; the next beat tries again
                if _token_of(self.path) == self.holder.token:
                    os.utime(self.path)
                    self.on_beat()

    def keep(self, *, put_back: bool) -> bool:
        """Is the lock ours? Asked of the file itself, not of the heartbeat's memory.

        Args:
            put_back: one that was removed and that nobody has now is made anew.

        Raises:
            OSError: the file cannot be read, or put back.
        """
        if put_back and _token_of(self.path) is None:
            self.path.parent.mkdir(exist_ok=True)
            with record_of(self.path, self.holder) as (record, _):
                create(record, self.path)  # or not: somebody else was quicker
        return _token_of(self.path) == self.holder.token

    def release(self) -> None:
        """Stop the heartbeat and remove the lock, if it is still ours."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError, UserError):
            if _token_of(self.path) == self.holder.token:
                self.path.unlink()


def take(path: Path) -> Held:
    """Take the lock `path`; of any number of processes that try at once exactly one succeeds.

    Raises:
        UserError: a live process holds it.
        OSError: the folder cannot be written.
    """
    files.remove_old([*path.parent.glob(f"{path.name}.claim-*"), *path.parent.glob(f"{path.name}.*.tmp")])
    me = this_process()
    _acquire(path, path, me)
    return Held(path, me)


def _acquire(path: Path, lock: Path, me: Holder) -> None:
    while True:
        with record_of(path, me) as (record, now):
            if create(record, path):
                return
            try:
                holder, touched = read(path), path.stat().st_mtime
            except FileNotFoundError:  # given back meanwhile
                continue
            if _is_alive(holder, now - touched, me):
                raise UserError(_in_use(lock, holder, now - touched))
            claim = lock.with_name(f"{lock.name}.claim-{holder.token}")
            _acquire(claim, lock, me)
            fail_point("run_dir.claimed")
            try:
                # Before our claim began another holder of it may have replaced the lock, and then let go of the claim.
                if _token_of(path) == holder.token:
                    os.replace(record, path)
                    return
            finally:
                claim.unlink()


@contextlib.contextmanager
def record_of(path: Path, me: Holder) -> Iterator[tuple[Path, float]]:
    """Write a file of our own with our record; gives it, and the time of the file server's clock."""
    record = path.with_name(f"{path.name[:64]}.{uuid.uuid4().hex}.tmp")
    record.write_text(json.dumps(asdict(me)) + "\n")
    try:
        yield record, record.stat().st_mtime
    finally:
        with contextlib.suppress(OSError):  # `take` removes it later: a lock that was taken is not given up for it
            record.unlink()


def create(record: Path, path: Path) -> bool:
    """Give the record the name `path` unless that exists; reports whether it did."""
    try:
        os.link(record, path)
    except FileExistsError:
        return False
    except (
        OSError
    ):  # a file system without hard links: created empty first, which readers take for a young unknown holder
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(record.read_bytes())
    return True


def read(path: Path) -> Holder:
    """Read the record of a lock; one that cannot be understood gets a token from its bytes and is judged by its age."""
    refuse_odd_file(path)
    data = path.read_bytes()
    try:
        holder = Holder(**json.loads(data))
        if re.fullmatch("[0-9a-f]{32}", holder.token):
            return holder
    except (ValueError, TypeError):
        pass
    return Holder(hashlib.sha256(data + str(path.stat().st_ino).encode()).hexdigest()[:32])


def living(path: Path) -> Holder | None:
    """Return the holder of a lock if its process lives; None without a lock. Changes nothing."""
    try:
        holder, silent = read(path), time.time() - path.stat().st_mtime
    except OSError:
        return None
    return holder if _is_alive(holder, silent, this_process()) else None


def _token_of(path: Path) -> str | None:
    try:
        return read(path).token
    except FileNotFoundError:
        return None


def _is_alive(holder: Holder, silent_seconds: float, me: Holder) -> bool:
    """By the process table on the same machine, else by the scheduler, else by the heartbeat."""
    known = _is_known_alive(holder, me)
    return silent_seconds < DEAD_SECONDS if known is None else known


def is_certainly_dead(holder: Holder, me: Holder) -> bool:
    """Report whether a process can never wake up again: a silent one may be frozen, or cut off from the file server."""
    return _is_known_alive(holder, me) is False


def _is_known_alive(holder: Holder, me: Holder) -> bool | None:
    """What the process table or the scheduler says; None if neither can be asked."""
    if holder.pid and holder.machine and holder.machine == me.machine:
        return processes.lives(holder.pid, holder.ticks)
    if holder.job and (holder.scheduler, holder.job) == (me.scheduler, me.job) and holder.restarts != me.restarts:
        return False  # an earlier start of this very job, requeued since
    if not holder.job or holder.scheduler not in schedulers.names():
        return None
    return schedulers.named(holder.scheduler).is_alive(holder.job)


def _in_use(lock: Path, holder: Holder, silent_seconds: float) -> str:
    job = f", job {holder.job}" if holder.job else ""
    return (
        f"{lock.parent.parent}: in use by process {holder.pid or '?'} on {holder.host}{job} since {holder.since} "
        f"(last sign of life {max(silent_seconds, 0):.0f} s ago); wait for it or stop it. "
        f"If you are sure that it is dead, remove {lock}"
    )


def this_process() -> Holder:
    """Describe this process, with a token that no other has."""
    since = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    pid, place = os.getpid(), schedulers.here()
    about = {"scheduler": place.scheduler, "job": place.job, "restarts": str(place.restarts)} if place else {}
    ticks = processes.start_ticks(pid)
    return Holder(uuid.uuid4().hex, socket.gethostname(), processes.machine(), pid, ticks, since, **about)
