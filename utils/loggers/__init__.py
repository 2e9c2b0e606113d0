"""Curves beside TensorBoard's: each file of this folder is one remote logger, and `common.loggers` names it.

A file defines `connect(folder, run, facts)`, which opens the remote run, and returns a `Remote`. It runs in a process
of its own (`__main__.py`), so that no import, hang or crash of a logger reaches the training. The pipe to that process
is the queue: bounded, and never waited for. `events/scalars.jsonl` has every point, so whatever did not fit the queue,
or came while a server was down, is sent from there, by the next start at the latest.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("wandb", "mlflow")
PATIENCE = 0.002, 8.0  # of the time that the run has lasted, seconds at most: how long an end waits for the last points

Point = tuple[int, Mapping[str, float]]  # finished iterations, tag -> value


class Remote(Protocol):
    """A remote run. Every method may raise; then the connection is made again after a while.

    Attributes:
        settles: seconds after which points survive a kill -9 of all processes.
    """

    settles: float

    @property
    def run(self) -> str:
        """What `connect` needs to continue this run after a restart."""
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Send points, oldest first. They have arrived, or will in `settles` seconds, when it returns."""
        ...

    def close(self) -> None:
        """End the connection, not the run."""
        ...


class Feed:
    """The process of one remote logger. No method raises for it, or waits for it but `close`, and that briefly.

    Args:
        name: of the logger.
        exp: the experiment folder.
        facts: what the remote run shows of this run: name -> text or number. Nothing secret.
        remark: called with a sentence for the log.
    """

    def __init__(self, name: str, exp: Path, facts: Mapping[str, str | float], remark: Callable[[str], object]) -> None:
        self.name, self._remark, self._began, self.dropped = name, remark, time.monotonic(), 0
        command = [sys.executable, "-m", __name__, name, str(Path(exp).resolve())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process: subprocess.Popen[bytes] | None = None
        theirs_in, self._in = os.pipe()
        self._out, theirs_out = os.pipe()
        try:
            self.process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdin=theirs_in, stdout=theirs_out, stderr=subprocess.DEVNULL
            )  # in our session: in one of its own, Linux would give it as much of the cores as the whole run
        except OSError as error:
            remark(f"loggers: {name} cannot be started ({error.strerror}); the curves are in events/")
        for descriptor in (theirs_in, theirs_out):
            os.close(descriptor)
        for descriptor in (self._in, self._out):
            os.set_blocking(descriptor, False)
        self._write(dict(facts))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over one point of each curve, or count it as dropped."""
        # JSON has no nan: a number that is not finite is written as a text, which float() reads
        safe = {tag: value if math.isfinite(value) else str(value) for tag, value in values.items()}
        if not self._write({"step": step, "dropped": self.dropped, **safe}):
            self.dropped += 1
        self._listen()

    def _write(self, record: Mapping[str, object]) -> bool:
        if self.process is None:
            return False
        try:
            data = json.dumps(record, allow_nan=False).encode() + b"\n"
            return os.write(self._in, data) == len(data)
        except OSError:  # the queue is full, or the process has ended
            return False

    def _listen(self) -> None:
        """Write down what the process has reported."""
        while self.process is not None:
            try:
                text = os.read(self._out, 1 << 16)
            except OSError:
                return
            if not text:
                return
            for line in text.decode("utf-8", "replace").splitlines():
                self._remark(f"loggers: {self.name}: {line}")

    def close(self) -> None:
        """Let the process send what it has. It ends by itself a few seconds later, even if nobody waits."""
        if self.process is None:
            return
        os.close(self._in)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(min(PATIENCE[1], PATIENCE[0] * (time.monotonic() - self._began)))
        self._listen()
        if self.dropped:
            self._remark(f"loggers: {self.name}: {self.dropped} points did not fit its queue; see events/scalars.jsonl")
        os.close(self._out)
        self.process.returncode = self.process.returncode or 0  # no warning that it still runs: it is meant to
        self.process = None
