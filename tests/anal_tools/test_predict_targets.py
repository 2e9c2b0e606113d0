"""predict replaces no file of the user's, says so before it scores, and keeps the scores whatever cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import main
from anal_tools.predict import out_folder
from anal_tools.predict.sources import InputVideo
from tests import weights
from tests.datasets.videos import write_video
from utils import checkpoint
from utils.errors import UserError


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with a video of the same name."""
    root = tmp_path_factory.mktemp("clips")
    for name in ("A", "B"):
        (root / name).mkdir()
        write_video(root / name / "a.mp4", "libx264", 12)
    (root / "lists").mkdir()
    for name in ("train", "val"):
        (root / "lists" / f"{name}.txt").write_text("A/a.mp4 3\n")
    return root


@pytest.fixture(scope="module")
def exp(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights.make(tmp_path_factory.mktemp("exps") / "tsn", clips)


def run(*argv: object) -> int:
    return main.main([str(word) for word in argv])


def infer(out: Path) -> dict:
    return json.loads((out / "infer.json").read_text())


def test_a_source_is_never_a_target(exp: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (clips / "B" / "a.mp4").read_bytes()
    command = ("predict", exp, clips / "A" / "a.mp4", clips / "A" / ".." / "B" / "a.mp4", "--video", "--out")
    assert run(*command, clips / "B") == 2
    output = capsys.readouterr()
    assert "is itself a source" in output.err
    assert "source(s)" not in output.out  # no model was loaded
    assert (clips / "B" / "a.mp4").read_bytes() == before
    assert os.listdir(clips / "B") == ["a.mp4"]


@pytest.mark.system
def test_only_its_own_files_are_replaced(
    exp: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("predict", exp, clips / "A" / "a.mp4", "--out", tmp_path, "--srt")
    (tmp_path / "a.srt").write_text("mine")
    assert run(*command) == 2
    assert "a.srt exists and was not written by an earlier run" in capsys.readouterr().err
    assert (tmp_path / "a.srt").read_text() == "mine"
    (tmp_path / "a.srt").unlink()
    for _ in range(2):
        assert run(*command) == 0
    assert out_folder.written(tmp_path) == {"a.srt"}
    assert len((tmp_path / out_folder.WRITTEN).read_text().splitlines()) == 1


@pytest.mark.system
def test_what_cannot_be_written_loses_no_scores(
    exp: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / f"{'n' * 250}.mp4"  # with .srt.tmp behind it no name of a file
    long.write_bytes((clips / "A" / "a.mp4").read_bytes())
    assert run("predict", exp, long, clips / "A" / "a.mp4", "--out", tmp_path / "o", "--srt") == 1
    predictions = infer(tmp_path / "o")
    assert [entry["source"] for entry in predictions["videos"]] == [str(long), str(clips / "A" / "a.mp4")]
    assert predictions["videos"][0]["top"] == predictions["videos"][1]["top"]
    ((failed),) = predictions["failed"]
    assert "too long" in failed["reason"]
    assert (tmp_path / "o" / "a.srt").is_file()
    shown = capsys.readouterr().out
    assert "2 predicted, 0 not readable, 1 without their files" in shown
    assert "not written:" in shown


def test_a_folder_that_cannot_be_is_found_first(
    exp: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run("predict", exp, clips / "A" / "a.mp4", "--out", out) == 2
        output = capsys.readouterr()
        assert f"{tmp_path / 'file'} is not a folder; give another --out" in output.err
        assert "source(s)" not in output.out
    (tmp_path / "infer.json").mkdir()
    with pytest.raises(UserError, match=r"infer\.json exists"):
        out_folder.check_targets(tmp_path, [], [], [])


def test_every_source_has_a_name_of_its_own() -> None:
    names = out_folder.file_names([InputVideo(f"/x/{n}", "video") for n in ("a.mp4", "a-2.mp4", "a.avi", "a-2.avi")])
    assert names == ["a", "a-2", "a-3", "a-2-2"]


def test_weights_that_are_no_numbers_are_named(
    exp: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load(exp / checkpoint.BEST)
    state["model"]["backbone.bn1.weight"][3] = torch.nan
    checkpoint.save(tmp_path, "bad.pth.tar", state)
    for words in ((tmp_path / "bad.pth.tar",), (exp, "--checkpoint", tmp_path / "bad.pth.tar")):
        assert run("predict", *words, clips / "A" / "a.mp4", "--out", tmp_path / "o") == 2
        assert "NaN or infinity in: backbone.bn1.weight" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.system
def test_scores_that_are_no_numbers_are_a_failure(exp: Path, clips: Path, tmp_path: Path) -> None:
    """Finite weights whose products are not."""
    state = checkpoint.load(exp / checkpoint.BEST)
    state["model"]["classifier.weight"].fill_(3e38)
    checkpoint.save(tmp_path, "huge.pth.tar", state)
    assert run("predict", tmp_path / "huge.pth.tar", clips / "A" / "a.mp4", "--out", tmp_path) == 1
    predictions = infer(tmp_path)
    assert predictions["videos"] == []
    assert "not finite" in predictions["failed"][0]["reason"]
