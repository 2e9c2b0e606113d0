"""What remote loggers cost a run: 1,000 empty steps at 20 steps/s, beside the same steps without them.

A step sleeps 50 ms and writes one point of four curves, as a run with `print_freq: 1` does. Both sides run in turns of
`TURN` steps in one process, so that they see the same machine. Opening and closing count, on the logger's side. The
rows: W&B offline, an MLflow server, one that was killed, one that never answers, and a process that takes nothing, so
that its queue is full. W&B and MLflow must be installed: run it in an environment that has them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import mlflow_server
from tests.benchmarks.rows import run_rows
from utils import log, loggers

STEPS, SLEEP, TURN = 1000, 0.05, 100
MOST = 1.0  # per cent of the wall clock


def steps(run: log.RunLog, first: int, count: int) -> float:
    """Return the wall seconds of some empty steps."""
    began = time.perf_counter()
    for step in range(first, first + count):
        time.sleep(SLEEP)
        run.scalars(step, {"loss_train": 1 / step, "top1_train": 50.0, "top5_train": 80.0, "lr": 0.1})
    return time.perf_counter() - began


def cost(name: str, disturb: Callable[[loggers.Feed, int], object] = lambda feed, step: None) -> dict:
    """Run both sides.

    Args:
        name: of the logger.
        disturb: called with (feed, step) before each turn.
    """
    with tempfile.TemporaryDirectory(prefix="zoetrope-loggers-") as folder:
        bare, fed = (log.RunLog(Path(folder, side), True, 0, echo=False) for side in ("bare", "fed"))
        spent: dict[str, list[float]] = {"bare": [], "fed": []}
        for run in (bare, fed):
            run.scalars(0, {"loss_train": 1.0})  # imports TensorBoard's messages
        began = time.perf_counter()
        remark = functools.partial(fed.remark, "loggers")
        feed = loggers.Feed(name, Path(folder, "fed"), {"name": "empty steps"}, remark)
        fed._feeds = [feed]
        opening = time.perf_counter() - began
        for first in range(1, STEPS + 1, TURN):
            disturb(feed, first)
            for side, run in (("bare", bare), ("fed", fed)) if first // TURN % 2 else (("fed", fed), ("bare", bare)):
                spent[side].append(steps(run, first, TURN))
        dropped, process = feed.dropped, feed.process
        assert process is not None
        began = time.perf_counter()
        fed.close()
        closing = time.perf_counter() - began
        bare.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        time.sleep(10)  # it ends by itself, and writes into the folder until then
        state = Path(folder, "fed", "events", f"{name}.json")
        arrived = state.read_text() if state.exists() else ""
    turns = [more - less for more, less in zip(spent["fed"], spent["bare"], strict=True)]
    bare_seconds = sum(spent["bare"])
    percent = 100 * (opening + closing + len(turns) * statistics.median(turns)) / bare_seconds
    measured = {
        "percent": round(percent, 3),
        "percent_by_sums": round(100 * (opening + closing + sum(turns)) / bare_seconds, 3),
        "open_ms": round(1000 * opening, 1),
        "close_ms": round(1000 * closing, 1),
        "bare_s": round(bare_seconds, 2),
        "dropped": dropped,
        "arrived": f'"loss_train": {STEPS}' in arrived,
    }
    return {"measured": measured, "holds": percent <= MOST}


@contextlib.contextmanager
def server(*, silent: bool = False) -> Iterator[mlflow_server.Server | None]:
    """Start an MLflow server, or a port that never answers, and let MLflow's clients find it."""
    with tempfile.TemporaryDirectory(prefix="zoetrope-mlflow-") as folder:
        started = None if silent else mlflow_server.Server(Path(folder))
        with socket.create_server(("127.0.0.1", 0)) as port:
            os.environ["MLFLOW_TRACKING_URI"] = started.uri if started else f"http://127.0.0.1:{port.getsockname()[1]}"
            yield started
        if started:
            started.kill()


def live() -> dict:
    """A server that answers: everything arrives."""
    with server():
        outcome = cost("mlflow")
    return outcome | {"holds": outcome["holds"] and outcome["measured"]["arrived"]}


def dead() -> dict:
    """A server that is killed after a third of the steps."""
    with server() as started:
        assert started is not None, "not silent"
        return cost("mlflow", lambda feed, step: started.kill() if step > STEPS / 3 and started.process else None)


def silent() -> dict:
    """A server that accepts connections and never answers."""
    with server(silent=True):
        return cost("mlflow")


def full() -> dict:
    """A process that takes nothing, with so little room in the pipe that the queue is full."""
    import fcntl

    def stop(feed: loggers.Feed, step: int) -> None:
        if step == 1:
            assert feed.process is not None
            os.kill(feed.process.pid, signal.SIGSTOP)
            fcntl.fcntl(feed._in, fcntl.F_SETPIPE_SZ, 4096)

    outcome = cost("mlflow", stop)
    return outcome | {"holds": outcome["holds"] and outcome["measured"]["dropped"] > 0}


ROWS = {
    "wandb": (
        "W&B offline beside none, 1,000 empty steps at 20 steps/s",
        "<= 1 % of wall clock",
        lambda: cost("wandb"),
    ),
    "mlflow": ("an MLflow server", "<= 1 %, all points there", live),
    "dead": ("an MLflow server killed in the middle", "<= 1 %", dead),
    "silent": ("a server that never answers", "<= 1 %", silent),
    "full": ("queue full", "<= 1 %, dropped and counted", full),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
