"""The arithmetic behind docs/scaling.md, against the models and against bytes that gloo really sends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import scaling
from tests.benchmarks.scaling import Links, StepTraffic, exposed, seconds, sent, table, traffic
from tests.ranks import run_ranks
from utils.shards import ShardPlan

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("method", "backbone"), [("tsn", "mobilenetv2"), ("slowfast", "resnet50")])
def test_sizes_are_those_of_the_models(method: str, backbone: str) -> None:
    assert scaling.measure_sizes(method, backbone) == scaling.SIZES[method, backbone]


def test_the_table_names_methods_that_exist() -> None:
    """A new method need not be in it: it is one new file, and no other edit."""
    import methods

    papers = {"tsn", "tsm", "slowonly", "slowfast", "tpn", "pptsn", "pptsm"}
    assert papers <= {method for method, _ in scaling.SIZES} <= set(methods.names())


def test_payload_of_a_step() -> None:
    sizes = (1000, 3, 40)
    alone = traffic(sizes, ShardPlan(8, 4, 1, 0, 4))
    assert alone == StepTraffic(0.0, 0.0, 0.0, 0.0, 0, 1)
    whole = traffic(sizes, ShardPlan(8, 4, 8, 0, 4))
    assert whole == StepTraffic(4000.0, 4.0 * (2 * 83 + 80), 320.0, 56.0, 6, 4)
    halved = traffic(sizes, ShardPlan(8, 4, 4, 0, 4))
    assert halved.gradients == whole.gradients, "gradients are summed once a step, whatever the micro-batches"
    assert (halved.groups, halved.blocking) == (2 * whole.groups, 2 * whole.blocking)
    wider = traffic(sizes, ShardPlan(8, 4, 2, 0, 4))  # a group spans more shards than ranks: two shards in one piece
    assert (wider.span, wider.blocking) == (2, 12)
    payload = traffic(sizes, ShardPlan(8, 4, 8, 0, 1), sync_stats=False)
    assert (payload.groups, payload.bn_stats, payload.blocking) == (0.0, 0.0, 0)


def test_times() -> None:
    links = Links(inside=100e9, net=10e9, per_node=8, latency_inside=0.0, latency_net=0.0)
    assert sent(100.0, 4) == 150.0
    assert seconds(1e9, 8, links) == pytest.approx(1.75e9 / 100e9)
    assert seconds(1e9, 16, links) == pytest.approx(1.875e9 / 10e9)
    assert seconds(1e9, 1, links) == 0.0
    waits = exposed(StepTraffic(1e8, 0.0, 0.0, 56.0, 0, 1), 16, 0.3, links)
    assert waits["gradients"] == pytest.approx(sent(scaling.BUCKET, 16) / 10e9), "the rest hides behind backward"


def test_fewer_gpus_for_the_same_batch_wait_less() -> None:
    sizes = scaling.SIZES["tsm", "resnet50"]
    rows = table(sizes, 0.25, Links(), group=8, total=64)
    assert [row["gpus"] for row in rows] == [8, 16, 32, 64]
    assert [row["micro_batches"] for row in rows] == [8, 4, 2, 1]
    efficiency = [row["efficiency"] for row in table(sizes, 0.25, Links(), group=8)]
    assert efficiency == sorted(efficiency, reverse=True)
    assert 0.8 < efficiency[-1] < efficiency[0] < 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_gloo_sends_what_is_predicted(ranks: int) -> None:
    if ranks == 1:
        from utils.dist import World

        counts = [scaling.count(World(), steps=1)]
    else:
        counts = run_ranks(__file__, "counted", ranks, timeout=120)
    for one in counts:
        assert one["ratio"] == pytest.approx(1.0, abs=0.01)


def counted(world):  # noqa: ANN001, ANN201
    """On each rank."""
    return scaling.count(world, steps=1)


def test_the_tables_of_the_documentation_are_what_the_script_prints() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    argv = [sys.executable, "-m", "tests.benchmarks.scaling", "--method", "tsm"]
    output = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() in text
    program = "import sys; from tests.benchmarks import scaling; scaling.main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False).returncode == 0
