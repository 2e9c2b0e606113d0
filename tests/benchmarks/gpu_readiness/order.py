"""Row: the order of collectives is equal on all ranks: plans of shards, accumulation, BN groups, precise BN."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.conftest import ROOT
from tests.fake_cuda.test_order import PLANS


def row(plans: int = len(PLANS)) -> dict[str, Any]:
    """Compare the ranks of each plan, with and without precise batch norm."""
    unequal, counts = [], {}
    for plan in PLANS[:plans]:
        for precise in ([], ["precise"]):
            words = [*map(str, plan.values), *precise]
            command = [sys.executable, "-m", "tests.fake_cuda.order", *words]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
            lines = set(done.stdout.splitlines())
            counts[f"{plan.id}{' precise' * bool(precise)}"] = len(json.loads(min(lines)))
            unequal += [words] if len(lines) != 1 else []
    return {"measured": {"collectives": counts, "unequal": unequal}, "holds": not unequal}


if __name__ == "__main__":
    print(json.dumps(row()))
