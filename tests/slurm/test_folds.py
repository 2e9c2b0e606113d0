"""Folds as a job array on a real SLURM: two ranks train and evaluate a fold, one task is requeued."""

from __future__ import annotations

from pathlib import Path

import pytest

from anal_tools.evaluate.results import Results
from launch import attempts
from tests.launch.test_folds import experiment
from tests.slurm.cluster import PARTITION, LocalSlurm, until

pytestmark = [pytest.mark.slurm, pytest.mark.nightly]


@pytest.mark.slow
def test_an_array_that_is_requeued_gives_each_fold_once(slurm: LocalSlurm, tmp_path: Path, motion_videos: Path) -> None:
    exp = experiment(tmp_path / "it's a; fold", motion_videos, steps=6, val_freq=6)
    output = slurm.launch("train", exp, PARTITION, "2", "--parallel", "2").stdout
    array = output.split("as job ")[1].split(",")[0]
    log = exp / "folds/02/log.txt"
    until(lambda: log.exists() and "Iter: [2/6]" in log.read_text(), 180, lambda: slurm.output(exp / "folds"))
    slurm.run("scontrol", "requeue", f"{array}_1")  # the ranks are killed, the task starts again
    again = slurm.launch("train", exp, PARTITION, "2").stdout
    assert "0 to run" in again, "a fold that waits or runs is left alone"

    summaries = [exp / f"folds/0{number}/results/latest.json" for number in (1, 2)]
    until(lambda: all(file.is_file() for file in summaries), 300, lambda: slurm.output(exp / "folds"))
    until(lambda: not slurm.run("squeue", "--noheader", "--jobs", array, check=False).stdout.strip(), 60)
    assert "job: restart number=1 " in log.read_text()
    ends = [row["trial"] for row in attempts.read(exp / "folds") if row["event"] == "end" and row["code"] == 0]
    assert sorted(ends) == ["01", "02"]
    second_output = slurm.launch("train", exp, PARTITION, "2").stdout
    assert "2 trials (2 done), 0 to run" in second_output
    assert "held-out videos: " in second_output
    assert len(Results.load(exp, "latest").ids) == len((motion_videos / "lists/val.txt").read_text().splitlines())
