"""What has happened to the cells of a sweep: `attempts.jsonl`, a row when one is submitted, starts and ends.

A row is written by the process that runs the cell, so a killed one leaves a start without an end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch import progress
from utils.log import utc_stamp

FILE = "attempts.jsonl"


def note(folder: Path, cell: str, event: str, **more: Any) -> None:
    """One row about a cell of the sweep in `folder`."""
    progress.append_row(folder / FILE, {"cell": cell, "event": event, "time": utc_stamp(), **more})


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of a sweep, oldest first; none if nothing has been started."""
    return progress.read_rows(folder / FILE)
