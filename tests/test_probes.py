"""A run of a probe with several heads, on real videos: each head scored and logged, resumed bit for bit, evaluated."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import main
from tests.experiment import fingerprint, make
from tests.test_train import stopping
from utils.log import read_scalars

GRID = [
    "common.model.kwargs.encoder=videomae",
    "common.model.kwargs.width=24",
    "common.model.kwargs.depth=2",
    "common.model.kwargs.head=linear",
    "common.model.kwargs.lr_mults=[1,30]",
    "common.model.kwargs.decays=[0,0.5]",
    "common.optimizer.type=adamw",
    "common.no_wd=false",
    "common.nesterov=false",
    "common.clip_grad=1.0",
]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    exp = make(tmp_path_factory.mktemp("runs") / "calm", motion_videos, method="probe", backbone="vit3d")
    assert main.train(exp, overrides=GRID) == 0
    return exp


def test_each_head_is_scored_logged_and_kept(calm: Path) -> None:
    text = (calm / "log.txt").read_text()
    state = torch.load(calm / "ckpt.pth.tar", weights_only=True)
    curves = read_scalars(calm / "events" / "scalars.jsonl")
    for number, (rate, decay) in enumerate([(1, "0"), (1, "0.5"), (30, "0"), (30, "0.5")]):
        assert f"head {number:02}, rate x {rate}, weight decay {decay}: * Prec@1" in text
        assert [step for step, _ in curves[f"loss_train/head{number:02}"]] == [2, 4, 6]
        assert [step for step, _ in curves[f"acc1_val/head{number:02}"]] == [3, 6]
        assert f"heads.{number}.classifier.weight" in state["model"]
    assert curves["loss_train/head00"] == curves["loss_train"]
    best = int(state["model"]["best"])
    assert f"best head: {best:02}" in text
    reached = [curves[f"acc1_val/head{number:02}"][-1][1] for number in range(4)]
    assert best == reached.index(max(reached))
    assert curves["acc1_val"][-1][1] == max(reached)


def test_a_stopped_run_continues_with_the_same_bits(
    calm: Path, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = make(tmp_path / "stopped", motion_videos, method="probe", backbone="vit3d")
    monkeypatch.setattr(main, "train_step", stopping(main.train_step, 3, signal.SIGTERM))
    assert main.train(exp, overrides=GRID) == 75
    monkeypatch.undo()
    assert main.train(exp, overrides=GRID) == 0
    assert fingerprint(exp) == fingerprint(calm)


def test_evaluation_uses_the_best_head(calm: Path) -> None:
    best = torch.load(calm / "ckpt_best.pth.tar", weights_only=True)
    assert main.main(["eval", str(calm), "--set", *GRID[:1]]) == 0
    assert f"Prec@1 {best['best_prec1']:.3f}" in (calm / "log.txt").read_text()
