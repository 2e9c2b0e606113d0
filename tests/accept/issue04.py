"""The acceptance table of issue 04, evaluation and analysis. `make accept ISSUE=04 [ROWS=a,b]`: one JSON line a row."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import checks04  # noqa: E402
import checks04_report  # noqa: E402
from rows import run_rows, workspace  # noqa: E402


def exact() -> dict:
    """Ranks and chunks."""
    return checks04.exact(workspace())


def bench_dense() -> dict:
    """Time and memory of 30 views beside the peer's."""
    return checks04.bench_dense(workspace())


def kill() -> dict:
    """Ten kills of one evaluation."""
    return checks04.kill(workspace())


def rescoring() -> dict:
    """Smaller protocols out of kept views."""
    return checks04.rescoring(workspace())


ROWS = {
    "golden": ("indices, boxes, sizes, metrics and LR points of four peers", "all equal", checks04.golden),
    "exact": ("world size 1, 2, 3 and chunk 1, 7, 30 on 23 videos", "per-view scores <= 1e-5, each video once", exact),
    "bench_dense": (
        "30 views at 112 on CPU, paired against mmaction2 1.2.0's own test, CPU-seconds, one thread",
        "SlowOnly <= 0.85x, TPN <= 0.95x; <= 1.0x its --max-views 5; memory above the model <= 0.45x",
        bench_dense,
    ),
    "kill": ("kill -9 at 10 moments of an evaluation", "continues, result identical", kill),
    "metrics": ("metrics on random data", "scikit-learn or the formula, 1e-9", checks04.metrics),
    "rescoring": ("1, 3, 10 out of 30 kept views", "running those protocols, 1e-5", rescoring),
    **checks04_report.ROWS,
}

if __name__ == "__main__":
    sys.exit(run_rows(ROWS, "04"))
