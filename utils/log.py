"""Write what a run reports: log.txt, the curves (TensorBoard and events/scalars.jsonl), and the progress line.

Steps count finished iterations. A run that resumes from step s marks that in the curves. Readers then drop points that
an earlier process wrote for steps after s: one run, one curve.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import re
import shlex
import socket
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, SupportsFloat

from utils import loggers, redact, renamed
from utils.append_file import AppendFile
from utils.errors import AgreedError, UserError, fail_point, rank_from_environment, refuse_odd_file
from utils.event_file import EventFile
from utils.version import VERSION

if TYPE_CHECKING:
    from utils.config import Config
    from utils.metrics import Metric
    from utils.shards import ShardPlan

SCALARS = "scalars.jsonl"
ANY_RANK = True  # argument of `RunLog.event`: write the line from any rank, not only from the main one

Level = Literal["INFO", "WARNING", "ERROR"]
_EVENT = re.compile(r"(INFO|WARNING|ERROR) ([a-z][a-z0-9_]*): ([a-z][a-z0-9_]*)(?= |$)")
_KEY = re.compile(r" ([A-Za-z_][\w@]*)=")
_WORD = re.compile(r'[^\s"\[{][^\s"]*')  # a value without quotes
_ENDS_A_LINE = re.compile(r"[\x7f-\x9f\u2028\u2029]")
_JSON = json.JSONDecoder()

# (title, key, digits) of each number of the progress line, in its order.
METERS = (
    ("Time", "time", 3),
    ("Data", "data", 3),
    ("Loss", "loss", 4),
    (renamed.LOG_TITLES["top1"], "top1", 3),
    (renamed.LOG_TITLES["top5"], "top5", 3),
)


class Meter:
    """The last value of a quantity and its average over a window.

    Args:
        window: number of values that the average covers.
        values: the list that `state` returned, to resume from.
    """

    def __init__(self, window: int, values: Iterable[float] = ()) -> None:
        self._values: deque[SupportsFloat] = deque(values, maxlen=window)

    def add(self, value: SupportsFloat) -> None:
        """Add a value. A detached tensor is read from its device only when the number is requested."""
        self._values.append(value)

    @property
    def value(self) -> float:
        """The last value; nan if there is none."""
        return self.state()[-1] if self._values else math.nan

    @property
    def average(self) -> float:
        """Mean of the values in the window; nan if there are none."""
        values = self.state()
        return math.fsum(values) / len(values) if values else math.nan

    def state(self) -> list[float]:
        """Return the values in the window, oldest first, as plain floats for a checkpoint."""
        values = [float(value) for value in self._values]
        self._values = deque(values, maxlen=self._values.maxlen)  # so that no value is read from a device twice
        return values


class Event(NamedTuple):
    """A line of log.txt that is neither the progress nor a validation."""

    level: Level
    component: str
    name: str
    values: dict[str, object]


class RunLog:
    """log.txt, TensorBoard events and scalars.jsonl of one run. Only the main rank writes, except with `any_rank`.

    Args:
        folder: the folder of ``log.txt`` and ``events/``.
        is_main: False on ranks that must not write.
        resume_step: finished iterations at the start of this process; None for a log without curves (an evaluation).
        name: the text file's name.
        echo: print the lines too.
    """

    def __init__(
        self,
        folder: Path,
        is_main: bool = True,
        resume_step: int | None = 0,
        *,
        name: str = "log.txt",
        echo: bool = True,
    ) -> None:
        self.folder, self.is_main, self._resume_step, self._echo = Path(folder), is_main, resume_step, echo
        self._events: EventFile | None = None
        self._scalars: AppendFile | None = None
        self._feeds: list[loggers.Feed] = []
        self._curves_failed = False
        self._text = AppendFile(self.folder / name, self._on_terminal, reopened=self._begins_again)
        self._once: set[str] = set()

        if not is_main:
            return

        self._text.open()

        # Curves are optional: a failure is one line in the log and never ends the run.
        if resume_step is not None:
            self._scalars = AppendFile(self.folder / "events" / SCALARS, self._without_curves)
            with contextlib.suppress(OSError, UserError):  # the first point reports the reason
                self._scalars.open()
            # Only a file with earlier points needs the marker, which drops those after this step.
            if self._scalars.size > 0:
                self._scalars.write((json.dumps({"resume": resume_step}) + "\n").encode())

    def line(self, text: str) -> None:
        """Write a text verbatim, ``[UTC time] text``: progress and validation lines, whose format is stable.

        A text of several lines becomes several records.
        """
        if not self.is_main:
            return
        # One record per line, so that every line of the file has a time.
        for part in text.splitlines() or [""]:
            self._write(part)
            if self._echo:
                try:
                    print(redact.hidden(part), flush=True)
                except OSError:  # the terminal is closed, or `| head` has read enough: the run continues without it
                    self._echo = False

    def _write(self, text: str) -> None:
        record = f"[{utc_stamp()}] {redact.hidden(text)}\n".encode("utf-8", "backslashreplace")

        # Tests kill the process in the middle of a record.
        if os.environ.get("ZOETROPE_FAILPOINT"):
            self._text.write(record[: len(record) // 2])
            fail_point("log.line")
            record = record[len(record) // 2 :]

        self._text.write(record)

    def _begins_again(self) -> bytes:
        text = f"{self._text.path.name} was removed or replaced: it begins again here"
        return f"[{utc_stamp()}] {format_event('log', 'begins_again', 'WARNING', message=text)}\n".encode()

    def _on_terminal(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def _without_curves(self, text: str) -> None:
        if not self._curves_failed:
            self._curves_failed = True
            self.remark("curves", text, "WARNING")

    def event(
        self, component: str, name: str, level: Level = "INFO", any_rank: bool = False, /, **values: object
    ) -> None:
        """Write ``LEVEL component: name key=value ...``, see `format_event`.

        Args:
            component: what the line is about, such as run, data or loss.
            name: what happened.
            level: INFO; WARNING if the user should check something; ERROR if the run ends.
            any_rank: ANY_RANK to write the line on each rank that calls this; else only the main rank writes it.
            values: the `key=value` pairs.
        """
        text = format_event(component, name, level, **values)
        if self.is_main:
            self.line(text)
        elif any_rank:
            self._write(text)

    def remark(
        self,
        component: str,
        text: str,
        level: Level = "INFO",
        any_rank: bool = False,
        /,
        *,
        once: bool = False,
        **values: object,
    ) -> None:
        """Write a sentence as the event `remark`.

        A leading `WARNING: ` sets the level. A leading `component: ` is removed, because the event has it already.

        Args:
            component, level, any_rank, values: see `event`.
            text: the sentence, the value `message` of the event.
            once: skip the sentence if this process has written it before.
        """
        if once and text in self._once:
            return
        self._once |= {text} if once else set()

        if text.startswith("WARNING: "):
            text, level = text.removeprefix("WARNING: "), "WARNING"
        text = text.removeprefix("REMARK: ").removeprefix(f"{component}: ")
        self.event(component, "remark", level, any_rank, **values, message=text)

    @contextlib.contextmanager
    def last_words(self) -> Iterator[None]:
        """Write a `UserError` that leaves the block to the log: the terminal that showed it may be gone tomorrow."""
        try:
            yield
        except UserError as error:
            # Rank 0 alone writes an error that all ranks agreed on. Any other error is also written by its own rank.
            if self.is_main or not isinstance(error, AgreedError):
                where = {} if self.is_main else {"rank": rank_from_environment(), "host": socket.gethostname()}
                self._write(format_event("run", "failed", "ERROR", **where, message=error))
            raise

    def journal(self, name: str, row: Mapping[str, object]) -> None:
        """Append one JSON record to a file of the folder, on any rank. Raises the errors of `AppendFile.append`."""
        with contextlib.closing(AppendFile(self.folder / name, self._on_terminal)) as file:
            file.append((json.dumps(row) + "\n").encode())

    def scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Write points of curves: TensorBoard tags and their values after `step` finished iterations."""
        if self._scalars is None:
            return

        numbers = {tag: float(value) for tag, value in values.items()}
        # JSON has no nan: a number that is not finite is written as a string, which float() reads.
        safe = {tag: number if math.isfinite(number) else str(number) for tag, number in numbers.items()}
        self._scalars.write((json.dumps({"step": step, **safe}, allow_nan=False) + "\n").encode())

        # Our own tools read the JSON lines above; TensorBoard and remote loggers get a copy.
        self._event_file().add(step, numbers)
        for feed in self._feeds:
            feed.add(step, numbers)

    def _event_file(self) -> EventFile:
        # Created when needed: a run that ends before its header leaves no empty curve.
        if self._events is None:
            self._events = EventFile(self.folder / "events", self._resume_step or 0, self._without_curves)
        return self._events

    def start(self, exp: Path, cfg: Config, overrides: Sequence[str], shards: ShardPlan, *, revision: str) -> None:
        """Write the header of a process's part of the log: code, ranks, versions and config."""
        # On every rank, since each of them may log text that holds the secret.
        if cfg.data.memcached.secret_file:
            redact.add_file(cfg.data.memcached.secret_file)
        if not self.is_main:
            return
        import torch

        from utils import config

        if self._resume_step is not None:
            self._event_file()
            place = "/".join(Path(exp).resolve().parts[-3:])
            metadata = {"name": place, "code": revision, "ranks": shards.world, "global_batch": shards.global_batch}
            metadata |= {key: redact.hidden(str(value)) for key, value in config.flat(config.to_dict(cfg)).items()}
            remark = functools.partial(self.remark, "loggers")
            self._feeds = [loggers.Feed(name, exp, metadata, remark) for name in cfg.loggers]

        self.event(
            "run",
            "start",
            ranks=shards.world,
            shards=shards.total,
            global_batch=shards.global_batch,
            python=platform.python_version(),
            torch=torch.__version__,
            zoetrope=VERSION,
            code=revision,
            process=os.getpid(),
            host=socket.gethostname(),
            experiment=Path(exp).resolve(),
        )
        self.event("run", "command", argv=shlex.join(sys.argv), overrides=shlex.join(overrides) or None)
        # Not echoed: too long for the terminal
        self._write(format_event("config", "resolved", values=config.to_dict(cfg)))

    def training(
        self,
        step: int,
        last: int,
        meters: Mapping[str, Meter],
        *,
        lr: float,
        clips: int,
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Write the progress line and its scalars.

        Args:
            meters: time, data, loss, top1, top5.
            lr: learning rate of the step.
            clips: number of clips in an iteration.
            more: additional scalars.
        """
        if not self.is_main:
            return

        self.line(format_line(step, last, meters, lr=lr, clips=clips))
        average = {name: meters[name].average for name in ("loss", "top1", "top5")}
        tags = {"loss_train": average["loss"], "top1_train": average["top1"], "top5_train": average["top5"], "lr": lr}
        self.scalars(step, tags | dict(more or {}))

    def validation(self, step: int, result: Mapping[str, float]) -> None:
        """Write the validation line and its scalars; `result` comes from `metrics.evaluate`."""
        if not self.is_main:
            return

        self.line(format_validation(result))
        if result.get("failed"):
            text = f"{result['failed']:.0f} of {result['num_videos']:.0f} videos could not be read and count as wrong"
            self.remark("validation", text, "WARNING", iteration=step)

        # The loss first, as in the scalars of training.
        shown = sorted(_shown_in("curve", result), key=lambda metric: metric.name != "loss")
        self.scalars(step, {metric.tag: result[metric.name] for metric in shown})

    def flush(self) -> None:
        """Flush the files to the disk, so that after a power cut the log is no older than the checkpoint."""
        for file in (self._events, self._scalars, self._text if self.is_main else None):
            if file is not None:
                file.sync()

    def close(self) -> None:
        """Close all files, after the remote loggers."""
        # A feed may log while it closes, so close the text file last.
        feeds, self._feeds = self._feeds, []
        for feed in feeds:
            feed.close()
        for file in (self._events, self._scalars, self._text):
            if file is not None:
                file.close()
        self._events = self._scalars = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def format_line(step: int, last: int, meters: Mapping[str, Meter], *, lr: float, clips: int) -> str:
    """Return the progress line ``Iter: [k/max] Time v (avg) ... LR x``, then `` ETA h:mm:ss clips/s n``."""
    parts = [f"{title} {meters[key].value:.{n}f} ({meters[key].average:.{n}f})" for title, key, n in METERS]

    seconds = meters["time"].average
    left = round((last - step) * seconds) if math.isfinite(seconds) else 0
    eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    rate = clips / seconds if seconds > 0 else math.nan

    return f"Iter: [{step}/{last}] {' '.join(parts)} LR {lr:.6f} ETA {eta} clips/s {rate:.1f}"


def format_event(component: str, name: str, level: Level = "INFO", /, **values: object) -> str:
    """Return ``LEVEL component: name key=value ...``; `parse_event` reads it.

    A value is a word, a number, or JSON: strings with spaces or quotes, lists and objects. Values of None are omitted.
    """
    words = [f"{key}={_value(value)}" for key, value in values.items() if value is not None]
    return " ".join([f"{level} {component}: {name}", *words])


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool | list | tuple | dict):
        return json.dumps(value, separators=(",", ":"))
    text = str(value)
    if text.isprintable() and _WORD.fullmatch(text):
        return text
    # Letters of any language stay readable; characters that could end a line are escaped
    return _ENDS_A_LINE.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False))


def parse_event(text: str) -> Event | None:
    """Return the event of a line of log.txt without its time; None for any other line, such as one of an older version.

    Values that are words stay strings; JSON values are decoded.
    """
    head = _EVENT.match(text)
    if head is None:
        return None
    values: dict[str, object] = {}
    place = head.end()
    while place < len(text):
        key = _KEY.match(text, place)
        if key is None:
            return None
        place = key.end()
        word = _WORD.match(text, place)
        if word is not None:
            values[key[1]], place = word[0], word.end()
            continue
        try:
            values[key[1]], place = _JSON.raw_decode(text, place)
        except ValueError:  # half a line
            return None
    level: Level = "ERROR" if head[1] == "ERROR" else "WARNING" if head[1] == "WARNING" else "INFO"
    return Event(level, head[2], head[3], values)


def _shown_in(place: Literal["line", "curve"], result: Mapping[str, float]) -> list[Metric]:
    from utils import metrics  # numpy takes 0.2 s to import, and commands on the login node only read logs

    return metrics.shown_in(place, result)


def format_validation(result: Mapping[str, float]) -> str:
    """Return the validation line: all metrics that `METRICS` shows there, separated by tabs."""
    numbers = [metric.in_line(result[metric.name]) for metric in _shown_in("line", result)]
    return " * " + "\t".join([*numbers, f"total_num = {result['num_videos']:.0f}"])


def read_scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the curves of an ``events/scalars.jsonl``: tag -> [(step, value)], each step once, in order of the steps.

    A marker ``{"resume": s}`` drops earlier records of steps after s, because they were repeated. A torn line (the
    process was killed while it wrote) is skipped. Curves of earlier versions get their new names.
    """
    refuse_odd_file(path)
    curves: dict[str, dict[int, float]] = {}

    for text in path.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(text)
            if "resume" in record:
                for curve in curves.values():
                    for step in [step for step in curve if step > record["resume"]]:
                        del curve[step]
                continue
            step = int(record.pop("step"))
            numbers = {renamed.curve(tag): float(value) for tag, value in record.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue

        for tag, number in numbers.items():
            # A step that occurs twice without a marker in between: the later record wins.
            curves.setdefault(tag, {})[step] = number
    return {tag: sorted(curve.items()) for tag, curve in curves.items()}


def utc_stamp() -> str:
    """Return the current time as ``2026-01-31T23:59:59+00:00``."""
    return datetime.now(timezone.utc).isoformat("T", "seconds")
