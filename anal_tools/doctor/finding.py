"""Define the result of one check of `main.py doctor`, and the subject that all checks look at."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from utils.config import Config

NONE = "none"  # absent, and nothing needs it
AVERAGES = {"sgd": 1, "adamw": 2}  # tensors that an optimiser keeps for each parameter
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: a finding, and what to do about it unless all is well."""

    level: Literal["ok", "warning", "error"]
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return self.text + (f"; {self.advice}" if self.advice else "")


def ok(text: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding("ok", text)


def warning(text: str, advice: str) -> Finding:
    """Return a finding that does not stop a run."""
    return Finding("warning", text, advice)


def error(text: str, advice: str) -> Finding:
    """Return a finding that stops a run or makes its numbers wrong."""
    return Finding("error", text, advice)


@dataclass
class Subject:
    """The machine and the experiment that the checks look at; earlier checks fill it in for later ones.

    Attributes:
        exp: experiment folder, if one was named.
        overrides: `key=value` texts for its config.
        deadline: monotonic time at which the current check is abandoned.
        cfg: config of `exp`, once the check `config` has loaded it.
        lists: split -> records of each list that could be read.
        parameters: number of parameters of the model, once the check `weights` has built it.
    """

    exp: Path | None = None
    overrides: tuple[str, ...] = ()
    deadline: float = float("inf")
    cfg: Config | None = None
    lists: dict[str, Records] = field(default_factory=dict)
    parameters: int = 0


@functools.cache
def cores() -> int:
    """Return how many CPU cores this process may use, by its affinity and the quota of its container."""
    import os

    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    # At least one, because a quota may be a fraction of a core
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def cpu_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Return the cores that the container's quota grants; None without a quota."""
    try:
        share, _, period = file.read_text("utf-8").strip().partition(" ")
        return int(share) / int(period)  # "max" is no integer: no quota
    except (OSError, ValueError):
        return None


def size(count: float) -> str:
    """Return a number of bytes with three or four digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
