"""Compare the cost of our step with the same step in a bare PyTorch loop; bare_loop.py times both in turn."""

from __future__ import annotations

import json
import statistics
import sys

from tests.benchmarks.rows import command, run_rows


def loop_overhead(rounds: int, case: str, bound: float) -> dict:
    """Run our steps and a bare loop's in turn in one process; return the CPU ratio, median over processes."""
    ratios = []
    for _ in range(rounds):
        done = command("-m", "tests.benchmarks.training.bare_loop", case, env={"OMP_NUM_THREADS": "1"})
        ratios.append(json.loads(done.stdout.strip().splitlines()[-1])["ours_over_bare"])
    median = statistics.median(ratios)
    return {"measured": {"median": round(median, 4), "rounds": [round(r, 4) for r in ratios]}, "holds": median <= bound}


ROWS = {
    "overhead": (
        "training step / bare PyTorch step, R18 TSN 4x8x112x112",
        "<= 1.02",
        lambda: loop_overhead(rounds=7, case="tsn", bound=1.02),
    ),
    "recipe_overhead": (
        "training step with VideoMAE's whole recipe / bare PyTorch step, ViT-S 2x16x112x112",
        "<= 1.05",
        lambda: loop_overhead(rounds=5, case="videomae", bound=1.05),
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
