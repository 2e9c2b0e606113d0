"""An evaluation sweep with real trials: each choice is a result of its own, and the sweep comes to its end."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import methods
from anal_tools.evaluate.results import Results
from launch import collect, sweep
from tests.experiment import few_videos, make
from utils import checkpoint


@pytest.mark.system
def test_trials_of_an_evaluation_sweep_are_results_of_their_own(
    tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = make(tmp_path / "exp", motion_videos)
    torch.manual_seed(0)
    net = methods.build(type="tsn", backbone="resnet18", num_class=8, num_segments=2)
    checkpoint.save(exp, checkpoint.LATEST, {"model": net.state_dict(), "step": 1})
    few = few_videos(exp, motion_videos)
    words = ["s1.0", "local", "0", "--into", str(tmp_path / "sweeps"), "--exp", str(exp), "--verb", "eval"]
    words += ["--parallel", "2", "--grid", "eval.average=prob,logit", few]
    assert sweep.main(words) == 0
    names = Results.names(exp)
    assert len(names) == 2
    assert all(name.startswith("s1.0.") for name in names)
    assert sorted(str(Results.load(exp, name).protocol["average"]) for name in names) == ["logit", "prob"]
    capsys.readouterr()
    assert sweep.main(words) == 0
    assert "2 trials (2 done), 0 to run" in capsys.readouterr().out
    assert collect.main(["s1.0", "--into", str(tmp_path / "sweeps"), "--no-picture"]) == 0
    with (tmp_path / "sweeps/s1.0/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["eval.average"], row["num_videos"]) for row in rows] == [("prob", "4"), ("logit", "4")]
