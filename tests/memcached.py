"""Real memcached servers for the tests and the acceptance rows, started with the options that the launcher gives."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launch import memcached

MISSING = None if shutil.which("memcached") else "memcached is not installed (apt install memcached)"


class Server:
    """One memcached on a unix socket in `folder`, or on a free port of the loopback.

    Args:
        secret: file for -Y; TCP only.
    """

    def __init__(
        self, folder: Path, name: str, *, tcp: bool = False, megabytes: int = 64, secret: Path | None = None
    ) -> None:
        self.place = ["-l", "127.0.0.1", "-p", str(free_port())] if tcp else ["-s", str(folder / name)]
        self.name = f"127.0.0.1:{self.place[3]}" if tcp else f"unix:{folder / name}"
        self.megabytes, self.secret = megabytes, secret
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, empty, where it was before."""
        if self.place[0] == "-s":
            Path(self.place[1]).unlink(missing_ok=True)
        argv = memcached.arguments(megabytes=self.megabytes, place=self.place, secret=self.secret)
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        memcached._await_answer(self.name, self.process)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)
        while number == signal.SIGSTOP and not self._stands_still():  # on a busy machine a thread answers once more
            time.sleep(0.001)

    def _stands_still(self) -> bool:
        assert self.process is not None
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        return all(file.read_text().rpartition(")")[2].split()[0] == "T" for file in threads)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    """Whether `condition()` became true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False
