"""The conformance test on this machine as a scheduler, and on a toy that is one new file; then the toy's whole way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import __main__ as launcher
from launch import jobs
from tests.copies import copy_repository
from tests.experiment import make
from tests.launch.conformance import (  # noqa: F401
    Case,
    test_a_cancelled_job_can_save_and_is_dead,
    test_a_requeued_job_keeps_its_id_and_counts_its_starts,
    test_ranks_meet_and_know_their_job,
    test_several_jobs_of_one_submission_are_jobs_of_their_own,
    test_the_lock_asks_who_lives,
)
from utils import cluster, schedulers
from utils.schedulers import local

ROOT = Path(__file__).resolve().parents[2]
TOY = Path(__file__).with_name("toy_scheduler.py")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository that differs by one new file."""
    target = copy_repository(tmp_path_factory.mktemp("copy") / "zoetrope")
    shutil.copy(TOY, target / "utils" / "schedulers" / "toy.py")
    return target


@pytest.fixture
def with_toy(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process finds the new file too."""
    monkeypatch.setattr(schedulers, "__path__", [str(copy / "utils" / "schedulers")])
    monkeypatch.setitem(cluster._CHOICES, "scheduler", tuple(schedulers.names()))
    monkeypatch.setenv("TOY", str(tmp_path / "toy"))
    schedulers.named.cache_clear()
    yield copy
    schedulers.named.cache_clear()


@pytest.fixture(params=["local", pytest.param("toy", marks=pytest.mark.nightly)])
def case(
    request: pytest.FixtureRequest, with_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Case]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    new_case = Case(schedulers.named(request.param), "here", with_toy, tmp_path / "work")
    yield new_case
    new_case.close()
    for keeper in (*local._keepers, *getattr(new_case.scheduler, "keepers", ())):
        keeper.wait(timeout=60)


def test_a_new_scheduler_is_one_file(
    with_toy: Path, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Train on it, follow the log, look at the status."""
    (tmp_path / "cluster.yaml").write_text("partitions: {queue: {scheduler: toy, gpus_per_node: 2}}")
    monkeypatch.setenv("ZOETROPE_CLUSTER", str(tmp_path / "cluster.yaml"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(launcher.snapshot, "take", lambda target: with_toy)
    exp = make(tmp_path / "exp", motion_videos, steps=4, val_freq=4)
    assert launcher.main(["train", str(exp), "queue", "2", "--follow"]) == 0
    (row,) = jobs.submitted(exp)
    shown = capsys.readouterr().out
    assert f"submitted job {row['job']} to queue" in shown
    assert (row["scheduler"], row["ranks"]) == ("toy", 2)
    text = (exp / "log.txt").read_text()
    assert "Iter: [4/4]" in text, shown
    assert "] INFO run: start ranks=2 shards=2 " in text, text
    assert launcher.main(["status", str(exp)]) == 0
    assert "iteration 4 of 4" in capsys.readouterr().out
