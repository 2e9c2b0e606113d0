"""AdamW, layer decay, drop path, RandAugment, mixing, erasing by noise and repeated augmentation in one run.

A stop or a kill changes no bit, and neither does the number of ranks change what is trained on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from tests import forked
from tests.elastic_rank import trained
from tests.experiment import few_videos, fingerprint, make
from tests.ranks import ROOT
from tests.recipe import words
from tests.test_elastic import run
from tests.test_train import RANKED, stopping
from utils.errors import UserError


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """A run that nothing disturbed."""
    exp = make(tmp_path_factory.mktemp("runs") / "calm", motion_videos)
    assert main.train(exp, overrides=[*words(), few_videos(exp, motion_videos)]) == 0
    return exp


def test_the_parts_of_the_recipe_are_on(calm: Path) -> None:
    state = torch.load(calm / "ckpt.pth.tar", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    assert {group["name"] for group in groups} == {
        f"{kind}, layer {layer}" for kind in ("weight", "bias and norm") for layer in (2, 3, 4)
    }, "the patches and the first block are frozen"
    assert all(values["step"].item() == 6 for values in state["optimizer"]["state"].values())
    log = (calm / "log.txt").read_text()
    assert "the peak learning rate 0.001 at a global batch of 2 videos is 0.128 per 256" in log
    assert (state["global_batch"], state["config"]["data"]["num_sample"]) == (4, 2)


def test_a_signal_changes_no_bit(
    calm: Path, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = make(tmp_path / "stopped", motion_videos, workers=1)
    overrides = [*words(), few_videos(exp, motion_videos)]
    monkeypatch.setattr(main, "train_step", stopping(main.train_step, 2, signal.SIGTERM))
    assert main.train(exp, overrides=overrides) == 75
    monkeypatch.undo()
    assert main.train(exp, overrides=overrides) == 0
    assert fingerprint(exp) == fingerprint(calm)


@pytest.mark.parametrize("point", ["checkpoint.replace:0:1", "checkpoint.done:0:2"])
def test_a_kill_changes_no_bit(point: str, calm: Path, tmp_path: Path, motion_videos: Path) -> None:
    exp = make(tmp_path / "killed", motion_videos)
    overrides = [*words(), few_videos(exp, motion_videos)]
    command = [
        sys.executable,
        "-c",
        RANKED,
        "train",
        str(exp),
        *(part for word in overrides for part in ("--set", word)),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ZOETROPE_FAILPOINT": point}
    killed = forked.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert main.train(exp, overrides=overrides) == 0
    assert fingerprint(exp) == fingerprint(calm)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda kept: kept.pop("exp_avg_sq"), "no exp_avg_sq in it"),
        (lambda kept: kept.update(exp_avg=torch.zeros(7)), r"values of a different shape, \(7,\)"),
    ],
)
def test_a_state_without_averages_is_refused(
    damage: Callable[[dict[str, Any]], object], says: str, calm: Path, tmp_path: Path, motion_videos: Path
) -> None:
    exp = make(tmp_path / "damaged", motion_videos)
    state = torch.load(calm / "ckpt.pth.tar", weights_only=True)
    damage(state["optimizer"]["state"][3])
    torch.save(state, exp / "ckpt.pth.tar")
    with pytest.raises(UserError, match=f"state is from a different model or recipe \\({says}"):
        main.train(exp, overrides=[*words(), f"common.val_source={calm / 'few.txt'}"])


@pytest.mark.nightly
def test_four_ranks_then_two_train_on_the_same_clips(tmp_path: Path, motion_videos: Path) -> None:
    """fp64: losses as on one rank with the same 4 shards, to 1e-9."""
    fixed, moved = (make(tmp_path / name, motion_videos, steps=4, val_freq=4) for name in ("fixed", "moved"))
    more = (*words(), few_videos(fixed, motion_videos))
    done = run(fixed, 0, "fixed-clips", more=("shards=4", *more))
    assert done.returncode == 0, done.stderr
    for ranks, stop, code in ((4, 2, 75), (2, 0, 0)):
        done = run(moved, ranks, "moved-clips", stop, more)
        assert done.returncode == code, done.stderr
    losses, clips = trained(tmp_path, "fixed-clips")
    moved_losses, moved_clips = trained(tmp_path, "moved-clips")
    assert moved_clips == clips
    assert len(clips) == 4 * 16
    samples = [sample for sample, _ in clips.values()]
    assert all(samples.count(sample) % 2 == 0 for sample in samples), "two views of each"
    assert sorted(moved_losses) == sorted(losses) == list(range(4))
    assert max(abs(moved_losses[step] - losses[step]) for step in losses) <= 1e-9
