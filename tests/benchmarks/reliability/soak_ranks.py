"""Stops, kills and preemptions with 3, 4 and 6 ranks at drawn moments: every bit as in an undisturbed run."""

from __future__ import annotations

import json
from typing import Any

from tests.benchmarks.reliability import soak

HITS = 60


def row(minutes: float = 60.0) -> dict[str, Any]:
    """Disturb until 60 events have hit, 10 at least in each phase, or the time is over."""
    _, summary = soak.run((3, 4, 6), minutes, HITS, seed=soak.drawn_seed())
    enough = summary["hits"] >= HITS and all(hits >= soak.ENOUGH for hits in summary["by_phase"].values())
    return {"measured": summary, "holds": enough and not summary["faults"]}


if __name__ == "__main__":
    print(json.dumps(row()))
