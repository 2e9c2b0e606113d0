"""What has happened to the cells of a sweep: `attempts.jsonl`, a row when one is submitted, starts and ends.

A start is noted by the job, on `local` by the sweep. A process that was killed leaves a start without an end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from utils import files
from utils.log import utc_stamp
from utils.schedulers import Place

FILE = "attempts.jsonl"


def note(folder: Path, cell: str, event: str, **more: object) -> None:
    """One row about a cell of the sweep in `folder`."""
    files.append_row(folder / FILE, {"cell": cell, "event": event, "time": utc_stamp(), **more})


@contextlib.contextmanager
def noted(folder: Path, cell: str, place: Place, *, is_main: bool) -> Iterator[None]:
    """Note the start and the end of a cell that a job runs in here; rank 0 does it for all."""
    job = {"scheduler": place.scheduler, "job": place.job}
    if is_main:
        note(folder, cell, "start", **job, restart=place.restarts)
    code = 1
    try:
        yield
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
        raise
    finally:
        if is_main:
            note(folder, cell, "end", **job, code=code)


def has_ended_well(folder: Path, cell: str, job: str) -> bool:
    """Return True if this very job has done the cell: somebody requeued it by hand."""
    return any((row.get("cell"), row.get("job"), row.get("code")) == (cell, job, 0) for row in read(folder))


def read(folder: Path) -> list[files.Row]:
    """The rows of a sweep, oldest first; none if nothing has been started."""
    return files.read_rows(folder / FILE)
