"""`python -m utils.loggers NAME EXP`: the process that sends the points of a run to one remote logger.

Standard input brings the facts of the run and then points, one JSON object a line; its end is the run's end. A line on
standard output is a remark for log.txt. `events/NAME.json` keeps the remote run, and the last step that each curve has
there: a restart continues the same run, and sends no step twice.
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
END_SECONDS = 8.0  # after the run has ended
RETRY_SECONDS = 1.0, 60.0  # first wait after a failure, longest


class Sender:
    """Sends points to a remote run, and what it missed from the run's own file.

    Args:
        name: of the logger.
        exp: experiment folder.
        facts: of the run.
    """

    def __init__(self, name: str, exp: Path, facts: dict[str, str | float]) -> None:
        self.name, self.exp, self.facts = name, exp, facts
        self.state = exp / "events" / f"{name}.json"
        self.remote: Remote | None = None
        self.run: str | None = None
        self.last: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self.state.read_text("utf-8"))
            self.run, self.last = found["run"], {str(tag): int(step) for tag, step in dict(found["last"]).items()}
        self.is_behind = True  # of the file: an earlier start may have left points there
        self.is_down = False
        self._wait, self._next = RETRY_SECONDS[0], 0.0
        self._settling, self._since, self._written = dict(self.last), 0.0, ""

    def send(self, points: list[Point], *, now: bool = False) -> None:
        """Send points. After a failure, wait; whatever comes in that time is sent from the file later."""
        if time.monotonic() < self._next and not now:
            self.is_behind |= bool(points)
            return
        try:
            if self.remote is None:
                module = importlib.import_module(f"utils.loggers.{self.name}")
                remote: Remote = module.connect(self.exp, self.run, self.facts)
                self.remote, self.run = remote, remote.run
                self._keep()
            wanted = self._new([*(self._kept() if self.is_behind else ()), *points])
            for first in range(0, len(wanted), BATCH):
                self._deliver(wanted[first : first + BATCH])
        except Exception as error:  # noqa: BLE001  whatever a logger raises, the run goes its way
            self._failed(error)
            return
        self._keep()
        if self.is_down:
            say("sends again, all points since")
        self.is_behind = self.is_down = False
        self._wait = RETRY_SECONDS[0]

    def _deliver(self, points: list[Point]) -> None:
        assert self.remote is not None, "connected"
        self.remote.log(points)
        for step, values in points:
            self.last |= dict.fromkeys(values, step)

    def _failed(self, error: Exception) -> None:
        if not self.is_down:
            advice = f" (pip install {self.name})" if isinstance(error, ModuleNotFoundError) else ""
            reason = " ".join(str(error).split())[:300]
            say(f"{type(error).__name__}: {reason}{advice}; tries again, and the run continues without it")
        self.remote, self.is_behind, self.is_down = None, True, True
        self._next = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, RETRY_SECONDS[1])

    def _kept(self) -> list[Point]:
        """Return all points of the run's own file, by step."""
        rows: dict[int, dict[str, float]] = collections.defaultdict(dict)
        with contextlib.suppress(OSError):
            for tag, curve in log.read_scalars(self.exp / "events" / log.SCALARS).items():
                for step, value in curve:
                    rows[step][tag] = value
        return sorted(rows.items())

    def _new(self, points: Iterable[Point]) -> list[Point]:
        """Return the points without what the remote run has."""
        last, found = dict(self.last), []
        for step, values in points:
            new = {tag: value for tag, value in values.items() if step > last.get(tag, -1)}
            last |= dict.fromkeys(new, step)
            if new:
                found.append((step, new))
        return found

    def _keep(self) -> None:
        """Write down which points have arrived for good: those of the last call, if it is long enough ago."""
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
        """End the connection; everything that was sent has arrived then."""
        if self.remote is None:
            return
        with contextlib.suppress(Exception):
            self.remote.close()
            self.remote = None
            self._keep()


def say(text: str) -> None:
    """Report a sentence to the run, which may have gone."""
    with contextlib.suppress(OSError):
        os.write(1, (redact.hidden(text) + "\n").encode("utf-8", "replace"))


class Inbox:
    """Reads the points that a run hands over, on a thread of its own, and ends the process soon after the run has.

    It looks every two seconds, and when the run ends: to wake up at every point would take time from the run on a
    machine without a free core.

    Attributes:
        facts: of the run, the first line of the input; None until it is there.
        points: what has come, at most `QUEUE`.
        ended, news: set when the run has ended, and after each look.
        gaps: how often points were dropped, here or by the run.
    """

    def __init__(self) -> None:
        self.facts: dict[str, str | float] | None = None
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
        end.register(0, 0)  # no event but the end, which needs no asking for
        while not self.ended.is_set():
            end.poll(1000 * LOOK_SECONDS)
            with contextlib.suppress(BlockingIOError):
                while data := os.read(0, 1 << 16):
                    *lines, self._rest = (self._rest + data).split(b"\n")
                    for line in lines:
                        self._accept(line)
                self.ended.set()
            self.news.set()
        threading.Timer(END_SECONDS, os._exit, (0,)).start()

    def _accept(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if self.facts is None:
                self.facts = record
                return
            step, dropped = int(record.pop("step")), int(record.pop("dropped"))
            self.gaps += len(self.points) >= QUEUE or dropped > self._dropped
            self._dropped = dropped
            if len(self.points) < QUEUE:
                self.points.append((step, {tag: float(value) for tag, value in record.items()}))


def schedule(policy: int) -> None:
    """Let the calling thread, and what it starts, run by another policy where the system permits it."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy, os.sched_param(0))


def main(argv: list[str]) -> None:
    """Send until standard input ends, and then for a few seconds at most."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the run handles them, and ends this process by the end of its input
    schedule(os.SCHED_IDLE)  # the run goes first, also on a machine without a free core
    inbox = Inbox()
    while inbox.facts is None and not inbox.ended.is_set():
        inbox.news.wait(LOOK_SECONDS)
        inbox.news.clear()
    sender = Sender(argv[0], Path(argv[1]), inbox.facts or {})
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
    os._exit(0)  # no logger's own handlers at the exit, which may wait for a server


if __name__ == "__main__":
    main(sys.argv[1:])
