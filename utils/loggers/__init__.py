"""Remote loggers, which receive the curves like TensorBoard: one file of this folder each, named in `common.loggers`.

A file defines `connect(folder, run, metadata)`, which opens the remote run and returns a `Remote`. It runs in its own
process (`__main__.py`), so that no import, hang or crash of a logger reaches the training. The pipe to that process is
the queue: it is bounded, and the run never waits for it. `events/scalars.jsonl` has every point. Points that did not
fit the queue, or came while a server was down, are sent from there, by the next start at the latest.
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
PATIENCE = 0.002, 8.0  # how long `close` waits for the last points: a share of the run's time, and a limit in seconds

Point = tuple[int, Mapping[str, float]]  # finished iterations, tag -> value


class Remote(Protocol):
    """A remote run. Every method may raise; the caller then connects again after a while.

    Attributes:
        settles: seconds after which points survive a kill -9 of all processes.
    """

    settles: float

    @property
    def run(self) -> str:
        """The text that `connect` needs to continue this run after a restart."""
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Send points, oldest first. On return they have arrived, or will within `settles` seconds."""
        ...

    def close(self) -> None:
        """Close the connection, but leave the run open."""
        ...


class Feed:
    """The process of one remote logger. No method raises because of it, and only `close` waits for it, briefly.

    Args:
        name: of the logger.
        exp: the experiment folder.
        metadata: describe this run remotely: name -> text or number. Nothing secret.
        remark: writes a sentence to the log; `WARNING: ` at its beginning is its level.
    """

    def __init__(
        self, name: str, exp: Path, metadata: Mapping[str, str | float], remark: Callable[[str], object]
    ) -> None:
        self.name, self._remark, self._began, self.dropped = name, remark, time.monotonic(), 0
        command = [sys.executable, "-m", __name__, name, str(Path(exp).resolve())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process: subprocess.Popen[bytes] | None = None

        # Two pipes: points to the process, remarks from it
        theirs_in, self._in = os.pipe()
        self._out, theirs_out = os.pipe()
        try:
            # In our session: Linux shares the cores among sessions, and a new one would get as much as the whole run
            self.process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdin=theirs_in, stdout=theirs_out, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            remark(f"WARNING: {name} cannot be started ({error.strerror}); the curves are in events/")

        # The process has copies of its ends; ours must be closed, or a read would never see the end of the file
        for descriptor in (theirs_in, theirs_out):
            os.close(descriptor)
        # Never wait for the logger: a full queue drops points
        for descriptor in (self._in, self._out):
            os.set_blocking(descriptor, False)

        self._write(dict(metadata))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Send one point of each curve, or count it as dropped."""
        # JSON has no nan: write a number that is not finite as a text, which float() reads
        safe = {tag: value if math.isfinite(value) else str(value) for tag, value in values.items()}
        if not self._write({"step": step, "dropped": self.dropped, **safe}):
            self.dropped += 1
        self._listen()

    def _write(self, record: Mapping[str, object]) -> bool:
        if self.process is None:
            return False
        try:
            # A line that fits in part counts as dropped: its end never follows, and the reader skips it
            data = json.dumps(record, allow_nan=False).encode() + b"\n"
            return os.write(self._in, data) == len(data)
        except OSError:  # the queue is full, or the process has ended
            return False

    def _listen(self) -> None:
        """Log the remarks that the process has written."""
        while self.process is not None:
            try:
                text = os.read(self._out, 1 << 16)
            except OSError:
                return
            if not text:
                return
            for line in text.decode("utf-8", "replace").splitlines():
                level = "WARNING: " if line.startswith("WARNING: ") else ""
                self._remark(f"{level}{self.name}: {line.removeprefix(level)}")

    def close(self) -> None:
        """Let the process send its last points. It ends by itself a few seconds later, even if we do not wait."""
        if self.process is None:
            return
        # The end of its input tells the process that the run has ended
        os.close(self._in)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(min(PATIENCE[1], PATIENCE[0] * (time.monotonic() - self._began)))

        self._listen()
        if self.dropped:
            self._remark(f"WARNING: {self.name}: {self.dropped} points did not fit its queue; see events/scalars.jsonl")

        os.close(self._out)
        self.process.returncode = self.process.returncode or 0  # suppresses Popen's warning that it is still running
        self.process = None
