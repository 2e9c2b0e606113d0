"""Each row that `make accept` names is found, and each module of measurements is named by a row or helps one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.benchmarks import issues
from tests.benchmarks.training import stop_overhead
from tests.conftest import ROOT
from utils.dist import World


@pytest.mark.parametrize("issue", issues.ISSUES)
def test_each_row_has_a_claim_a_figure_and_a_function(issue: str) -> None:
    for row, module in issues.ISSUES[issue].items():
        claim, figure, function = issues.rows_of(issue)[row]
        assert claim, row
        assert figure, row
        benchmark = issues.loaded(module)
        assert callable(function), row
        assert callable(benchmark.row if module.startswith("reliability.") else benchmark.ROWS[row][2]), row


def test_no_row_is_left_out() -> None:
    named = {(module, row) for rows in issues.ISSUES.values() for row, module in rows.items()}
    modules = sorted({module for module, _ in named if not module.startswith("reliability.")})
    there = {(module, row) for module in modules for row in issues.loaded(module).ROWS}
    assert there - named == {("data.memcached", "client_cpu")}  # a figure of the docs that no issue promised


def test_the_price_of_the_stop_agreement_is_measured_on_any_number_of_ranks() -> None:
    times = stop_overhead.measure(World(), steps=2, seconds=0.0)
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys(
        [name for side in stop_overhead.SIDES for name in (side, f"cpu {side}")], 2
    )


QUICK = {  # module: rows that take seconds and need no network, cluster or media
    "training.config": ("published_config", "config_errors"),
    "training.exactness": ("sync_bn",),
    "methods.figures": ("figures",),
    "methods.by_tests": ("golden", "operators", "toy"),
    "analysis.golden": ("golden",),
    "analysis.evaluation": ("metrics",),
    "data.dump": ("dump_kill",),
    "interop.weights": ("hostile",),
}


@pytest.mark.nightly
@pytest.mark.parametrize(("module", "row"), [(module, row) for module, rows in QUICK.items() for row in rows])
def test_a_quick_row_holds(module: str, row: str) -> None:
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", "--rows", row]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["holds"]
