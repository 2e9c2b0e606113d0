"""The acceptance table of issue 03, methods. `make accept ISSUE=03 [ROWS=a,b]` prints one JSON line a row.

Rows that train take ZOETROPE_ACCEPT_ONLY=tsn,tsm: only these methods; such a row holds for no issue.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import checks03  # noqa: E402
from rows import run_rows, workspace  # noqa: E402


def figures() -> dict:
    """Parameters, state-dict tensors and GMACs of every model on the fact sheet."""
    return checks03.figures()


def weizmann() -> dict:
    """Seven methods from scratch on real people."""
    return checks03.weizmann(workspace())


def golden() -> dict:
    """Losses of five seeded steps of every method, float64."""
    return checks03.by_test("tests/methods/test_golden_losses.py")


def order() -> dict:
    """Who can tell a motion from its reverse."""
    return checks03.order(workspace())


def operators() -> dict:
    """Every operator against a closed form or a slow reference."""
    return checks03.operators()


def teacher() -> dict:
    """A small student alone and with a teacher."""
    return checks03.teacher(workspace())


def toy() -> dict:
    """One new method file in a copy of the repository."""
    return checks03.by_test("tests/test_toy_method.py")


def experiments() -> dict:
    """Not a row of the table: every shipped experiment builds and trains one step."""
    return checks03.by_test("tests/test_experiments.py")


ROWS = {
    "figures": ("parameters, tensors, GMACs of every model on the fact sheet", "equal", figures),
    "weizmann": (
        "every method from scratch on weizmann4",
        "top-1 of the last checkpoint >= .75, <= 8 CPU minutes each",
        weizmann,
    ),
    "golden": ("5-step golden losses", "rtol 1e-4", golden),
    "order": ("order-blind and order-aware on motion8", "TSN <= .60; TSM, SlowOnly, SlowFast, TPN >= .90", order),
    "operators": ("operators against closed forms or slow references", "exact or <= 1e-6", operators),
    "teacher": ("small student alone, with kd, with dml; 3 seeds", "measured table", teacher),
    "toy": ("one new method file", "found by list, contract tests, train.sh", toy),
    "experiments": ("every experiment folder", "one training step each", experiments),
}

if __name__ == "__main__":
    sys.exit(run_rows(ROWS, "03"))
