from __future__ import annotations

import json
from pathlib import Path

import pytest

import main
from tests.experiment import make


def test_figures_of_an_evaluation(tmp_path: Path, motion_videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = make(tmp_path / "exp", motion_videos)
    options = ["--videos", "6", "--warmup", "2", "--views", "2x3", "--set", "common.data.sampling=tsn"]
    assert main.main(["benchmark", "eval", str(exp), *options, "--json", "--threads", "1"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["videos"], figures["views"], figures["device"], figures["threads"]) == (6, 6, "cpu", 1)
    assert figures["model_videos_per_s"] >= figures["videos_per_s"] > 0
    assert figures["s_per_video"] >= figures["model_s_per_video"] > 0
    assert figures["cpu_s_per_video"] >= figures["model_cpu_s_per_video"] > 0
    assert figures["memory_of_model_mb"] > 45  # 11 million float32
    assert 0 <= figures["memory_above_model_mb"] < 2000
    assert figures["gmacs_per_video"] > 0
    assert main.main(["benchmark", "eval", str(exp), "--videos", "2", "--warmup", "0", "--chunk", "2"]) == 0
    text = capsys.readouterr().out
    assert "model alone" in text
    assert "end to end" in text


def test_kinds_of_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["benchmark"]) == 0
    assert "eval" in capsys.readouterr().out
    assert main.main(["benchmark", "evl"]) == 2
    assert "did you mean" in capsys.readouterr().err
