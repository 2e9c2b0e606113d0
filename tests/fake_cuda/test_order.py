"""All ranks start the same collectives in the same order: gradients, accumulation, groups of batch norm, totals."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

NIGHTLY = pytest.mark.nightly
PLANS = [  # shards of the global batch, shards of a BN group, ranks
    pytest.param(6, 6, 3, id="one group, two micro-batches of three ranks", marks=NIGHTLY),
    pytest.param(8, 2, 4, id="two groups at once, two micro-batches"),
    pytest.param(4, 1, 4, id="no groups", marks=NIGHTLY),
    pytest.param(4, 2, 4, id="two groups", marks=NIGHTLY),
    pytest.param(4, 4, 4, id="one group", marks=NIGHTLY),
    pytest.param(8, 8, 4, id="a group over two micro-batches", marks=NIGHTLY),
    pytest.param(8, 1, 2, id="four micro-batches", marks=NIGHTLY),
    pytest.param(9, 3, 3, id="three groups of three ranks", marks=NIGHTLY),
]


@pytest.mark.parametrize(("total", "group", "ranks"), PLANS)
def test_the_same_order_on_every_rank(total: int, group: int, ranks: int) -> None:
    words = [str(total), str(group), str(ranks), "precise"]
    command = [sys.executable, "-m", "tests.fake_cuda.order", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, *others = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(others) == ranks - 1
    assert all(other == first for other in others)
    gradients = [shape[0] for _, shape, kind, _ in first if kind == "torch.float32" and len(shape) == 1]
    assert sum(gradients) > 11_000_000, "the weights of ResNet-18"
    kinds = {name for name, *_ in first}
    assert any(shape == [7] for _, shape, *_ in first), "the numbers of the step"
    assert len(first) > (20 * total // ranks if group > 1 else 2), kinds
