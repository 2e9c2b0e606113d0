"""One run on 4 ranks and then on 2 trains on the same clips, with the same losses, as the same 4 shards on one rank."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.elastic_rank import trained
from tests.experiment import few_videos, make
from tests.ranks import run_program

SETTINGS = ("precision=fp64", "deterministic=true")


def run(
    exp: Path, ranks: int, name: str, stop: int = 0, more: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Train on some ranks, until `stop` iterations are done."""
    words = ["tests/elastic_rank.py", "train", str(exp)]
    words += [word for item in SETTINGS + more for word in ("--set", item)]
    return run_program(words, ranks, env={"ELASTIC_STOP": str(stop), "ELASTIC_FILE": str(exp.parent / name)})


def digests(exp: Path) -> dict[str, str]:
    """sha256 of every file of the run."""
    files = [path for path in exp.rglob("*") if path.is_file()]
    return {str(path.relative_to(exp)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_other_numbers_of_ranks_in_one_run(tmp_path: Path, motion_videos: Path) -> None:
    # Dropout, mixup, label smoothing, erasing and jitter are on in this config.
    options = {"method": "tsm", "group": 2, "steps": 4, "val_freq": 4}
    fixed = make(tmp_path / "fixed", motion_videos, **options)
    few = few_videos(fixed, motion_videos)
    done = run(fixed, 0, "fixed-clips", more=("shards=4", few))
    assert done.returncode == 0, done.stderr

    moved = make(tmp_path / "moved", motion_videos, **options)
    for ranks, stop, code in ((4, 2, 75), (2, 0, 0)):
        before = digests(moved)
        if ranks == 2:  # 3 ranks cannot share 4 shards in BN groups of 2: said before anything of the run is touched
            refused = run(moved, 3, "refused-clips", more=(few,))
            assert refused.returncode == 2
            assert "3 ranks cannot share 4 shards with bn_group_size = 2: use 1, 2, 4 ranks" in refused.stderr
            after = digests(moved)
            assert {name: after[name] for name in before if name != "log.txt"} == {
                name: before[name] for name in before if name != "log.txt"
            }
            assert not list(tmp_path.glob("refused-clips*"))
        done = run(moved, ranks, "moved-clips", stop, (few,))
        assert done.returncode == code, done.stderr

    losses, clips = trained(tmp_path, "fixed-clips")
    moved_losses, moved_clips = trained(tmp_path, "moved-clips")
    assert moved_clips == clips
    assert len(clips) == 4 * 16
    assert sorted(moved_losses) == sorted(losses) == list(range(4))
    assert max(abs(moved_losses[step] - losses[step]) for step in losses) <= 1e-9
