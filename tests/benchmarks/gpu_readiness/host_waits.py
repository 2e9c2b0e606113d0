"""Row: host waits in a training step on a fake GPU, every method and precision; with and without a log line."""

from __future__ import annotations

import json
from typing import Any

from tests.fake_cuda import build
from tests.fake_cuda.cases import METHODS


def row(methods: tuple[str, ...] = tuple(METHODS)) -> dict[str, Any]:
    """Count the waits of each case that trains."""
    cases = {f"{name} {case['case']}": case for name in methods for case in build.run("cases", name, timeout=900)}
    training = {name: case for name, case in cases.items() if "waits_of_a_log_line" in case}
    waits = {name: len(case["waits"]) for name, case in training.items()}
    with_line = {name: len(case["waits"]) + len(case["waits_of_a_log_line"]) for name, case in training.items()}
    measured = {"cases": len(cases), "of training": len(training), "waits": sorted(set(waits.values()))}
    measured["with a log line"] = sorted(set(with_line.values()))
    return {
        "measured": measured,
        "holds": set(waits.values()) == {1} and max(with_line.values()) <= 2 and len(cases) >= 60,
    }


if __name__ == "__main__":
    print(json.dumps(row()))
