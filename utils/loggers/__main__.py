"""`python -m utils.loggers NAME EXP`: the process that sends the points of a run to one remote logger.

Standard input brings the metadata of the run and then points, one JSON object per line; its end is the end of the run.
A line on standard output is a remark for log.txt. `events/NAME.json` keeps the remote run and the last step of each
curve there, so that a restart continues the same run and sends no step twice.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from utils import files, log, redact
from utils.loggers import Point, Remote

QUEUE = 1000  # points
BATCH = 100  # points in one call
LOOK_SECONDS = 2.0  # between two looks at the input
END_SECONDS = 8.0  # time to send the last points after the run has ended
RETRY_SECONDS = 1.0, 60.0  # first and longest wait after a failure


class Sender:
    """Sends points to a remote run, and points that it missed from the run's own file.

    Args:
        name: of the logger.
        exp: experiment folder.
        metadata: of the run.
    """

    def __init__(self, name: str, exp: Path, metadata: dict[str, str | float]) -> None:
        self.name, self.exp, self.metadata = name, exp, metadata
        self.state = exp / "events" / f"{name}.json"
        self.remote: Remote | None = None
        self.run: str | None = None
        self.last: dict[str, int] = {}

        # Continue the remote run of an earlier start; an unreadable file means a new remote run
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads(self.state.read_text("utf-8"))
            self.run, self.last = saved["run"], {str(tag): int(step) for tag, step in dict(saved["last"]).items()}
        self.is_behind = True  # the file may hold points that an earlier start did not send
        self.is_down = False
        self._wait, self._next = RETRY_SECONDS[0], 0.0
        # `_settling` has the steps of the last write: they count as arrived once `settles` seconds have passed
        self._settling, self._since, self._written = dict(self.last), 0.0, ""

    def send(self, points: list[Point], *, now: bool = False) -> None:
        """Send points. After a failure, wait; points that come in that time are later sent from the file."""
        if time.monotonic() < self._next and not now:
            self.is_behind |= bool(points)
            return

        try:
            if self.remote is None:
                module = importlib.import_module(f"utils.loggers.{self.name}")
                remote: Remote = module.connect(self.exp, self.run, self.metadata)
                self.remote, self.run = remote, remote.run
                self._keep()

            unsent = self._new([*(self._kept() if self.is_behind else ()), *points])
            for first in range(0, len(unsent), BATCH):
                self._deliver(unsent[first : first + BATCH])
        except Exception as error:  # noqa: BLE001  whatever a logger raises, the run must not notice
            self._failed(error)
            return

        self._keep()
        if self.is_down:
            say("sending again, with all points since then")
        self.is_behind = self.is_down = False
        self._wait = RETRY_SECONDS[0]

    def _deliver(self, points: list[Point]) -> None:
        assert self.remote is not None, "connected"
        self.remote.log(points)
        for step, values in points:
            self.last |= dict.fromkeys(values, step)

    def _failed(self, error: Exception) -> None:
        # One remark for a failure, not one for each try
        if not self.is_down:
            advice = f" (pip install {self.name})" if isinstance(error, ModuleNotFoundError) else ""
            reason = " ".join(str(error).split())[:300]
            say(f"WARNING: {type(error).__name__}: {reason}{advice}; it will retry, and the run continues without it")

        self.remote, self.is_behind, self.is_down = None, True, True
        self._next = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, RETRY_SECONDS[1])

    def _kept(self) -> list[Point]:
        """Return all points in the run's own file, by step."""
        rows: dict[int, dict[str, float]] = collections.defaultdict(dict)
        with contextlib.suppress(OSError):
            for tag, curve in log.read_scalars(self.exp / "events" / log.SCALARS).items():
                for step, value in curve:
                    rows[step][tag] = value
        return sorted(rows.items())

    def _new(self, points: Iterable[Point]) -> list[Point]:
        """Return the points that the remote run does not have."""
        last, unsent = dict(self.last), []
        for step, values in points:
            new = {tag: value for tag, value in values.items() if step > last.get(tag, -1)}
            last |= dict.fromkeys(new, step)
            if new:
                unsent.append((step, new))
        return unsent

    def _keep(self) -> None:
        """Write down the steps that have arrived for good: those of the previous call, `settles` seconds later."""
        if self.remote is not None and time.monotonic() - self._since < self.remote.settles:
            return
        last = self._settling if self.remote is not None and self.remote.settles else self.last
        text = json.dumps({"run": self.run, "last": last})
        with contextlib.suppress(OSError):
            if text != self._written:
                files.write_text(self.state, text)
                self._written = text
        self._settling, self._since = dict(self.last), time.monotonic()

    def close(self) -> None:
        """Close the connection. All points that were sent have arrived afterwards."""
        if self.remote is None:
            return
        with contextlib.suppress(Exception):
            # Only a clean close makes the last points certain; after an error a restart sends them again
            self.remote.close()
            self.remote = None
            self._keep()


