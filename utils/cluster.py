"""Read `cluster.yaml` and the flags for a scheduler, and check every field against an allow-list.

A text that passes here becomes part of an sbatch script. So a field may hold the characters that SLURM's syntax needs
and no others: no space, no quote, no newline, no `;`, `$`, `` ` ``. The lines of `setup` are the site's own shell code
and are used as they are.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils import schedulers
from utils.config import yaml_lines
from utils.errors import UserError, did_you_mean

Values = Mapping[str, Any]  # fields of `PartitionSettings`; values from a file or a flag are checked before use

SHIPPED = Path(__file__).resolve().parents[1] / "launch" / "cluster.yaml"
MOST_MINUTES = 366 * 24 * 60

# The whole value must match: a pattern with the description that an error message shows.
_NAME = (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]{0,127}"), "letters, digits and _ . + @ -")
_HOSTS = (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]{0,4095}"), "host names, such as n1,n[4-7]")
_AFTER = r"(?:after|afterany|afterok|afternotok|afterburstbuffer|aftercorr)(?::[0-9]+(?:_[0-9]+)?(?:\+[0-9]+)?)+"
_PATTERNS = {
    **dict.fromkeys(("partition", "account", "qos", "reservation", "wckey", "gpu_type"), _NAME),
    **dict.fromkeys(("nodelist", "exclude"), _HOSTS),
    "mem": (re.compile(r"[1-9][0-9]{0,9}[KMGT]?"), "memory of a whole node, such as 240G"),
    "constraint": (re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.:=&|*,()\[\]-]{0,511}"), "features, such as volta&ib"),
    "dependency": (
        re.compile(rf"(?:singleton|{_AFTER})(?:[,?](?:singleton|{_AFTER}))*"),
        "such as afterok:1234 or singleton",
    ),
}
# Lowest and highest allowed value.
_INTEGERS = {
    "gpus_per_node": (1, 64),
    "cpus_per_gpu": (1, 512),
    "time": (1, MOST_MINUTES),
    "signal_seconds": (10, 3600),
    "max_restarts": (0, 100_000),
    "max_stalled": (1, 1000),
}
_CHOICES = {"gpu_request": ("gpus-per-node", "gres", "none"), "scheduler": tuple(schedulers.names())}
# Names of environment variables in a shell.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# [DAYS-]NUMBER[:NUMBER[:NUMBER]]; `minutes` decides on the units.
_TIME = re.compile(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2}))?")


@dataclasses.dataclass(frozen=True)
class PartitionSettings:
    """One partition's settings: `defaults`, changed by `partitions.NAME`, changed by the flags.

    Attributes:
        scheduler: the scheduler of the partition, a file of `utils/schedulers/`.
        gpus_per_node: GPUs of one node, and so its ranks.
        cpus_per_gpu: CPU cores of each rank.
        mem: memory of a whole node; a request for part of a node gets that part of it. None: not requested.
        time: time limit in minutes.
        signal_seconds: how long before the limit the run gets the signal to save.
        max_restarts: number of restarts after which a job gives up.
        max_stalled: number of restarts in a row without progress after which it gives up.
        gpu_request: how GPUs are requested: `--gpus-per-node`, `--gres=gpu:N`, or not at all (CPU clusters).
        gpu_type: such as a100.
        account, qos, constraint, exclude, nodelist, reservation, dependency, wckey: sbatch's options of that name.
        exclusive: whole nodes, shared with no other job.
        setup: shell lines before the ranks start.
        environment: variables of the ranks.
    """

    scheduler: str = "slurm"
    gpus_per_node: int = 8
    cpus_per_gpu: int = 8
    mem: str | None = None
    time: int = 2880
    signal_seconds: int = 120
    max_restarts: int = 200
    max_stalled: int = 5
    gpu_request: str = "gpus-per-node"
    gpu_type: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    reservation: str | None = None
    dependency: str | None = None
    wckey: str | None = None
    exclusive: bool = False
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


FIELDS = tuple(field.name for field in dataclasses.fields(PartitionSettings))


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A cluster file: its path, and for each partition the values that it sets."""

    file: Path
    defaults: Values
    partitions: Mapping[str, Values]

    def settings(self, partition: str, flags: Values) -> PartitionSettings:
        """Return the settings of one request; flags that are None do not count.

        Raises:
            UserError: a flag's value is not allowed, or the time limit leaves no room for the signal before it.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        for name, value in given.items():
            wrong = check(name, value)
            if wrong:
                raise UserError(f"--{name.replace('_', '-')}: {wrong}")

        # Flags override the partition, which overrides the defaults. Variables of both sections add up.
        merged = {**self.defaults, **self.partitions.get(partition, {})}
        environment = {**self.defaults.get("environment", {}), **merged.get("environment", {})}
        settings = PartitionSettings(**{**merged, **given, "environment": environment})
        # Half of the time limit at most: a job that must save as soon as it starts makes no progress.
        if settings.time * 60 < 2 * settings.signal_seconds:
            least = -(-2 * settings.signal_seconds // 60)
            raise UserError(
                f"a time limit of {settings.time} min is too short for a signal {settings.signal_seconds} s before its "
                f"end: ask for --time {least} or more, or set signal_seconds in {self.file}"
            )

        return settings


def load(file: Path | None = None) -> Cluster:
    """Read the cluster file: `file`, else $ZOETROPE_CLUSTER, else the user's, else the shipped one.

    Raises:
        UserError: lists everything that is wrong in it, one per line, `file:line: partitions.X.time: ...`.
    """
    file = file or _find()

    try:
        document = yaml_lines.read(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error

    problems = [(line, _dotted(path), text) for path, line, text in document.problems]

    def problem(path: tuple, text: str) -> None:
        # The line of the key itself, or of the nearest table around it.
        line = next((document.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in document.lines), 1)
        problems.append((line, _dotted(path), text))

    top = _mapping(document.value, (), ("defaults", "partitions"), problem)
    defaults = _section(top.get("defaults"), ("defaults",), problem)
    partitions = {}
    for name, values in _mapping(top.get("partitions"), ("partitions",), None, problem).items():
        path = ("partitions", name)
        wrong = check("partition", name)
        if wrong:
            problem(path, wrong)
        partitions[name] = _section(values, path, problem)

    # All problems at once, in the order of the file, so that the user needs one attempt.
    if problems:
        raise UserError(
            "\n".join(f"{file}:{line}: {key}{': ' if key else ''}{text}" for line, key, text in sorted(problems))
        )

    return Cluster(file, defaults, partitions)


def check(name: str, value: object) -> str | None:
    """Return what is wrong with the value of one field, or None if a script may contain it."""
    if name in _PATTERNS:
        pattern, what = _PATTERNS[name]
        fits = isinstance(value, str) and pattern.fullmatch(value) is not None
        return None if fits else f"{value!r} is not allowed here ({what})"

    if name in _INTEGERS:
        low, high = _INTEGERS[name]
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if fits else f"{value!r} is not a whole number from {low} to {high}"

    if name in _CHOICES:
        return None if value in _CHOICES[name] else f"{value!r} is not one of {', '.join(_CHOICES[name])}"
    if name == "exclusive":
        return None if isinstance(value, bool) else f"{value!r} is neither true nor false"

    if name == "setup":
        fits = isinstance(value, tuple) and all(isinstance(line, str) and line.isprintable() for line in value)
        return None if fits else "must be a list of shell lines, each on one line"
    return _check_environment(value)


def minutes(text: str) -> int:
    """Convert a time as SLURM writes it to minutes, rounded up.

    Args:
        text: MIN, MIN:SEC, H:MIN:SEC, D-H, D-H:MIN or D-H:MIN:SEC.

    Raises:
        UserError: it is none of these.
    """
    match = _TIME.fullmatch(text)
    if not match:
        raise UserError(f"--time: {text!r} is not a time; write minutes, HOURS:MIN:SEC or DAYS-HOURS[:MIN[:SEC]]")

    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    # With days the list starts at hours; without days SLURM reads one or two numbers as minutes and seconds.
    if days is not None:
        hours, mins, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:
        hours, (mins, seconds) = 0, (*numbers, 0)[:2]

    total = int(days or 0) * 1440 + hours * 60 + mins + (seconds + 59) // 60
    # Checked as a number too: 99999 days match the pattern.
    wrong = check("time", total)
    if wrong:
        raise UserError(f"--time {text}: in minutes, {wrong}")
    return total


def _find() -> Path:
    named = os.environ.get("ZOETROPE_CLUSTER")
    if named:
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    user_file = Path(folder).expanduser() / "zoetrope" / "cluster.yaml"
    return user_file if user_file.is_file() else SHIPPED


def _dotted(path: tuple) -> str:
    return ".".join(str(part) if str(part).isprintable() else repr(part) for part in path)


def _mapping(value: object, path: tuple, known: tuple[str, ...] | None, problem: Callable[[tuple, str], None]) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict):
        problem(path, "must be a table of `key: value` lines")
        return {}

    entries = {}
    for name, inner in value.items():
        if known is not None and name not in known:
            problem((*path, name), f"there is no such key{did_you_mean(str(name), known)}")
        else:
            entries[name] = inner
    return entries


def _section(value: object, path: tuple, problem: Callable[[tuple, str], None]) -> dict[str, Any]:
    """Return the valid values of `defaults` or of one partition; `key: null` equals a missing line."""
    section = {key: inner for key, inner in _mapping(value, path, FIELDS, problem).items() if inner is not None}
    for key in list(section):
        if key == "mem" and isinstance(section[key], int):  # SLURM reads a plain number as megabytes
            section[key] = str(section[key])

        wrong = check(key, section[key])
        if wrong:
            problem((*path, key), wrong)
            del section[key]
        elif key == "environment":
            section[key] = {name: _text(inner) for name, inner in section[key].items()}

    return section


def _check_environment(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return "must be a table of variables"

    for name, inner in value.items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            return f"{name!r} cannot be the name of a variable"
        # A newline in a value would become a line of the script.
        if not isinstance(inner, (str, int, float)) or not _text(inner).isprintable():
            return f"{name}: {inner!r} is not a text on one line"
    return None


def _text(value: object) -> str:
    # YAML's true and false: a shell variable gets 1 and 0.
    return str(int(value)) if isinstance(value, bool) else str(value)
