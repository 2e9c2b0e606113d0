"""Lock a folder by a file that one live process holds. Needs no torch, and does not rely on flock on NFS.

The lock appears complete under its name, by a hard link, which only one process can create. A process replaces the lock
of a dead holder only while it holds the *claim* to it: a lock of the same kind whose name carries the dead lock's
token. So exactly one process may replace one particular holder. Renaming the dead lock away instead would let a slow
process move the lock of a quick one.
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
from utils.errors import UserError, fail_point, refuse_odd_file

HEARTBEAT_SECONDS = 30.0
DEAD_SECONDS = 300.0  # without other evidence, a holder whose heartbeat is older counts as dead


@dataclass(frozen=True)
class Holder:
    """The writer of a lock: enough to find out later whether that process still runs."""

    token: str
    host: str = "?"
    machine: str = ""  # boot and pid namespace: a pid means the same process only if this is equal
    pid: int = 0
    ticks: int = 0  # the process's start in clock ticks since boot
    since: str = "?"
    job: str = ""
    restarts: str = ""  # how often the scheduler had requeued the job
    scheduler: str = "slurm"  # older locks do not name one


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
        """Return True if the lock is still ours, by the file itself, not by the heartbeat's memory.

        Args:
            put_back: recreate the lock file if it was deleted and no other process holds it.

        Raises:
            OSError: the file cannot be read or recreated.
        """
        if put_back and _token_of(self.path) is None:
            self.path.parent.mkdir(exist_ok=True)
            with record_of(self.path, self.holder) as (record, _):
                create(record, self.path)  # it may fail: then another process was quicker, and the line below finds it

        return _token_of(self.path) == self.holder.token

    def release(self) -> None:
        """Stop the heartbeat and remove the lock if it is still ours."""
        self._stop.set()
        if self._thread is not None:
            # Join first: a beat in progress would touch a lock that another process may take next.
            self._thread.join()
        with contextlib.suppress(OSError, UserError):
            if _token_of(self.path) == self.holder.token:
                self.path.unlink()


def take(path: Path) -> Held:
    """Take the lock `path`; of several processes that try at once exactly one succeeds.

    Raises:
        UserError: a live process holds it.
        OSError: the folder cannot be written.
    """
    # Left by processes that were killed; live ones hold theirs for moments only.
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
            except FileNotFoundError:  # released in the meantime
                continue

            # Ages by the file server's clock: `now` is the time of a file that was written just now.
            if _is_alive(holder, now - touched, me):
                raise UserError(_in_use(lock, holder, now - touched))

            # The holder is dead. Take the claim to it, which is a lock like this one.
            claim = lock.with_name(f"{lock.name}.claim-{holder.token}")
            _acquire(claim, lock, me)
            fail_point("run_dir.claimed")

            try:
                # Another process may have replaced the lock before our claim began, and then dropped its claim.
                if _token_of(path) == holder.token:
                    os.replace(record, path)
                    return
            finally:
                claim.unlink()


@contextlib.contextmanager
def record_of(path: Path, me: Holder) -> Iterator[tuple[Path, float]]:
    """Write our record to a temporary file; yield the file, and the time by the file server's clock."""
    record = path.with_name(f"{path.name[:64]}.{uuid.uuid4().hex}.tmp")
    record.write_text(json.dumps(asdict(me)) + "\n")

    try:
        yield record, record.stat().st_mtime
    finally:
        with contextlib.suppress(OSError):  # `take` removes it later; the lock is worth more than a leftover file
            record.unlink()


def create(record: Path, path: Path) -> bool:
    """Give the record the name `path` unless that exists; return True on success."""
    try:
        os.link(record, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links. The file is empty at first, and readers take it for a young unknown holder.
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(record.read_bytes())
    return True


def read(path: Path) -> Holder:
    """Read a lock's record. One that cannot be parsed gets a token from its bytes, and only its age counts."""
    refuse_odd_file(path)
    data = path.read_bytes()

    try:
        holder = Holder(**json.loads(data))
        # A token becomes part of a file name.
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
    """Decide by the process table on the same machine, else by the scheduler, else by the heartbeat."""
    known = _is_known_alive(holder, me)
    return silent_seconds < DEAD_SECONDS if known is None else known


def is_certainly_dead(holder: Holder, me: Holder) -> bool:
    """Return True if a process can never wake up again; a silent one may be frozen or cut off from the file server."""
    return _is_known_alive(holder, me) is False


def _is_known_alive(holder: Holder, me: Holder) -> bool | None:
    """Return what the process table or the scheduler reports; None if neither applies."""
    if holder.pid and holder.machine and holder.machine == me.machine:
        return processes.lives(holder.pid, holder.ticks)

    if holder.job and (holder.scheduler, holder.job) == (me.scheduler, me.job) and holder.restarts != me.restarts:
        return False  # an earlier start of this very job, which has been requeued since

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
    """Return the record of this process, with a unique token."""
    since = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    pid, place = os.getpid(), schedulers.here()
    about = {"scheduler": place.scheduler, "job": place.job, "restarts": str(place.restarts)} if place else {}
    ticks = processes.start_ticks(pid)
    return Holder(uuid.uuid4().hex, socket.gethostname(), processes.machine(), pid, ticks, since, **about)
