"""Find the processes of one run by a random value in their environment, wherever they were adopted."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path

VARIABLE = "ZOETROPE_TEST_MARK"


class Mark:
    """A value that all processes of one run inherit."""

    def __init__(self) -> None:
        self.value = uuid.uuid4().hex
        self.env = {VARIABLE: self.value}

    def processes(self) -> dict[int, str]:
        """Return process id -> command line of the processes that run; zombies have no environment."""
        entry = f"{VARIABLE}={self.value}".encode()
        commands = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                try:
                    if entry in (folder / "environ").read_bytes().split(b"\0"):
                        words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        commands[int(folder.name)] = words.strip()
                except OSError:
                    continue  # it has ended
        return commands

    def seconds_until_gone(self, limit: float, but: AbstractSet[int] = frozenset()) -> float | None:
        """Wait until no process but these is left; None if some are after `limit` seconds."""
        began = time.monotonic()
        while set(self.processes()) - but:
            if time.monotonic() - began > limit:
                return None
            time.sleep(0.05)
        return time.monotonic() - began

    def kill(self) -> None:
        """End all that is left, so that one case does not disturb the next."""
        for pid in self.processes():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Return whether the condition became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
