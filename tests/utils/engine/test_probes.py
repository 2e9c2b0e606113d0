"""Which head of a probe is the best, and what several heads do not go with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import methods
from utils.engine import probes
from utils.errors import UserError


def probe(*factors: float) -> nn.Module:
    sizes = {"width": 24, "depth": 1, "heads": 2, "num_class": 5, "num_segments": 4, "head": "linear"}
    return methods.build(type="probe", backbone="vit3d", lr_mults=factors, **sizes)


def test_best_is_the_first_of_the_highest() -> None:
    results = [{"top1": value} for value in (math.nan, 10.0, 30.0, 30.0)]
    assert probes.best_of(results) == 2
    assert (
        probes.best_of([{"top1": 9.0, "mean_average_precision": 1.0}, {"top1": 1.0, "mean_average_precision": 2.0}])
        == 1
    )
    assert probes.best_of([{"top1": math.nan}, {"top1": math.nan}]) == 0


def test_all_heads_is_undone_and_leaves_others_alone() -> None:
    net, clips = probe(1.0, 2.0).eval(), torch.zeros(2, 3, 4, 16, 16)
    assert probes.count(net) == 2
    with probes.all_heads(net):
        assert net(clips).shape == (2, 2, 5)
    assert net(clips).shape == (2, 5)
    assert probes.count(probe(1.0)) == probes.count(nn.Linear(1, 1)) == 0
    with probes.all_heads(nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize(
    ("precision", "distills", "message"), [("fp16", False, "precision: with fp16"), ("fp32", True, "common.distill")]
)
def test_what_mixes_heads_is_refused(precision: str, distills: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        probes.check(probe(1.0, 2.0), precision=precision, distills=distills)
    probes.check(probe(1.0), precision=precision, distills=distills)
