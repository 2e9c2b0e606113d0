"""Row: an error on one rank while the destruction of the process group never ends."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tests import test_exit


def row() -> dict[str, Any]:
    """Seconds from the error to the end of the process, text and code in place; the median of three."""
    seconds_of = {}
    for error in ("RuntimeError('CUDA out of memory')", "errors.UserError('this disk is full')"):
        seconds = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                _, shown, took = test_exit.run(error, Path(folder))
                output = shown + "".join(file.read_text() for file in Path(folder).glob("code.1.error"))
                code = (Path(folder) / "code.1").read_text()
            assert "out of memory" in output or "disk is full" in output, output
            assert code in ("1\n", "2\n"), code
            seconds.append(took)
        seconds_of[error] = round(sorted(seconds)[1], 3)
    return {"measured": {"seconds": seconds_of}, "holds": max(seconds_of.values()) <= 1.0}


if __name__ == "__main__":
    print(json.dumps(row()))
