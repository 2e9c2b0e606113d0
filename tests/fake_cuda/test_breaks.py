"""torch.compile breaks the graph of a training step only where it is known to, and compiles nothing in later steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.fake_cuda.cases import METHODS

NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name == "slowfast" else NIGHTLY) for name in METHODS]
)
def test_only_dropout_breaks_the_graph(method: str) -> None:
    # Its masks come from a generator that is seeded for each shard, which a graph cannot hold. With torch 2.11 the
    # same lines also break in torch's own file.
    known = {"utils/draws.py", "polyfills/__init__.py"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.fake_cuda.breaks", method]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert "utils/draws.py" in result["files"]
    assert set(result["files"]) <= known
    assert result["more"] == 0
    # Each dropout ends a graph, and its arithmetic is one or two more. TPN has a second one before its auxiliary
    # classifier, and transformers also drop paths, twice in the second of their two blocks.
    torch_breaks = "polyfills/__init__.py" in result["files"]
    assert result["graphs"] <= 1 + 3 * result["dropouts"] + torch_breaks
