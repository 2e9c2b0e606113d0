"""Read the history of a run from the files in its experiment folder. Needs neither torch nor numpy."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from utils import files, log, run_lock
from utils.errors import UserError, kind_of_file

# Curve that decides which checkpoint is the best: name of its metric
CRITERIA = {"map_val": "mAP", "top1_val": "top-1"}
# Lines of the log
_RECORD = re.compile(r"\[(\d{4}-\d\d-\d\dT[^\]]+)\] (.*)")
_PROGRESS = re.compile(r"Iter: \[(\d+)/(\d+)\] Time \S+ \((\S+)\) Data \S+ \((\S+)\)")
_RATE = re.compile(r"ETA (\S+) clips/s (\S+)")
# Event of the component `run` -> state of the run
_ENDS = {"finished": "finished", "nothing_to_do": "finished", "stopped": "stopped", "failed": "failed"}
# The same in sentences, as versions before 0.3 wrote them
_OLD_END = re.compile(r"stopped by .* at iteration (\d+)|finished: (\d+) iterations")
_OLD_ENDS = {"finished: ": "finished", "nothing to do": "finished", "stopped by": "stopped", "error: ": "failed"}
_OLD_RANKS = re.compile(r"ranks (\d+), shards")


@dataclass
class Part:
    """The lines of one process of a run: from its header to the next one."""

    began: datetime
    ended: datetime
    ranks: int = 1
    device: str = "?"

    @property
    def hours(self) -> float:
        """Hours of all its ranks together, up to its last line."""
        return self.ranks * (self.ended - self.began).total_seconds() / 3600


@dataclass
class History:
    """The history of a run.

    Attributes:
        state: new, running, finished, stopped (saved, the same command resumes), failed, or ended (killed).
        step, last: number of finished iterations, and the total; None: not in the log.
        best, criterion: best validation so far in per cent, and its metric: top-1 or mAP.
        updated: UTC time of the last line of the log.
        gpu_hours, rank_hours: hours of all ranks by the times of the log; the first counts GPUs only, and is None if
            an older log does not name its device.
        waiting: share of the training time that was spent waiting for clips; None before the first progress line.
        restarts: how often a process has continued the run.
        requeues: how often the scheduler has restarted its job.
        lost_steps: iterations that were done twice, because a process ended after its last checkpoint.
        spikes, skipped: lines of the log about loss spikes, and about skipped fp16 steps.
        eta, rate: values of the last progress line.
        evaluation: the newest evaluation: name, step, metrics, protocol, time; None without one.
        lines: the last lines of the log.
    """

    state: str = "new"
    step: int | None = None
    last: int | None = None
    best: float | None = None
    criterion: str = "top-1"
    updated: str | None = None
    gpu_hours: float | None = 0.0
    rank_hours: float = 0.0
    waiting: float | None = None
    restarts: int = 0
    requeues: int = 0
    lost_steps: int = 0
    spikes: int = 0
    skipped: int = 0
    eta: str | None = None
    rate: str | None = None
    evaluation: dict[str, object] | None = None
    lines: list[str] = field(default_factory=list, repr=False)


def read(exp: Path) -> History:
    """Return the history of the run in a folder. Missing and broken files count as nothing written."""
    run, parts, spent = History(), [], [0.0, 0.0]
    for time, text in records(exp / "log.txt"):
        _take(run, parts, spent, time, text)

    # A crash leaves no line in the log, so the lock decides first
    run.state = _state(exp, run)
    run.restarts = max(0, len(parts) - 1)

    run.rank_hours = round(sum(part.hours for part in parts), 4)
    # Of a log without a `device` line the GPUs cannot be known
    known = all(part.device != "?" for part in parts)
    on_gpus = sum(part.hours for part in parts if part.device.startswith("cuda"))
    run.gpu_hours = round(on_gpus, 4) if known else None
    run.waiting = round(spent[1] / spent[0], 4) if spent[0] else None

    with contextlib.suppress(OSError):
        run.requeues = len(files.read_rows(exp / "jobs" / "restarts.jsonl"))
    run.lost_steps = _lost_steps(exp / "events" / log.SCALARS)

    run.best, run.criterion = best(curves(exp))
    run.evaluation = evaluation(exp)
    return run


def records(file: Path) -> list[tuple[datetime, str]]:
    """Return (time, text) of each line of a log."""
    if kind_of_file(file) is not None:  # opening a pipe would block
        return []
    lines = []
    with contextlib.suppress(OSError):
        for line in file.read_text("utf-8", errors="replace").splitlines():
            # A line without a time belongs to a traceback
            match = _RECORD.fullmatch(line)
            # Half a line at the end is what a killed process leaves
            if match:
                with contextlib.suppress(ValueError):
                    lines.append((datetime.fromisoformat(match[1]), match[2]))
    return lines


def _take(run: History, parts: list[Part], spent: list[float], time: datetime, text: str) -> None:
    """Add one line of the log; `spent` is [seconds of training, seconds of them waiting for clips]."""
    run.updated = time.isoformat()
    run.lines = [*run.lines[-199:], text]
    event = log.parse_event(text)
    # The header of a process
    if (event and event[1:3] == ("run", "start")) or text.startswith("experiment ") or not parts:
        parts.append(Part(time, time))
    part = parts[-1]
    # The last line so far: a killed process writes no other end
    part.ended = time

    if event:
        _take_event(run, part, event)
        return
    _take_old(run, part, text)

    # Progress
    progress = _PROGRESS.match(text)
    if not progress:
        return

    step, run.last = int(progress[1]), int(progress[2])
    # The averages of a line cover the iterations since the line before
    steps = step - (run.step or 0)
    seconds, waited = (float(progress[number]) for number in (3, 4))
    if steps > 0 and math.isfinite(seconds + waited):
        spent[0] += steps * seconds
        spent[1] += steps * waited

    run.step = step
    rate = _RATE.search(text)
    run.eta, run.rate = (rate[1], rate[2]) if rate else (None, None)


def _take_event(run: History, part: Part, event: log.Event) -> None:
    """Add the facts of an event of the log."""
    values = {key: str(value) for key, value in event.values.items()}

    def number(key: str) -> int:
        return int(values[key]) if values.get(key, "").isdecimal() else 0

    if event.component == "run":
        if event.name == "start":
            part.ranks = number("ranks") or 1
        elif event.name == "setup":
            part.device = values.get("device", "?")
        elif event.name in ("stopped", "finished"):
            run.step = number("iteration")
    elif (event.component, event.name) == ("loss", "spike"):
        run.spikes += 1
    elif (event.component, event.name) == ("fp16", "skipped"):
        run.skipped += number("steps")


def _take_old(run: History, part: Part, text: str) -> None:
    """Add the facts of a line that a version before 0.3 wrote."""
    ranks, end = _OLD_RANKS.match(text), _OLD_END.match(text)
    if ranks:
        part.ranks = int(ranks[1])
    elif text.startswith("device "):
        part.device = text.split()[1].rstrip(",")
    elif text.startswith("loss spike"):
        run.spikes += 1
    elif text.startswith("fp16: "):
        run.skipped += int(text.split()[1])
    elif end:
        run.step = int(end[1] or end[2])


def _state(exp: Path, run: History) -> str:
    """Return the state of the run by its lock and the last lines of its log."""
    if run_lock.living(exp / "jobs" / "lock.json"):
        return "running"
    for text in reversed(run.lines):
        event = log.parse_event(text)
        if event and event.component == "run" and event.name in _ENDS:
            return _ENDS[event.name]
        for start, state in _OLD_ENDS.items():
            if text.startswith(start):
                return state
        # These may follow the line that ends a run
        if not text.startswith(("loggers: ", "WARNING", "INFO loggers: ")):
            break
    return "ended" if run.lines else "new"


def _lost_steps(file: Path) -> int:
    """Return how many iterations were done twice: a process that resumes writes its step among the curves."""
    lost = reached = 0
    if kind_of_file(file) is not None:  # a pipe would block
        return 0
    with contextlib.suppress(OSError):
        for row in files.read_rows(file):
            if isinstance(row.get("resume"), int):
                # Steps beyond the checkpoint were lost with the process
                lost += max(0, reached - row["resume"])
                reached = row["resume"]
            elif isinstance(row.get("step"), int):
                reached = max(reached, row["step"])
    return lost


def curves(exp: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves of a run; none if the file is missing."""
    with contextlib.suppress(OSError, UserError):
        return log.read_scalars(exp / "events" / log.SCALARS)
    return {}


