"""An evaluation that resumes with another number of ranks, and two evaluations that want the same name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import main
from anal_tools.evaluate.results import Results
from tests import forked
from tests.evaluated import summary_of
from tests.experiment import make
from tests.ranks import ROOT, run_program

ARRAYS = ("labels", "logits", "scores", "frames")


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """A trained experiment, and its undisturbed evaluation on one rank, named calm."""
    folder = make(tmp_path_factory.mktemp("ranks") / "exp", motion_videos, steps=3, backbone="mobilenetv2")
    assert main.train(folder) == 0
    assert main.main(["eval", str(folder), "--name", "calm", "--chunk", "1"]) == 0
    return folder


def environment(fail_point: str = "") -> dict[str, str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return env | ({"ZOETROPE_FAILPOINT": fail_point} if fail_point else {})


def on_ranks(exp: Path, ranks: int, name: str, fail_point: str = "") -> subprocess.CompletedProcess[str]:
    words = ["main.py", "eval", str(exp), "--name", name, "--chunk", "1"]
    return run_program(words, ranks, env=environment(fail_point), timeout=240)


@pytest.mark.parametrize(("first", "second"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.nightly)])
def test_stopped_on_some_ranks_it_ends_on_others_with_the_same_rows(exp: Path, first: int, second: int) -> None:
    name = f"from{first}to{second}"
    stopped = on_ranks(exp, first, name, "progress.evaluation:1:3:usr2")
    assert stopped.returncode == 75, stopped.stderr
    assert not (exp / f"results/{name}.json").exists()

    done = on_ranks(exp, second, name)
    assert done.returncode == 0, done.stderr
    scored = next(line for line in done.stdout.splitlines() if "resuming: " in line).split("resuming: ")[1].split()[0]
    assert first <= int(scored) < 23, "each rank had some videos, and not all were done"
    calm, mixed = Results.load(exp, "calm"), Results.load(exp, name)
    assert summary_of(mixed)["ranks"] == second
    assert mixed.ids == calm.ids
    for array in ARRAYS:
        assert np.array_equal(getattr(mixed, array), getattr(calm, array)), array
    for key in ("metrics", "counts", "failures", "protocol"):
        assert summary_of(mixed)[key] == summary_of(calm)[key]
    assert not list((exp / "results" / name).glob("part*"))


def test_a_second_evaluation_of_one_name_is_refused(exp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [sys.executable, "main.py", "eval", str(exp), "--name", "one", "--chunk", "1"]
    with forked.Process(
        argv, cwd=ROOT, env=environment("progress.evaluation:0:2:stop"), stdout=subprocess.PIPE, text=True
    ) as first:
        try:
            while Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                assert first.poll() is None
                time.sleep(0.05)
            assert main.main(["eval", str(exp), "--name", "one"]) == 2
            message = capsys.readouterr().err
            assert len(message.splitlines()) == 1
            assert "eval-one" in message or "evaluation" in message
            assert str(first.pid) in message
            assert main.main(["eval", str(exp), "--name", "two", "--chunk", "1"]) == 0, "another name is free"
        finally:
            first.send_signal(signal.SIGCONT)
        assert first.wait(120) == 0
    one, two = Results.load(exp, "one"), Results.load(exp, "two")
    assert np.array_equal(one.logits, two.logits)
    assert main.main(["eval", str(exp), "--name", "one"]) == 0, "its lock is free again"
