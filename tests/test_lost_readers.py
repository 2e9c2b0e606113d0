"""Readers that do not start, and clips that end their reader: the run is saved, explained and repeated bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import main
from tests.experiment import fingerprint, make
from tests.ranks import ROOT

SMALL = ("common.model.backbone=mobilenetv2",)
WORDS = [word for text in SMALL for word in ("--set", text)]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    exp = make(tmp_path_factory.mktemp("runs") / "calm", motion_videos, steps=3, val_freq=3)
    assert main.train(exp, overrides=SMALL) == 0
    return exp


@pytest.mark.parametrize("step", [0, 2])
def test_readers_that_do_not_start_stop_the_run_as_a_signal_does(
    step: int, calm: Path, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = make(tmp_path / "exp", motion_videos, steps=3, val_freq=3, workers=2)
    with monkeypatch.context() as patch:

        def step_and_kill(run, at, batches, **wishes):
            numbers = train_step(run, at, batches, **wishes)
            if at == step - 1:
                patch.setattr(sys, "executable", "/bin/false")
                for pid in children():
                    os.kill(pid, signal.SIGKILL)
            return numbers

        train_step = main.train_step
        patch.setattr(main, "train_step", step_and_kill)
        if step == 0:
            patch.setattr(sys, "executable", "/bin/false")
        assert main.train(exp, overrides=SMALL) == 75
    text = (exp / "log.txt").read_text()
    assert 'by="reader processes that do not start (3 in a row, the last: exit code 1)" message="saved;' in text
    assert main.train(exp, overrides=SMALL) == 0
    assert fingerprint(exp) == fingerprint(calm)


def children() -> list[int]:
    """Process ids below this process, whichever thread has started them."""
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


ONE_RANK_WITHOUT_READERS = """\
import os, sys
import main
if os.environ["RANK"] == "1" and os.environ.get("NO_READERS"):
    sys.executable = "/bin/false"
sys.exit(main.main(sys.argv[1:]))
"""


def test_the_ranks_agree_when_one_of_them_has_no_readers(tmp_path: Path, motion_videos: Path) -> None:
    exp = make(tmp_path / "exp", motion_videos, steps=3, val_freq=3, workers=1)
    script = tmp_path / "script.py"
    script.write_text(ONE_RANK_WITHOUT_READERS)
    launch = (
        "import sys; from pathlib import Path; from launch import local;"
        "sys.exit(local.run(sys.argv[2:], 2, script=Path(sys.argv[1])))"
    )
    argv = [sys.executable, "-c", launch, str(script), "train", str(exp), *WORDS]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_READERS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 75, done.stderr
    sentence = "stopped by reader processes that do not start (3 in a row, the last: exit code 1)"
    assert done.stderr == f"error: rank 1: {sentence}; everything is saved\n"
    text = (exp / "log.txt").read_text()
    assert 'INFO run: stopped iteration=1 by="another rank"' in text
    assert 'ERROR run: trouble rank=1 message="reader processes that do not start' in text


CRASHES = """\
import os, signal
import datasets.readers

open_reader = datasets.readers.open_reader


def deadly(spec, records):
    reader = open_reader(spec, records)
    read = reader.read

    def read_or_die(sample, *rest):
        if records.path(sample) == os.environ["DEADLY"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(sample, *rest)

    reader.read = read_or_die
    return reader


datasets.readers.open_reader = deadly
"""


def test_a_clip_that_ended_its_reader_twice_is_skipped_again_after_a_resume(
    tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process could read it: the steps are repeated as they were, and end with the same bits."""
    from datasets.lists.records import Records
    from datasets.plan.order import Order

    records = Records.load(motion_videos / "lists/train.txt", str(motion_videos), num_class=8)
    (tmp_path / "sitecustomize.py").write_text(CRASHES)  # runs in each reader, as a decoder that runs out of memory
    words = [*SMALL, "common.data.on_bad=skip", "common.data.bad_budget=1.0"]
    calm, other = (make(tmp_path / name, motion_videos, steps=6, val_freq=2, workers=1) for name in ("calm", "other"))
    deadly = records.path(Order("shuffled", 0, records)(4 * 3 + 1).sample)  # of step 3, counted from 0
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        patch.setenv("DEADLY", deadly)
        assert main.train(calm, overrides=words) == 0
        # Killed while it writes the checkpoint of step 4; that of step 2 is there (the third file is its best).
        env = os.environ | {"ZOETROPE_FAILPOINT": "checkpoint.tmp:0:3", "OMP_NUM_THREADS": "1"}
        argv = [sys.executable, "main.py", "train", str(other)]
        argv += [part for word in words for part in ("--set", word)]
        killed = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    rows = [json.loads(line) for line in (other / "jobs/bad_samples.jsonl").read_text().splitlines()]
    assert [(row["path"], row["position"], row["crashed"]) for row in rows] == [(deadly, 13, True)]

    assert main.train(other, overrides=words) == 0
    assert fingerprint(other) == fingerprint(calm)
    assert "was given up before the resume" in (other / "log.txt").read_text()
