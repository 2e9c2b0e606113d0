"""The comparison with MMAction2: both sides are asked for the same, and the difference is counted right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import methods
from tests.benchmarks.peers import side_by_side
from tests.benchmarks.rows import SHARED
from utils import config

real_data = pytest.mark.skipif(not (SHARED / "lists/ucf_sports/all.txt").is_file(), reason="no ../shared/data")
peer = pytest.mark.skipif(not side_by_side.PYTHON, reason="$ZOETROPE_MMACTION_PYTHON names no interpreter")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data" / side_by_side.DATA
    folder.mkdir(parents=True)
    (folder / "videos").symlink_to(SHARED)
    (folder / "lists").symlink_to(SHARED / "lists" / side_by_side.DATA)
    monkeypatch.setenv("ZOETROPE_RESULTS_DATA", str(tmp_path / "data"))
    return folder


@real_data
@pytest.mark.parametrize("name", side_by_side.RECIPES)
def test_both_sides_are_asked_for_the_same(name: str, data: Path, tmp_path: Path) -> None:
    recipe = side_by_side.RECIPES[name]
    exp = tmp_path / "exp"
    exp.mkdir()
    weights = tmp_path / "initial.pth"
    torch.save({}, weights)
    (exp / "config.yaml").write_text(recipe.config("02", 3, weights))
    cfg = config.load(exp)
    asked = recipe.request("train", "02", 3, weights, tmp_path / "out.json")
    rates = cfg.lr_scheduler
    ours = {
        "frames": cfg.model.num_segments * cfg.data.clip_len,
        "size": cfg.augmentation.input_size,
        "area": cfg.augmentation.area,
        "batch": cfg.batch_size,
        "epochs": rates.max_epoch,
        "warmup_epochs": rates.warmup_epochs,
        "first_rate": rates.base_lr,
        "rate": rates.warmup_lr,
        "decay": cfg.weight_decay,
        "clip_grad": cfg.clip_grad,
        "dropout": cfg.model.dropout,
        "classes": cfg.model.num_class,
        "seed": cfg.seed,
        "train": os.path.realpath(cfg.train_source),
        "val": os.path.realpath(cfg.val_source),
    }
    theirs = {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()}
    assert {key: theirs[key] for key in ours} == {**ours, "area": list(ours["area"])}
    assert json.loads(json.dumps(asked))["initial"] == str(weights)
    assert len(side_by_side.labels_of("02")) == 30


def test_the_difference_is_paired_by_video() -> None:
    ours = [np.array([True, True, False, False] * 25), np.array([True, True, True, False] * 25)]
    theirs = [np.array([True, False, False, False] * 25), np.array([True, False, False, False] * 25)]
    difference = side_by_side._difference({"ours": ours, "theirs": theirs})
    assert (difference["ours"], difference["theirs"], difference["mean"]) == (0.625, 0.25, 0.375)
    per_video = np.array([0, 1, 0.5, 0] * 25)
    half = 1.96 * per_video.std() / 10
    assert difference["low"] == pytest.approx(0.375 - half, abs=0.02)
    assert difference["high"] == pytest.approx(0.375 + half, abs=0.02)
    same = side_by_side._difference({"ours": ours, "theirs": ours})
    assert (same["mean"], same["low"], same["high"]) == (0.0, 0.0, 0.0)


def test_losses_are_near_only_within_the_spread_of_runs() -> None:
    random = np.random.default_rng(0)
    one = [(2 - 1.5 * np.arange(4) / 4 + random.normal(0, 0.1, 4)).tolist() for _ in range(6)]
    moved = [[value + 0.5 for value in row] for row in one]
    assert side_by_side._curves({"ours": one, "theirs": one[::-1]})["within_spread"]
    assert not side_by_side._curves({"ours": one, "theirs": moved})["within_spread"]
    assert side_by_side._quarters([4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0]) == [4.0, 3.0, 2.0, 1.0]


@peer
@real_data
@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize("name", side_by_side.RECIPES)
def test_both_networks_start_with_the_same_answers(name: str, data: Path, tmp_path: Path) -> None:
    """The peer writes the initial weights and its logits of a clip; our network, filled with them, has the same."""
    recipe = side_by_side.RECIPES[name]
    training = side_by_side.Training(tmp_path, name, recipe, "theirs", "01", 0)
    if recipe.images and not Path(os.path.realpath(side_by_side.ROOT / side_by_side.WEIGHTS)).is_file():
        pytest.skip(f"no {side_by_side.WEIGHTS}")
    clips = torch.randn(2, 3, recipe.frames, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.save(clips, training.initial.with_suffix(".clips"))
    training._write_initial()
    kwargs = {"zero_init_residual": False} if name == "slowonly" else {}
    net = methods.build(
        type=recipe.method, backbone=recipe.backbone, num_class=side_by_side.CLASSES, num_segments=recipe.frames,
        pretrained=str(training.initial), **kwargs,
    ).eval()  # fmt: skip
    theirs = torch.tensor(json.loads(training.initial.with_suffix(".json").read_text())["logits"])
    with torch.no_grad():
        torch.testing.assert_close(net(clips), theirs, rtol=1e-4, atol=1e-5)
    assert theirs.std() > 1e-4
