"""The script for the first GPU runs from its first row to its last on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "tests" / "gpu" / "one_gpu.py"


def run(*words: str) -> tuple[int, list[dict], str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=290, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stdout


@pytest.mark.nightly
def test_every_row_rehearses(tmp_path: Path) -> None:
    out = tmp_path / "figures.jsonl"
    code, rows, shown = run("--rehearse", "--smoke", "--out", str(out))
    assert [row["row"] for row in rows if not row["holds"]] == [], shown
    assert code == 0
    assert len(rows) == 13
    assert shown.count("\n| ") >= 13, "the table"

    # What is in the file is not measured again; a row that failed is.
    kept = out.read_text().splitlines()
    broken = json.loads(kept[0]) | {"holds": False}
    out.write_text("\n".join([json.dumps(broken), *kept[1:]]) + "\n")
    code, again, _ = run("--rehearse", "--smoke", "--out", str(out))
    assert [row["row"] for row in again] == [broken["row"]]


@pytest.mark.parametrize("words", [("--rows", "env", "--limit", "0.05")])
def test_the_limit_ends_it_with_a_table(words: tuple[str, ...]) -> None:
    code, _, shown = run("--rehearse", *words)
    assert code == 3
    assert "stopped at the limit" in shown
