"""predict: the same logits as an evaluation, whatever is named; what cannot be read is named; files over time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest

import main
from anal_tools.evaluate.results import Results
from anal_tools.predict import outputs, sliding
from anal_tools.predict.sources import expand
from datasets.plan.metadata import VideoMetadata
from tests import git, weights
from tests.conftest import ROOT
from tests.datasets.videos import frame_image, write_video
from utils.errors import UserError


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, a broken one, a folder of numbered images, and lists of them."""
    import cv2

    root = tmp_path_factory.mktemp("clips")
    write_video(root / "a.mp4", "libx264", 40)
    write_video(root / "b.avi", "mpeg4", 25)
    (root / "broken.mp4").write_bytes((root / "a.mp4").read_bytes()[:900])
    (root / "frames").mkdir()
    for number in range(1, 13):
        cv2.imwrite(str(root / "frames" / f"img_{number:05d}.jpg"), frame_image(number)[..., ::-1])
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text("a.mp4 3\nb.avi 1\n")
    (root / "lists" / "val.txt").write_text("a.mp4 3\nb.avi 1\nbroken.mp4 0\n")
    return root


@pytest.fixture(scope="module")
def exp(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights.make(tmp_path_factory.mktemp("exps") / "tsn", clips)


def run(*argv: object) -> int:
    return main.main([str(word) for word in argv])


def infer(out: Path) -> dict:
    return json.loads((out / "infer.json").read_text())


@pytest.mark.system
def test_the_logits_are_those_of_an_evaluation(exp: Path, clips: Path, tmp_path: Path) -> None:
    assert run("predict", exp, clips / "a.mp4", clips / "b.avi", "--out", tmp_path, "--logits") == 0
    assert run("eval", exp) == 0
    predictions, scored = infer(tmp_path), Results.load(exp)
    for row, entry in enumerate(predictions["videos"]):
        assert np.abs(np.array(entry["logits"]) - scored.logits[row]).max() < 1e-5
        best = [top["label"] for top in entry["top"]]
        assert best == np.argsort(-scored.scores[row])[:5].tolist()
        assert entry["top"][0]["score"] == pytest.approx(scored.scores[row].max(), abs=1e-5)
    assert [entry["source"] for entry in predictions["videos"]] == [str(clips / "a.mp4"), str(clips / "b.avi")]
    assert predictions["classes"] == weights.NAMES
    assert predictions["videos"][0]["frames"] == 40
    assert predictions["videos"][0]["fps"] == 25


@pytest.mark.system
def test_everything_nameable_and_what_cannot_be_read(
    exp: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder stands for what is in it; the broken and the missing one are named, the others done: exit code 1."""
    assert run("predict", exp, clips, tmp_path / "none.mp4", clips / "frames", "--out", tmp_path) == 1
    predictions = infer(tmp_path)
    names = [Path(entry["source"]).name for entry in predictions["videos"]]
    assert names == ["a.mp4", "b.avi", "frames", "frames"]
    reasons = {Path(entry["source"]).name: entry["reason"] for entry in predictions["failed"]}
    assert set(reasons) == {"broken.mp4", "none.mp4"}
    assert reasons["none.mp4"] == "there is no such file or folder"
    shown = capsys.readouterr().out
    assert "4 predicted, 2 not readable" in shown
    assert f"{clips / 'broken.mp4'}\n   not readable: it cannot be opened" in shown
    assert " 1  0." in shown


@pytest.mark.system
def test_lists_and_hostile_names(exp: Path, clips: Path, tmp_path: Path) -> None:
    odd = tmp_path / "-i 'x'\n$(touch y).mp4"
    raw = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.mp4")
    for name in (odd, raw):
        Path(name).write_bytes((clips / "a.mp4").read_bytes())
    (tmp_path / "plain.txt").write_text(f"{clips / 'b.avi'}\n\n")
    code = run("predict", exp, odd, raw, tmp_path / "plain.txt", clips / "lists" / "train.txt", "--root", clips,
               "--out", tmp_path / "o", "--srt", "--video")  # fmt: skip
    assert code == 0
    predictions = infer(tmp_path / "o")
    assert [entry["source"] for entry in predictions["videos"]] == [
        str(odd), raw, *(str(clips / name) for name in ("b.avi", "a.mp4", "b.avi"))
    ]  # fmt: skip
    assert predictions["videos"][0]["top"] == predictions["videos"][1]["top"] == predictions["videos"][3]["top"]
    assert not (tmp_path / "y").exists()
    assert len(list((tmp_path / "o").glob("*.mp4"))) == 5


@pytest.mark.system
def test_over_time(exp: Path, clips: Path, tmp_path: Path) -> None:
    arguments = ("--window", "0.4", "--stride", "0.4", "--srt", "--video", "--out", tmp_path)
    assert run("predict", exp, clips / "a.mp4", *arguments) == 0
    (entry,) = infer(tmp_path)["videos"]
    assert [(w["start"], w["end"]) for w in entry["windows"]] == [(0, 0.4), (0.4, 0.8), (0.8, 1.2), (1.2, 1.6)]
    blocks = (tmp_path / "a.srt").read_text().strip().split("\n\n")
    assert len(blocks) == 4
    assert blocks[1].splitlines()[:2] == ["2", "00:00:00,400 --> 00:00:00,800"]
    assert blocks[1].splitlines()[2].startswith(entry["windows"][1]["top"][0]["name"])
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 25
    assert len(frames) == 40
    corner = np.abs(frames[9][:40, :60].astype(int) - frame_image(9)[:40, :60]).mean()
    rest = np.abs(frames[9][60:].astype(int) - frame_image(9)[60:]).mean()
    assert corner > 3 * rest  # text is there, and nowhere else


@pytest.mark.system
def test_one_window_of_the_whole_video_is_the_video(exp: Path, clips: Path, tmp_path: Path) -> None:
    assert run("predict", exp, clips / "a.mp4", clips / "frames", "--window", "60", "--out", tmp_path) == 0
    assert all("windows" not in entry for entry in infer(tmp_path)["videos"])


@pytest.mark.system
def test_a_checkpoint_knows_its_config(exp: Path, clips: Path, tmp_path: Path) -> None:
    for number, target in enumerate((exp, exp / "ckpt_best.pth.tar")):
        assert run("predict", target, clips / "a.mp4", "--out", tmp_path / str(number), "--logits") == 0
    first, second = (infer(tmp_path / str(number))["videos"] for number in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window", "0"), "--window and --stride are seconds greater than 0"),
        (("--window", "nan"), "not nan (--window)"),
        (("--window", "1e308"), "not 1e+308 (--window)"),
        (("--window", "1", "--stride", "inf"), "not inf (--stride)"),
        (("--engine", "onnx"), "--engine onnx needs --model"),
        (("--model", "x.onnx"), "--model goes with --engine onnx"),
        (("--checkpoint", "none.pth"), "none.pth: no such checkpoint"),
    ],
)
def test_mistakes(
    exp: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple, message: str
) -> None:
    assert run("predict", exp, clips / "a.mp4", "--out", tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_nothing_to_look_at(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("neither a path\nnor a list\n")
    with pytest.raises(UserError, match="no videos and no folders"):
        expand([tmp_path])
    with pytest.raises(UserError, match=r"notes.txt:1"):
        expand([tmp_path / "notes.txt"])


def test_windows_cover_the_video() -> None:
    metadata = VideoMetadata(frames=100, height=8, width=8, fps=10.0)
    parts = sliding.windows(metadata, 2.0, 1.5)
    assert [part.first for part in parts] == [0, 15, 30, 45, 60, 75, 80]
    assert {part.frames for part in parts} == {20}
    assert parts[0].start == 0
    assert parts[-1].end == 10
    assert all(a.end == b.start for a, b in zip(parts, parts[1:], strict=False))
    assert parts[0].end == pytest.approx((10 + 25) / 2 / 10)
    short = sliding.windows(VideoMetadata(frames=3, height=8, width=8, fps=10.0), 2.0, 1.0)
    assert [(part.first, part.frames, part.start, part.end) for part in short] == [(0, 3, 0.0, 0.3)]
    with pytest.raises(ValueError, match="windows of 0"):
        sliding.windows(metadata, 0, 1)


def test_equal_scores_rank_as_in_the_accuracy() -> None:
    top = outputs.top_classes(np.array([0.2, 0.4, 0.4, 0.0]), ["a", "b", "c", "d"], 3)
    assert [entry["name"] for entry in top] == ["c", "b", "a"]


@pytest.mark.parametrize("shape", [(144, 256, 3), (240, 320, 3), (480, 854, 3)])
def test_the_outline_follows_the_letters(shape: tuple[int, int, int]) -> None:
    image = np.full(shape, 128, np.uint8)
    outputs.draw(
        image, [{"label": k, "name": name, "score": 0.98} for k, name in enumerate(("making cake", "wiiiide"))]
    )
    light, dark = image.min(2) > 140, image.max(2) < 70
    assert light.sum() > 100
    assert dark.sum() > 100
    for side in (0, 1):  # as far down and as far to the right as the letters, and their rim of a pixel
        assert abs(np.flatnonzero(dark.any(side)).max() - np.flatnonzero(light.any(side)).max()) <= 2


def test_what_predict_writes_into_the_repository_is_not_committed() -> None:
    new = ROOT / "predictions" / "test of ignored names.json"
    is_new = not new.parent.exists()
    new.parent.mkdir(exist_ok=True)
    try:
        new.touch()
        assert not [name for name in git.files() if name.startswith("predictions/")]
    finally:
        new.unlink()
        if is_new:
            new.parent.rmdir()
