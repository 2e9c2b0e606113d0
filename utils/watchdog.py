"""Report where a rank hangs, and end it: a thread in each rank follows what the rank is doing.

A rank whose phase takes longer than `watchdog_minutes` leaves `jobs/hang-<time>-rank<r>.txt` (host, phase, iteration,
samples, the stacks of all threads), one line in log.txt and on stderr, and exit code 70, so that the scheduler acts.
When one rank is frozen, the *others* hang in a collective. So every rank writes a heartbeat to
`jobs/heartbeat-<kind>-<rank>`, and the reporting rank names ranks that are silent or behind. Heartbeats are files
because files work across nodes, and even when rank 0, which would hold the rendezvous store, is frozen. Needs no torch.

Time during which the whole process was suspended (SIGSTOP and SIGCONT, a gang scheduler) does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import glob
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, TypeVar

from utils import errors

EXIT_HUNG = 70  # exit code of a rank that its watchdog ended; after a restart it resumes from the last checkpoint
_RECORD_BYTES = 2048  # of a heartbeat: a fixed length, so that a reader never sees a partial record
_NAMED = 8  # samples and ranks named in one sentence
_REPORT_SECONDS = 30.0  # a hanging file system must not keep the process alive for longer

Item = TypeVar("Item")
Logits = TypeVar("Logits")


class _Now(NamedTuple):
    """The current work of this rank; replaced as a whole, so that the threads need no lock."""

    phase: str
    step: int | None
    since: float  # on the watchdog's clock
    phases: int  # so far: every rank does the same work, so a rank with a lower count is behind
    samples: Callable[[], Sequence[str]]


@dataclass(frozen=True)
class Heartbeat:
    """A rank's last heartbeat, as another rank reads it.

    Attributes:
        rank, host, pid: the process.
        phase, step: its work; step is None outside of training.
        count: number of phases since the start.
        seconds: how long it had been in the phase.
        samples: read or trained on in that phase, if it is long.
        silent: seconds since the heartbeat.
    """

    rank: int
    host: str
    pid: int
    phase: str
    step: int | None
    count: int
    seconds: float
    samples: tuple[str, ...]
    silent: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    @property
    def doing(self) -> str:
        """The phase in words."""
        return describe(self.phase, self.step)


def describe(phase: str, step: int | None) -> str:
    """Return a phase in words, such as `data of iteration 7`; `step` counts finished iterations."""
    return phase if step is None else f"{phase} of iteration {step + 1}"


class Watchdog:
    """Watches this rank from a thread inside a `with` statement; before and after, it only records phases.

    Args:
        folder: the experiment folder, on a file system that all ranks see.
        seconds: how long one phase may take.
        rank, ranks: this rank and their number.
        say: writes one line where the user reads it (log.txt).
        kind: the kind of run; two kinds may run in one folder at a time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seconds: float,
        rank: int = 0,
        ranks: int = 1,
        say: Callable[[str], None] = lambda text: None,
        kind: str = "train",
    ) -> None:
        self.folder, self.seconds, self.rank, self.ranks, self.say = Path(folder) / "jobs", seconds, rank, ranks, say
        self.kind = kind
        self.beat_seconds = min(20.0, max(0.1, seconds / 6))  # six beats fit into the limit
        self._stopped = 0.0  # seconds during which the whole process was suspended
        self._now = _Now("start", None, self._clock(), 0, tuple)
        self._end = threading.Event()
        self._hangs = False
        self._heartbeat = self.folder / f"heartbeat-{kind}-{rank}"

    def __enter__(self) -> Watchdog:
        """Start the threads."""
        self.folder.mkdir(exist_ok=True)
        if self.rank == 0:
            self._sweep()

        for target in (self._watch, self._beat):
            threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._hangs:  # another rank has ended and freed this one; it must still leave with the code of a hang
            time.sleep(2 * _REPORT_SECONDS)

        self._end.set()
        with contextlib.suppress(OSError):
            self._heartbeat.unlink(missing_ok=True)

    # ---------------------------------------------------------------- phases of the rank

    def phase(self, name: str, step: int | None = None, samples: Callable[[], Sequence[str]] = tuple) -> None:
        """Begin a new phase; `samples` is called for names only if the phase is long."""
        errors.fail_point(f"phase.{name}")
        self._enter(name, step, samples)

    def _enter(self, name: str, step: int | None, samples: Callable[[], Sequence[str]]) -> None:
        self._now = _Now(name, step, self._clock(), self._now.phases + 1, samples)

    def progress(self) -> None:
        """Record that a part of the phase is done, and restart its time."""
        errors.fail_point(f"progress.{self._now.phase}")
        self._now = self._now._replace(since=self._clock())

    @contextlib.contextmanager
    def during(
        self, name: str, step: int | None = None, samples: Callable[[], Sequence[str]] = tuple
    ) -> Iterator[None]:
        """Run a phase inside another one, which continues afterwards."""
        before = self._now
        self.phase(name, step, samples)
        yield
        self._enter(before.phase, before.step, before.samples)

    def steps(
        self,
        items: Iterator[tuple[int, Item]],
        reading: Callable[[], Sequence[str]],
        names: Callable[[Item], Sequence[str]],
    ) -> Iterator[tuple[int, Item]]:
        """Yield the steps of a training loader; waiting for it is the phase `data`, the rest `forward/backward`.

        Args:
            items: (step, micro-batches).
            reading: returns the samples that are being read at this moment.
            names: returns the samples in the micro-batches.
        """
        step = self._now.step
        while True:
            self.phase("data", step, reading)
            try:
                step, batches = next(items)
            except StopIteration:
                return

            # `batches` is bound now: the lambda may be called when the loop is already at the next step.
            self.phase("forward/backward", step, lambda batches=batches: names(batches))
            yield step, batches
            step += 1

    def passing(self, keep: Callable[[Item, Logits], None] | None = None) -> Callable[[Item, Logits], None]:
        """Return `keep` for `evaluate`, so that every scored video counts as progress."""

        def kept(item: Item, logits: Logits) -> None:
            self.progress()
            if keep is not None:
                keep(item, logits)

        return kept

    # ---------------------------------------------------------------- the threads

    def _clock(self) -> float:
        return time.monotonic() - self._stopped

    def _watch(self) -> None:
        """Check the time of the phase. No file access while all is well: it could hang like the rank itself."""
        wait = min(1.0, self.seconds / 10)
        before = time.monotonic()

        while not self._end.wait(wait):
            gap = time.monotonic() - before
            before += gap
            if gap > 5 * wait + 2:  # the process was suspended, so it did not hang
                self._stopped += gap

            now = self._now
            if self._clock() - now.since > self.seconds - wait:  # `wait` early: report before the limit, not after it
                self._end_process(now, self._clock() - now.since)

    def _beat(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # a hiccup of the file system; the next beat tries again
                self._write()
            if self._end.wait(self.beat_seconds):
                with contextlib.suppress(OSError):
                    self._heartbeat.unlink(missing_ok=True)
                return

    def _write(self) -> None:
        """Write one record in place: NFS fetches new bytes when a file is opened, but may cache the list of names."""
        now = self._now
        seconds = self._clock() - now.since
        samples = self._names(now)[:_NAMED] if seconds > 2 * self.beat_seconds else []

        record = {"host": socket.gethostname(), "pid": os.getpid(), "phase": now.phase, "step": now.step}
        record |= {"count": now.phases, "seconds": round(seconds, 1), "samples": samples}
        while len(text := json.dumps(record)) > _RECORD_BYTES and record["samples"]:
            record["samples"] = record["samples"][:-1]

        handle = os.open(self._heartbeat, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            # Padded with spaces, which JSON ignores.
            os.pwrite(handle, text.encode("ascii").ljust(_RECORD_BYTES), 0)
        finally:
            os.close(handle)

    def _sweep(self) -> None:
        """Remove heartbeats of ranks that this run does not have, left by an earlier run that was killed."""
        for path in self.folder.glob(f"heartbeat-{glob.escape(self.kind)}-*"):
            number = path.name.rpartition("-")[2]
            if number.isdigit() and int(number) >= self.ranks:
                path.unlink(missing_ok=True)

    @staticmethod
    def _names(now: _Now) -> list[str]:
        try:
            return list(now.samples())
        except Exception as error:  # noqa: BLE001  the loader may be changing its tables at this moment
            return [f"(samples unknown: {type(error).__name__})"]

    # ---------------------------------------------------------------- when it hangs

    def who(self, rank: int) -> str:
        """Return a rank in words, with its host if its heartbeat names it."""
        heartbeat = self._heartbeat_of(rank, 0.0)
        return f"rank {rank}" if heartbeat is None else str(heartbeat)

    def heartbeats(self) -> dict[int, Heartbeat | None]:
        """Return the last heartbeat of every other rank; None for a rank without one."""
        # Write first, to read the file server's clock: all records share it.
        with contextlib.suppress(OSError):
            self._write()
        try:
            mine = self._heartbeat.stat().st_mtime
        except OSError:
            mine = time.time()

        signs: dict[int, Heartbeat | None] = {}
        for rank in range(self.ranks):
            if rank != self.rank:
                signs[rank] = self._heartbeat_of(rank, mine)
        return signs

    def _heartbeat_of(self, rank: int, now: float) -> Heartbeat | None:
        try:
            with open(self.folder / f"heartbeat-{self.kind}-{rank}", encoding="ascii") as file:
                # The file may be missing or half written by a file server: then there is no sign.
                record = json.load(file)
                silent = now - os.fstat(file.fileno()).st_mtime
            record["samples"] = tuple(record["samples"])
            return Heartbeat(rank=rank, silent=silent, **record)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def suspects(self, now_count: int) -> list[str]:
        """Describe the ranks that the others wait for, a sentence each: silent ones, or else those behind this one."""
        silent, behind = [], []

        for rank, heartbeat in self.heartbeats().items():
            if heartbeat is None:
                silent.append(f"rank {rank} has left no sign of life")
            # Three missed heartbeats.
            elif heartbeat.silent > 3 * self.beat_seconds + 1:
                silent.append(f"{heartbeat} has been silent for {heartbeat.silent:.0f} s; it was in {heartbeat.doing}")
            elif heartbeat.count < now_count:
                names = f": {', '.join(heartbeat.samples)}" if heartbeat.samples else ""
                since = heartbeat.seconds + heartbeat.silent
                behind.append(f"{heartbeat} has been in {heartbeat.doing} for {since:.0f} s{names}")

        return silent or behind

    def _end_process(self, now: _Now, seconds: float) -> None:
        self._hangs = True
        # In a thread, since its files may hang like the rank.
        reporter = threading.Thread(target=self._report, args=(now, seconds), daemon=True)
        reporter.start()
        reporter.join(_REPORT_SECONDS)

        # The other ranks hang too: let them write their stacks before the loss of this rank ends them.
        time.sleep(min(5.0, self.seconds / 4))
        with contextlib.suppress(OSError):
            self._heartbeat.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            errors.leave_exit_code(EXIT_HUNG)
        os._exit(EXIT_HUNG)

    def _report(self, now: _Now, seconds: float) -> None:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        name = f"hang-{stamp}-rank{self.rank}.txt"

        samples = self._names(now)
        shown = ", ".join(samples[:_NAMED]) + (", ..." if len(samples) > _NAMED else "")
        who = f"rank {self.rank} on {socket.gethostname()}"
        what = f"{who} hangs: {describe(now.phase, now.step)} has taken {seconds:.0f} s"

        # Name the samples only if no other rank explains the hang.
        suspects = self.suspects(now.phases)
        reason = "; ".join(suspects[:_NAMED])
        about = f" ({shown})" if shown and not suspects else ""
        line = f"{what}{about}. {'Waiting for: ' + reason + '. ' if reason else ''}Stacks: jobs/{name}"

        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)

        # The file system may hang: first the terminal, then the file with the stacks, last the log.
        with contextlib.suppress(OSError), open(self.folder / name, "w", encoding="utf-8") as file:
            rows = {"time": stamp, "host": socket.gethostname(), "process": os.getpid(), "rank": self.rank}
            rows |= {"phase": now.phase, "iteration": None if now.step is None else now.step + 1}
            rows |= {"seconds in this phase": round(seconds, 1), "limit": self.seconds}
            file.writelines(f"{key}: {value}\n" for key, value in rows.items())
            file.writelines(f"waiting for: {text}\n" for text in suspects)
            file.writelines(f"sample: {text}\n" for text in samples)
            file.write("\nstacks of all threads, the newest call first:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

        with contextlib.suppress(OSError):
            self.say(line)
