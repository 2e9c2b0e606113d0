"""Keep the list of an experiment's jobs, `jobs/jobs.jsonl`, and ask their schedulers about them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from utils import files, schedulers
from utils.schedulers import Scheduler

FILE = Path("jobs/jobs.jsonl")
ROOT = Path(__file__).resolve().parents[1]
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # an id becomes part of commands and file names


def record(exp: Path, row: files.Row) -> None:
    """Append a job to the experiment's list, and the experiment to the user's list of experiments."""
    files.append_row(exp / FILE, row)

    listed = _registry()
    # The experiment may be anywhere: `launch list` finds it through the user's own list.
    try:
        if str(exp) not in {str(entry.get("exp")) for entry in files.read_rows(listed)}:
            files.append_row(listed, {"exp": str(exp)})
    except OSError:
        return  # the home folder is not writable: `launch list` then finds only experiments in exps/


def submitted(exp: Path) -> list[files.Row]:
    """Return the jobs of an experiment, oldest first."""
    rows = files.read_rows(exp / FILE)
    return [row for row in rows if isinstance(row.get("job"), str) and _ID.fullmatch(row["job"])]


def experiments(folders: Iterable[Path]) -> list[Path]:
    """Return experiments with jobs below `folders`; without folders those in exps/ and those the user has submitted."""
    given = list(folders)
    exps = {file.parent.parent.resolve() for folder in given or [ROOT / "exps"] for file in folder.rglob(str(FILE))}
    if not given:
        listed = {Path(str(row.get("exp"))) for row in files.read_rows(_registry())}
        exps |= {exp.resolve() for exp in listed if (exp / FILE).is_file()}
    return sorted(exps)


def scheduler_of(row: files.Row) -> Scheduler:
    """Return the scheduler of a job. Rows from older versions name none: those jobs ran on SLURM."""
    return schedulers.named(row.get("scheduler", "slurm"))


def states(rows: Iterable[files.Row]) -> dict[str, str]:
    """Return the state of each pending or running job, such as ``RUNNING`` or ``PENDING (Resources)``.

    Raises:
        UserError: a scheduler does not answer.
    """
    asked: dict[Scheduler, list[str]] = {}  # one query per scheduler, not per job
    for row in rows:
        asked.setdefault(scheduler_of(row), []).append(row["job"])
    return {job: state for scheduler, ids in asked.items() for job, state in scheduler.states(ids).items()}


def live(exp: Path, verb: str | None = None) -> dict[str, files.Row]:
    """Return the rows of the experiment's pending and running jobs, each with its `state`, by id."""
    rows = [row for row in submitted(exp) if verb in (None, row.get("verb"))]
    state_of = states(rows)
    return {row["job"]: {**row, "state": state_of[row["job"]]} for row in rows if row["job"] in state_of}


def _registry() -> Path:
    folder = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(folder).expanduser() / "zoetrope" / "experiments.jsonl"
