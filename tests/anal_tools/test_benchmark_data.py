"""`main.py benchmark data`: figures of two readers on one list, the verdict, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import main
from anal_tools.benchmark.data import numbers, verdict
from tests.experiment import make
from utils.errors import UserError


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """An experiment whose training list has twelve videos, of which one is broken."""
    exp = make(tmp_path_factory.mktemp("bench") / "exp", motion_videos)
    (exp / "root").mkdir()
    (exp / "root" / "videos").symlink_to(motion_videos / "videos")
    (exp / "root" / "broken.mp4").write_bytes(b"no video")
    lines = (motion_videos / "lists/train.txt").read_text().splitlines(keepends=True)[:11]
    (exp / "train.txt").write_text("".join(lines) + "broken.mp4 16 0\n")
    text = (exp / "config.yaml").read_text().replace(f"{motion_videos}/lists/train.txt", f"{exp}/train.txt")
    text = text.replace(f"train_root: {motion_videos}\n", f"train_root: {exp}/root\n")
    (exp / "config.yaml").write_text(text)
    return exp


def test_figures_of_two_readers(exp: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dumped = tmp_path / "packs"
    words = ["dump", str(exp / "train.txt"), str(dumped), "--root", str(exp / "root"), "--as", "packs"]
    assert main.main([*words, "--workers", "1"]) == 1, "the broken one is missing in the dump"
    capsys.readouterr()
    words = ["benchmark", "data", str(exp), "--readers", "video", f"frames={dumped}", "--clips", "12", "--json"]
    words += ["--workers", "0,1", "--rounds", "1", "--step-time", "1000", "--set", "common.data.bad_budget=1.0"]
    assert main.main(words) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    video, frames = figures["readers"]
    assert (video["clips"], video["bad"]) == (11, 2), "the broken one is met in the timed and in the profiled clips"
    assert frames["reader"] == f"frames ({dumped})"
    for row in (video, frames):
        assert row["clips_per_cpu_s"] > 0
        assert row["kb_per_clip"] > 0.1
        assert sum(row["stages"].values()) == pytest.approx(1.0, abs=0.01)
        assert row["stages"]["decoding"] > 0.02
        assert set(row["workers"]) == {"0", "1"}
        assert all(each["clips_per_s"] > 0 for each in row["workers"].values())
        assert row["waits"] is False
    assert figures["fastest"] in (video["reader"], frames["reader"])
    assert figures["needed_clips_per_s"] == 0.0  # 4 clips in 1000 s
    assert figures["gpu_waits"] is False


def test_verdict_names_the_fastest_and_counts_the_workers() -> None:
    rows = [
        {"reader": "slow", "clips_per_cpu_s": 10.0, "workers": {"1": {"clips_per_s": 9.0}, "2": {"clips_per_s": 17.0}}},
        {"reader": "fast", "clips_per_cpu_s": 50.0, "workers": {"1": {"clips_per_s": 40.0}}},
    ]
    figures = verdict(rows, batch=32, step_time=0.8, cores=2)
    assert figures["fastest"] == "fast"
    assert figures["needed_clips_per_s"] == 40.0
    assert figures["gpu_waits"] is False
    assert rows[0]["waits"]
    assert rows[0]["wait_share"] == pytest.approx(1 - 17 / 40, abs=1e-3)
    assert (rows[0]["workers_needed"], rows[0]["cores_are_enough"]) == (4, False)
    assert (rows[1]["workers_needed"], rows[1]["cores_are_enough"]) == (1, True)
    assert verdict(rows, batch=32, step_time=None, cores=2) == {"fastest": "fast"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--workers", "1,many"], "--workers 1,many"),
        (["--readers", "frames=/nowhere"], "/nowhere/train.txt is missing"),
        (["--readers", "tape"], "no reader 'tape'; choose one of frames, memcached, video, dali\n"),
        (["--readers", "encoded"], "no reader 'encoded'"),
    ],
)
def test_wrong_options_are_one_clear_text(
    words: list[str], expected: str, exp: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main.main(["benchmark", "data", str(exp), "--clips", "1", *words]) == 2
    assert expected in capsys.readouterr().err


def test_numbers_of_workers() -> None:
    assert numbers("0,4") == [0, 4]
    with pytest.raises(UserError):
        numbers("-1")