def best(curves: dict[str, list[tuple[int, float]]]) -> tuple[float | None, str]:
    """Return (best validation, its metric)."""
    for tag, name in CRITERIA.items():
        # nan is a validation without readable videos
        values = [value for _, value in curves.get(tag, ()) if not math.isnan(value)]
        if values:
            return max(values), name
    return None, "top-1"


def evaluation(exp: Path) -> dict[str, object] | None:
    """Return the newest evaluation of an experiment; None if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        # By time: the name of an evaluation is free
        file = max((exp / "results").glob("*.json"), key=os.path.getmtime)
        summary = json.loads(file.read_text("utf-8"))
        metrics, protocol = summary["metrics"], summary.get("protocol") or {}
        time = datetime.fromtimestamp(file.stat().st_mtime).astimezone().isoformat("T", "seconds")

        return {
            "name": file.stem,
            "step": summary.get("step"),
            "time": time,
            "protocol": f"{protocol.get('num_clips', '?')}x{protocol.get('crops', '?')}",
            "metrics": {name: value for name, value in metrics.items() if isinstance(value, int | float)},
        }
    return None


def in_words(run: History) -> list[str]:
    """Return the columns of a table of experiments: step, best, last evaluation, state, time."""
    if run.state == "new" and run.evaluation is None:
        return [""] * 5

    step = "" if run.step is None else f"{run.step}/{run.last or '?'}"
    top = "" if run.best is None else f"{run.best:.2f}" + (f" {run.criterion}" if run.criterion == "mAP" else "")

    last = ""
    if run.evaluation is not None:
        metrics = run.evaluation["metrics"]
        assert isinstance(metrics, dict), "as `evaluation` makes it"
        # Multi-label results have no top-1
        value = metrics.get("mean_average_precision", metrics.get("top1"))
        last = f"{value:.2f} ({run.evaluation['protocol']})" if value is not None else str(run.evaluation["name"])

    return [step, top, last, run.state, (run.updated or "")[:16].replace("T", " ")]


HEADINGS = ("iteration", "own best", "last evaluation", "state", "last line, UTC")
