"""The acceptance table of issue 02, cluster. `make accept ISSUE=02 [ROWS=a,b]` prints one JSON line a row."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import checks02  # noqa: E402
import checks02b  # noqa: E402
from rows import run_rows, workspace  # noqa: E402


@checks02.skipped
def clone() -> dict:
    """2 nodes x 2 tasks from a clean clone, and local 4."""
    return checks02.from_a_clone(workspace())


@checks02.skipped
def events() -> dict:
    """A run with at least 5 events of every kind, and the undisturbed run."""
    return checks02.disturbed(workspace())


@checks02.skipped
def evaluation() -> dict:
    """An evaluation on 4 ranks that is preempted once, and local 1."""
    return checks02.preempted_evaluation(workspace())


@checks02.skipped
def shape() -> dict:
    """A request of 32."""
    return checks02.shape_of_32(workspace())


@checks02.skipped
def hostile() -> dict:
    """Names with spaces, quotes, newlines and shell in them."""
    return checks02.hostile(workspace())


def elastic() -> dict:
    """4 -> 2 -> 4 ranks in one run against a fixed world."""
    return checks02b.elastic_ranks(workspace())


def hang() -> dict:
    """A frozen rank, and a decode that does not end."""
    return checks02b.hangs(workspace())


@checks02.skipped
def sweep() -> dict:
    """Six cells as a real job array; one fails, the last is requeued, the retry runs one."""
    work = workspace()
    os.environ.update(checks02.slurm(work).env)  # the sweep runs in this SLURM
    return checks02b.sweep_on_slurm(work)


ROWS = {
    "elastic": (*checks02b.ROWS["elastic"], elastic),
    "hang": (*checks02b.ROWS["hang"], hang),
    "sweep": (*checks02b.ROWS["sweep"], sweep),
    "stop_overhead": (*checks02b.ROWS["stop_overhead"], checks02b.stop_overhead),
    "clone": ("train.sh VI_SP_VA_1080TI 4, 2 nodes x 2, from a clean clone", "sha256 as local 4", clone),
    "events": (
        "preempted (both signal styles), time limit, node killed, rank killed -9, requeued by hand",
        "sha256 of weights, BN, momentum, loss log as undisturbed; restarts counted; each <= 90 s",
        events,
    ),
    "eval": ("eval.sh VI_SP_VA_1080TI 4, preempted once", "each once, local 1 within 1e-5", evaluation),
    "shape": ("32-task request", "4 nodes x 8 tasks, GPUs, requeue on, signal set", shape),
    "hostile": ("hostile partition, account, class name, path", "refused or quoted; no canary", hostile),
}

if __name__ == "__main__":
    sys.exit(run_rows(ROWS, "02"))
