"""A run of a probe with several heads, on real videos: each head scored and logged, resumed bit for bit, evaluated."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

import main
from tests.elastic_rank import trained
from tests.experiment import few_videos, fingerprint, make
from tests.test_elastic import run
from tests.test_train import stopping
from utils.log import read_scalars

KWARGS = "encoder: videomae, width: 24, depth: 2, head: linear, lr_mults: [1, 30], decays: [0, 0.5]"


def probe(folder: Path, data: Path) -> Path:
    """An experiment with four heads."""
    exp = make(folder, data, method="probe", backbone="vit3d")
    text = (exp / "config.yaml").read_text()
    text = text.replace("no_wd: True", "optimizer: {type: adamw}").replace("nesterov: True", "clip_grad: 1.0")
    (exp / "config.yaml").write_text(text.replace("kwargs: {", f"kwargs: {{{KWARGS}, "))
    return exp


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    exp = probe(tmp_path_factory.mktemp("runs") / "calm", motion_videos)
    assert main.train(exp) == 0
    return exp


def test_each_head_is_scored_logged_and_kept(calm: Path) -> None:
    text = (calm / "log.txt").read_text()
    state = torch.load(calm / "ckpt.pth.tar", weights_only=True)
    curves = read_scalars(calm / "events" / "scalars.jsonl")
    for number, (rate, decay) in enumerate([(1, "0"), (1, "0.5"), (30, "0"), (30, "0.5")]):
        assert f"head {number:02}, rate x {rate}, weight decay {decay}: * Prec@1" in text
        assert [step for step, _ in curves[f"loss_train/head{number:02}"]] == [1, 2, 4, 6]
        assert [step for step, _ in curves[f"top1_val/head{number:02}"]] == [3, 6]
        assert f"heads.{number}.classifier.weight" in state["model"]
    assert curves["loss_train/head00"] == curves["loss_train"]
    best = int(state["model"]["best"])
    assert f"best head: {best:02}" in text
    reached = [curves[f"top1_val/head{number:02}"][-1][1] for number in range(4)]
    assert best == reached.index(max(reached))
    assert curves["top1_val"][-1][1] == max(reached)


def test_a_stopped_run_continues_with_the_same_bits(
    calm: Path, tmp_path: Path, motion_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp = probe(tmp_path / "stopped", motion_videos)
    monkeypatch.setattr(main, "train_step", stopping(main.train_step, 3, signal.SIGTERM))
    assert main.train(exp) == 75
    monkeypatch.undo()
    assert main.train(exp) == 0
    assert fingerprint(exp) == fingerprint(calm)


def test_evaluation_uses_the_best_head(calm: Path) -> None:
    best = torch.load(calm / "ckpt_best.pth.tar", weights_only=True)
    assert main.main(["eval", str(calm)]) == 0
    result = json.loads(next((calm / "results").glob("*.json")).read_text())
    assert result["metrics"]["top1"] == pytest.approx(best["best_metric"], abs=1e-6)


@pytest.mark.nightly
def test_heads_learn_the_same_on_two_ranks_with_an_average(tmp_path: Path, motion_videos: Path) -> None:
    """fp64, a moving average of the weights: two ranks, stopped once, against one with the same two shards."""
    one, two = (probe(tmp_path / name, motion_videos) for name in ("one", "two"))
    more = ("shards=2", "ema=0.9", few_videos(one, motion_videos))
    assert run(one, 0, "one-clips", more=more).returncode == 0
    for stop, code in ((3, 75), (0, 0)):
        done = run(two, 2, "two-clips", stop, more)
        assert done.returncode == code, done.stderr
    losses, clips = trained(tmp_path, "one-clips")
    others, other_clips = trained(tmp_path, "two-clips")
    assert other_clips == clips
    assert max(abs(others[step] - losses[step]) for step in losses) <= 1e-9

    states = [torch.load(exp / "ckpt.pth.tar", weights_only=True) for exp in (one, two)]
    for kept in ("model", "ema"):
        first, second = (state[kept] for state in states)
        assert any(name.startswith("heads.3.") for name in first)
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-9, atol=1e-12)
    assert int(states[0]["model"]["best"]) == int(states[1]["model"]["best"])
