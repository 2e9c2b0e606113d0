"""One stop each with three and with four ranks: the run ends with every bit of one that was not stopped.

Two ranks would show nothing: a + b = b + a. The whole programme is `make soak`.
"""

from __future__ import annotations

from tests.benchmarks.reliability import soak

SETTINGS = {
    "val_freq": 4,
    "lr_scheduler.max_iter": 4,
    "lr_scheduler.warmup_steps": 1,
    "augmentation.mix_up": 0.2,
    "model.kwargs.bn_sync_stats": True,
}


def case(ranks: int, point: str, action: str, **settings: object) -> dict[str, object]:
    event = {"phase": "step", "point": point, "rank": ranks - 1, "count": 2, "action": action}
    return {"ranks": ranks, "settings": {**SETTINGS, **settings}, "events": [event]}


def test_a_stop_with_three_and_with_four_ranks_changes_no_bit() -> None:
    accumulating = {"shards": 8, "model.kwargs.bn_group_size": 2, "ema": 0.9, "clip_grad": 0.5}
    saving = {"save_minutes": 1e-9, "precision": "fp64", "precise_bn.batches": 1}
    cases = [
        case(3, "phase.optimiser step", "term", **accumulating | {"shards": 6, "model.kwargs.bn_group_size": 3}),
        case(4, "phase.forward/backward", "kill", **accumulating | saving),
    ]
    lines, summary = soak.run((3, 4), plan=cases)
    assert summary["faults"] == 0, lines
    assert [line["hits"] for line in lines] == [["phase.optimiser step:2:2:term"], ["phase.forward/backward:3:2:kill"]]
