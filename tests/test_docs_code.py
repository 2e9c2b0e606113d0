"""The programs of docs/notebook.md and docs/predict.md run as they stand there, and give what the verbs give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import main
from tests import weights
from tests.conftest import ROOT
from tests.docs_code import program
from tests.experiment import few_videos, make


def run(code: str, folder: Path, *words: str | Path, **environment: str) -> list[str]:
    """Lines that a program of its own file prints, in a folder that is not the repository."""
    file = folder / "program.py"
    file.write_text(code, encoding="utf-8")
    words = (sys.executable, file, *words)
    done = subprocess.run(words, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_notebook(tmp_path: Path, motion_videos: Path) -> None:
    exp = make(tmp_path / "exp", motion_videos, steps=3, backbone="mobilenetv2")
    few = few_videos(exp, motion_videos)
    assert main.train(exp, overrides=[few]) == 0
    assert main.main(["eval", str(exp), "--set", few, "--plain"]) == 0

    code = program("docs/notebook.md", "notebook.py", all_blocks=True)
    lines = run(code, tmp_path, ZOETROPE=str(ROOT), EXP=str(exp))
    assert lines[0] == "torch.Size([2, 10])"
    assert "TSN" in lines[1]
    assert any(line.startswith("loss_train ") for line in lines), lines
    name, difference = lines[-1].rsplit(" ", 1)
    assert f" {name}\n" in (motion_videos / "lists/classInd.txt").read_text()
    assert float(difference) < 1e-4  # the logit of the evaluation, from the same pixels


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory, motion_videos: Path) -> Path:
    """An exported TSN of eight segments."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="ONNX is not installed (pip install '.[export]')")
    exp = weights.make(tmp_path_factory.mktemp("onnx") / "exp", motion_videos)
    assert main.main(["export", str(exp), "--to", "onnx"]) == 0
    return exp / "results" / "tsn_resnet18.onnx"


def test_the_program_for_the_onnx_file_gives_the_logits_of_predict(
    onnx_file: Path, tmp_path: Path, motion_videos: Path
) -> None:
    video = sorted((motion_videos / "videos").iterdir())[3]
    assert main.main(["predict", str(onnx_file), str(video), "--logits", "--out", str(tmp_path / "out")]) == 0
    (expected,) = json.loads((tmp_path / "out/infer.json").read_text())["videos"]

    lines = run(program("docs/predict.md", "onnx_predict.py"), tmp_path, onnx_file, video)
    got = {name: float(logit) for logit, name in (line.split(" ", 1) for line in lines)}
    assert list(got) == [entry["name"] for entry in expected["top"]]
    assert list(got.values()) == pytest.approx(sorted(expected["logits"][0], reverse=True)[:5], abs=2e-3)


def test_the_program_notices_another_rule(onnx_file: Path, tmp_path: Path, motion_videos: Path) -> None:
    video = sorted((motion_videos / "videos").iterdir())[3]
    code = program("docs/predict.md", "onnx_predict.py").replace("(k + 1 / 2)", "k")
    with pytest.raises(AssertionError, match=r"\[\(n - L \+ 1\) / S \* \(k \+ 1/2\)\]"):
        run(code, tmp_path, onnx_file, video)


def test_the_metadata_have_boxes_of_the_crops(onnx_file: Path) -> None:
    from anal_tools.predict import predictor

    metadata = json.loads(predictor.session(onnx_file)[1])
    wide = metadata["boxes"]["320x240"]
    assert wide["scaled"] == [48, 36]
    assert wide["crops"] == [{"place": "centre", "box": [8, 2, 40, 34], "flip": False}]
    assert metadata["frames"]["numbers"] == {"S": 2, "L": 1, "tau": 1, "T": 2, "V": 1}
    assert metadata["frames"]["examples"]["100"] == [[25, 75]]
