"""Bad videos in a real run: in training, in the precise-BN pass and in the validation,."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import main
from tests.experiment import make
from utils.errors import UserError


def test_bad_videos_of_every_part_of_a_run_are_journalled_and_summed_up(tmp_path: Path, motion_videos: Path) -> None:
    root, exp = tmp_path / "root", make(tmp_path / "exp", motion_videos, val_freq=2, steps=2)
    root.mkdir()
    (root / "videos").symlink_to(motion_videos / "videos")
    (root / "broken.mp4").write_bytes(b"no video")
    lists = {}
    for name, count in (("train", 7), ("val", 3)):
        good = (motion_videos / f"lists/{name}.txt").read_text().splitlines(keepends=True)[:count]
        lists[name] = exp / f"{name}.txt"
        lists[name].write_text("".join(good) + "broken.mp4 16 0\n")
    settings = [f"common.{name}_{key}" for name in lists for key in ("source", "root")]
    values = [lists["train"], root, lists["val"], root]
    words = [f"{key}={value}" for key, value in zip(settings, values, strict=True)]
    words += ["common.model.backbone=mobilenetv2", "common.data.bad_budget=1.0", "common.data.on_bad=skip"]
    words += ["common.precise_bn.batches=2", "common.lr_scheduler.warmup_steps=1"]

    assert main.train(exp, overrides=words) == 0
    first = json.loads((exp / "jobs/bad_samples.json").read_text())
    assert (first["step"], first["epoch"], first["videos"]) == (2, 1, 8)
    # 4 clips a step, 8 videos: two steps are an epoch, and so are the two batches of precise BN, of the next epoch
    times = {entry["during"]: entry["times"] for entry in first["bad"]}
    assert times == {"training": 1, "precise batch norm": 1, "validation": 1}
    assert {entry["path"] for entry in first["bad"]} == {"broken.mp4"}

    text = (exp / "log.txt").read_text()
    assert "epoch 1: 1 of 8 videos could not be read" in text
    assert "bad sample 7 (broken.mp4)" in text
    assert "validation: bad sample 3 (broken.mp4)" in text
    rows = [json.loads(line) for line in (exp / "jobs/bad_samples.jsonl").read_text().splitlines()]
    position = next(row["position"] for row in rows if row.get("during") == "precise batch norm")
    assert 8 <= position < 16


def test_a_run_that_bad_videos_stop_has_journalled_them(tmp_path: Path, motion_videos: Path) -> None:
    exp = make(tmp_path / "exp", motion_videos)
    (exp / "broken.mp4").write_bytes(b"no video")
    (exp / "train.txt").write_text("broken.mp4 16 0\n" * 8)
    words = [f"common.train_source={exp}/train.txt", f"common.train_root={exp}", "common.data.on_bad=error"]
    with pytest.raises(UserError, match=r"broken\.mp4"):
        main.train(exp, overrides=[*words, "common.model.backbone=mobilenetv2"])
    rows = [json.loads(line) for line in (exp / "jobs/bad_samples.jsonl").read_text().splitlines()]
    assert {row["path"] for row in rows} == {"broken.mp4"}
    text = (exp / "log.txt").read_text()
    assert "broken.mp4" in text
    assert "the run stops" in text
    assert "skipped" not in text
