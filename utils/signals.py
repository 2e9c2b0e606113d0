"""Asking a run to stop: signals only set a flag; the ranks agree on the flag at a step boundary.

A new noun beside `faults` (docs/decisions.md): what a handler may do is one short page on its own.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

ASKS_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopFlag:
    """Which signal asked this process to stop, if any.

    A handler never saves anything itself: it may run in the middle of an optimiser step (Lightning #21406 is that bug).
    A second Ctrl-C ends the process at once, as the default handler would.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        """Take over the signals. Do it in the main thread, after worker processes were started.

        A closed terminal (SIGHUP) stops a run, unless it was told to go on without one (`nohup`).
        """
        for number in ASKS_TO_STOP:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.name = signal.Signals(number).name

    @property
    def received(self) -> bool:
        """True once any of the signals came to this process."""
        return self.name is not None
