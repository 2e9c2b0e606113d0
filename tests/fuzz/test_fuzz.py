"""A short run of every fuzz target, and that the runner notices what it claims to. `make fuzz` runs longer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz import runner

SEED = 20
COUNT, SECONDS = 150, 3.0  # whichever comes first


@pytest.mark.parametrize("name", runner.targets())
def test_target(name: str) -> None:
    outcome = runner.fuzz(name, count=COUNT, seed=SEED, seconds=SECONDS, trace_every=0)
    assert outcome.failures == []
    assert outcome.inputs >= 20
    assert outcome.passing >= runner.PASSING_SHARE
    assert 0 < outcome.corpus_bytes <= runner.CORPUS_BYTES


TARGET = """
import os, subprocess, time
NAME = "{name}"
MODULES = ["tests/fuzz/mutators.py"]

def seeds():
    return [b"good"]

def mutate(rng, data):
    return b"bad"

def run(data, folder):
    if data == b"bad":
        {body}
    return "ok"
"""


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("trace", "raise KeyError(data)"),
        ("hang", "sum(range(10**12))"),
        ("memory", "bytearray(200 << 20)"),
        ("memory", "for n in range(99): globals().setdefault('kept', []).append(bytearray(8 << 20)); time.sleep(0.01)"),
        ("executed", "exec('1')"),
        ("executed", "subprocess.run(['true'])"),
        ("executed", "open('/tmp/zoetrope-fuzz-outside', 'ab').close(); os.remove('/tmp/zoetrope-fuzz-outside')"),
        ("crash", "os.abort()"),
    ],
)
def test_the_runner_notices(kind: str, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"_check_{kind}_{random.randrange(10**9)}"
    file = runner.HERE / f"{name}.py"
    monkeypatch.setattr(runner, "HANG_SECONDS", 1.0 if kind == "hang" else 60.0)
    monkeypatch.setattr(runner, "MEMORY_BYTES", 64 << 20)
    try:
        file.write_text(TARGET.format(name=name, body=body))
        outcome = runner.fuzz(name, count=1, seed=SEED, trace_every=0, keep=tmp_path)
    finally:
        file.unlink(missing_ok=True)
    assert [failure["kind"] for failure in outcome.failures] == [kind], outcome.failures
    assert Path(outcome.failures[0]["file"]).is_file()
    assert (tmp_path / f"{name}-{SEED}-0.bin").read_bytes() == b"bad"


def test_coverage_counts_lines_that_run_in_functions(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        '"""Text."""\n\nA = 1\n\n\nclass B:\n    """Text."""\n\n    c = 2\n\n    def d(self):\n        return 3\n'
    )
    inside, outside = runner.executable_lines(file)
    assert inside == {12}
    assert {3, 6, 9, 11} <= outside
