"""What the agreement to stop costs in a step of 100 ms on 2 ranks: the same steps with and without it, paired.

Each step is a sleep in place of the forward and
backward pass (gloo's own threads run meanwhile, as the GPU would), an all-reduce of gradients, and the sum of the
step's numbers; the side `with` carries the two wishes in it and looks at the answer, the side `without` sums the
five numbers of a loop that cannot be stopped, the side `nothing` sums none. Sides take turns step by step in one
process, so that all see the same machine. The sleep is 25 ms, for four times as many pairs in the same time: the cost
in seconds is what is measured, and it is given in per cent of 100 ms.
"""

from __future__ import annotations

import statistics
import sys
import time

from tests.benchmarks.rows import run_rows
from tests.ranks import run_ranks

STEPS, SLEEP, GRADIENTS = 400, 0.025, 100_000
STEP = 0.100  # seconds
SIDES = ("with", "without", "nothing")


def measure(world, *, steps: int = STEPS, seconds: float = SLEEP) -> dict[str, list[float]]:  # noqa: ANN001
    """Wall seconds and CPU seconds of each step of both sides, on this rank."""
    import torch

    from utils.engine.totals import NAMES, SHARED
    from utils.signals import StopFlag

    names = (*NAMES, *SHARED)
    gradients = torch.zeros(GRADIENTS)
    times = {name: [] for side in SIDES for name in (side, f"cpu {side}")}
    with StopFlag() as stop:
        for index in range(3 * steps):
            side = SIDES[(index + index // 3) % 3]  # in the order a b c b c a c a b
            world.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            totals = torch.zeros(len(names) if side == "with" else len(names) - 2, dtype=torch.float64)
            if side == "with":
                totals[-3:] = torch.tensor([0.0, stop.received, False])
            pending = None if side == "nothing" else world.sum_async(totals)
            time.sleep(seconds)
            world.sum_(gradients)
            values = pending.read().tolist() if pending else []
            if side == "with":
                numbers = dict(zip(names, values, strict=True))
                assert numbers["stop"] + numbers["save"] == 0
            times[side].append(time.perf_counter() - began)
            times[f"cpu {side}"].append(time.process_time() - cpu)
    return times


def summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Overhead in per cent of 100 ms: the median difference of neighbouring steps, wall and CPU."""

    def more(side: str, than: str) -> float:
        return statistics.median(a - b for a, b in zip(seconds[side], seconds[than], strict=True))

    wall, cpu = more("with", "without"), more("cpu with", "cpu without")
    return {
        "measured_step_ms": round(1000 * statistics.median(seconds["without"]), 3),
        "overhead_us": round(1e6 * wall, 1),
        "overhead_percent": round(100 * wall / STEP, 4),
        "cpu_percent": round(100 * cpu / STEP, 4),
        "against_no_sum_at_all_percent": round(100 * more("with", "nothing") / STEP, 4),
        "pairs": len(seconds["with"]),
    }


def stop_overhead() -> dict:
    """Run both ranks; the worse of them counts."""
    both = [summary(seconds) for seconds in run_ranks(__file__, "measure", 2, timeout=280)]
    measured = max(both, key=lambda one: one["overhead_percent"])
    return {"measured": measured, "holds": measured["overhead_percent"] <= 0.5}


ROWS = {"stop_overhead": ("overhead of the stop agreement on a 100 ms step", "<= 0.5 %", stop_overhead)}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
