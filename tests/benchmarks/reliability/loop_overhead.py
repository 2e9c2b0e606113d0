"""Loop overhead: steps of main.train and of a bare PyTorch loop in turn, with an interval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.reliability.pairs import compare

ROOT = Path(__file__).resolve().parents[3]


def row(processes: int = 4) -> dict[str, Any]:
    """Measure the CPU seconds of each step, ours over bare; 24 pairs in each process."""
    ours, bare = [], []
    for _ in range(processes):
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.training.bare_loop"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = json.loads(done.stdout.strip().splitlines()[-1])["seconds"]
        ours += seconds["ours"]
        bare += seconds["bare"]
    measured = compare(ours, bare)
    return {"measured": measured, "holds": measured["median"] <= 1.01 and measured["high"] <= 1.03}


if __name__ == "__main__":
    print(json.dumps(row()))
