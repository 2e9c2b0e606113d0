"""Print each figure of the reliability programme as one JSON line. `make accept ISSUE=07 [ROWS=a,b]`.

A row stands in a file of its own in `tests/benchmarks/reliability/`, has a function `row()` and also runs alone:
`python -m tests.benchmarks.reliability.NAME`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from rows import run_rows  # noqa: E402

# row: (claim, figure); the function is tests/benchmarks/reliability/NAME.py:row
CLAIMS: dict[str, tuple[str, str]] = {}


def measure(name: str) -> dict:
    """Import the file of a row and measure it."""
    return importlib.import_module(f"tests.benchmarks.reliability.{name}").row()


ROWS = {name: (*claim, functools.partial(measure, name)) for name, claim in CLAIMS.items()}

if __name__ == "__main__":
    sys.exit(run_rows(ROWS, "07"))