def say(text: str) -> None:
    """Report a sentence to the run, which may have ended."""
    with contextlib.suppress(OSError):
        os.write(1, (redact.hidden(text) + "\n").encode("utf-8", "replace"))


class Inbox:
    """Reads the points of a run on a separate thread, and ends the process soon after the run.

    It looks every two seconds, and when the run ends: waking up for every point would take time from the run on a
    machine without a free core.

    Attributes:
        metadata: of the run, the first line of the input; None until it has come.
        points: the points that have come, at most `QUEUE`.
        ended, news: set when the run has ended, and after each look.
        gaps: how often points were dropped, here or by the run.
    """

    def __init__(self) -> None:
        self.metadata: dict[str, str | float] | None = None
        self.points: collections.deque[Point] = collections.deque()
        self.ended, self.news, self.gaps = threading.Event(), threading.Event(), 0
        self._rest, self._dropped = b"", 0
        os.set_blocking(0, False)
        threading.Thread(target=self._listen, daemon=True).start()

    def take(self) -> list[Point]:
        """Return the points that have come since the last call."""
        return [self.points.popleft() for _ in range(len(self.points))]

    def _listen(self) -> None:
        end = select.poll()
        end.register(0, 0)  # wait for the end of the input alone, which poll always reports
        while not self.ended.is_set():
            end.poll(1000 * LOOK_SECONDS)
            # No data raises BlockingIOError; the end of the input leaves the loop and sets `ended`
            with contextlib.suppress(BlockingIOError):
                while data := os.read(0, 1 << 16):
                    *lines, self._rest = (self._rest + data).split(b"\n")
                    for line in lines:
                        self._accept(line)
                self.ended.set()
            self.news.set()

        # A hanging server cannot keep the process alive
        threading.Timer(END_SECONDS, os._exit, (0,)).start()

    def _accept(self, line: bytes) -> None:
        # A line that is cut off is dropped: the file of the run has its points
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if self.metadata is None:
                self.metadata = record
                return

            # The run counts the points that did not fit the pipe; this queue drops points when a server is slow
            step, dropped = int(record.pop("step")), int(record.pop("dropped"))
            self.gaps += len(self.points) >= QUEUE or dropped > self._dropped
            self._dropped = dropped
            if len(self.points) < QUEUE:
                self.points.append((step, {tag: float(value) for tag, value in record.items()}))


def schedule(policy: int) -> None:
    """Give the calling thread, and the threads that it starts, another scheduling policy if the system permits it."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy, os.sched_param(0))


def main(argv: list[str]) -> None:
    """Send points until standard input ends, and then for a few seconds at most."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the run handles them; the end of its input then ends this process
    schedule(os.SCHED_IDLE)  # the run has priority, even on a machine without a free core

    # The metadata comes first
    inbox = Inbox()
    while inbox.metadata is None and not inbox.ended.is_set():
        inbox.news.wait(LOOK_SECONDS)
        inbox.news.clear()
    sender = Sender(argv[0], Path(argv[1]), inbox.metadata or {})

    # Then points, until the run ends; the last call does not wait for a retry
    has_ended, gaps = False, 0
    while not has_ended:
        inbox.news.wait(LOOK_SECONDS)
        inbox.news.clear()
        has_ended = inbox.ended.is_set()
        if has_ended:
            schedule(os.SCHED_OTHER)

        points, known, gaps = inbox.take(), gaps, inbox.gaps
        sender.is_behind |= gaps > known
        sender.send(points, now=has_ended)

    sender.close()
    os._exit(0)  # skip the loggers' handlers at exit, which may wait for a server


if __name__ == "__main__":
    main(sys.argv[1:])
