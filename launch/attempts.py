"""Record the history of a sweep's trials: `attempts.jsonl` has a row for each submission, start and end.

The job records its start; on `local` the sweep does. A process that was killed leaves a start without an end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from utils import files, renamed
from utils.log import utc_stamp
from utils.schedulers import Place

FILE = "attempts.jsonl"


def note(folder: Path, trial: str, event: str, **more: object) -> None:
    """Append one row about a trial of the sweep in `folder`."""
    files.append_row(folder / FILE, {"trial": trial, "event": event, "time": utc_stamp(), **more})


@contextlib.contextmanager
def noted(folder: Path, trial: str, place: Place, *, is_main: bool) -> Iterator[None]:
    """Record the start and the end of a trial that runs in this job; rank 0 does it for all ranks."""
    job = {"scheduler": place.scheduler, "job": place.job}
    if is_main:
        note(folder, trial, "start", **job, restart=place.restarts)

    code = 1  # any exception but SystemExit: the process ends with this code
    try:
        yield
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
        raise
    finally:
        if is_main:
            note(folder, trial, "end", **job, code=code)


def has_ended_well(folder: Path, trial: str, job: str) -> bool:
    """Return True if this very job has already done the trial, because a user requeued it."""
    return any((row.get("trial"), row.get("job"), row.get("code")) == (trial, job, 0) for row in read(folder))


def read(folder: Path) -> list[files.Row]:
    """Return the rows of a sweep, oldest first; none if nothing has been started."""
    return [renamed.row(row) for row in files.read_rows(folder / FILE)]
