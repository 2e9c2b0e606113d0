"""The demo data set: deterministic, balanced, and a pair of motions differs in the order of its frames only."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from datasets.demo import motion8
from datasets.demo import verb as demo
from utils.errors import UserError

PAIRS = (("left", "right"), ("up", "down"), ("clockwise", "counter-clockwise"), ("grow", "shrink"))


def decode(source: object) -> np.ndarray:
    with av.open(source) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def make(folder: Path, *options: str) -> Path:
    out = folder / "motion8"
    assert demo.main(["--out", str(out), "--train", "40", "--val", "16", "--workers", "1", *options]) == 0
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_plays_the_same_frames_in_opposite_order(pair: tuple[str, str]) -> None:
    forward, backward = (motion8.clip(3, 5, motion, "cross") for motion in pair)
    assert np.array_equal(forward, backward[::-1])
    assert not np.array_equal(forward, backward)


def test_coding_leaves_no_trace_of_the_direction() -> None:
    frames = motion8.clip(1, 2, "right", "cross")
    there, back = decode(io.BytesIO(demo.encode(frames))), decode(io.BytesIO(demo.encode(frames[::-1])))
    assert np.array_equal(there, back[::-1])
    assert np.abs(there.astype(int) - frames).mean() < 6  # of 255; chroma at half resolution is most of it


def test_the_shape_moves_as_its_class_says() -> None:
    for index in range(20):
        paths = {m: motion8.draw_path(motion8.generator(0, index), m) for m in motion8.MOTIONS}
        assert (np.diff(paths["right"].x) > 0.5).all()
        assert np.ptp(paths["right"].y) == 0
        assert (np.diff(paths["down"].y) > 0.5).all()  # y points down
        assert (np.diff(paths["grow"].radius) > 0.2).all()
        turn = np.stack([paths["clockwise"].x, paths["clockwise"].y], 1)
        first, second = np.diff(turn, axis=0)[:-1], np.diff(turn, axis=0)[1:]
        # With y down, a positive cross product of successive steps is a right turn.
        assert (first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0] > 0).all()
        for name, path in paths.items():
            assert min(path.x.min(), path.y.min()) >= 11, name
            assert max(path.x.max(), path.y.max()) <= motion8.SIZE - 11, name
    assert set(motion8.BACKWARDS) == {"left", "up", "counter-clockwise", "shrink"}


@pytest.mark.parametrize("shape", motion8.SHAPES)
def test_every_shape_has_an_inside_of_its_own(shape: str) -> None:
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 61), np.linspace(-1.5, 1.5, 61))
    inside = motion8.distance(shape, x, y) < 0
    assert 0.1 < inside.mean() < 0.5
    assert not inside[np.hypot(x, y) > 1.4].any()
    for other in set(motion8.SHAPES) - {shape}:
        different = inside ^ (motion8.distance(other, x, y) < 0)
        assert different.sum() > 0.1 * inside.sum(), other


def test_labels_are_balanced_and_independent() -> None:
    motion, shape = motion8.labels(1200, seed=0, split=0)
    assert np.bincount(motion).tolist() == [150] * 8
    assert np.bincount(shape).tolist() == [300] * 4
    table = np.zeros((8, 4), int)
    np.add.at(table, (motion, shape), 1)
    assert table.min() >= 37
    assert table.max() <= 38
    assert not np.array_equal(motion, motion8.labels(1200, seed=1, split=0)[0])


@pytest.mark.system
def test_the_files_depend_on_the_seed_only(small: Path, tmp_path: Path) -> None:
    again = make(tmp_path / "b", "--workers", "2")
    for file in sorted(path.relative_to(small) for path in small.rglob("*") if path.is_file()):
        assert (small / file).read_bytes() == (again / file).read_bytes(), file
    other = make(tmp_path / "c", "--seed", "1")
    assert (small / demo.name_of(0)).read_bytes() != (other / demo.name_of(0)).read_bytes()


@pytest.mark.slow
def test_lists_and_videos_agree(small: Path) -> None:
    lines, shapes = (
        [
            line.split()
            for part in ("train", "val")
            for line in (small / f"lists/{part}{of}.txt").read_text().splitlines()
        ]
        for of in ("", "_shape")
    )
    assert [line[0] for line in lines] == [demo.name_of(i) for i in range(56)] == [line[0] for line in shapes]
    assert (small / "lists/classInd.txt").read_text().splitlines()[:2] == ["0 left", "1 right"]
    assert len((small / "lists/classInd_shape.txt").read_text().splitlines()) == 4
    for index, ((path, frames, motion), (_, _, shape)) in enumerate(zip(lines, shapes, strict=True)):
        pictures = decode(str(small / path))
        assert pictures.shape == (int(frames), 64, 64, 3) == (16, 64, 64, 3)
        drawn = motion8.clip(0, index, motion8.MOTIONS[int(motion)], motion8.SHAPES[int(shape)])
        error = np.abs(pictures.astype(int) - drawn).mean(axis=(1, 2, 3))
        assert error.max() < 6  # frame by frame: none is missing, doubled or out of place


def test_every_frame_is_intra_coded(small: Path) -> None:
    with av.open(str(small / demo.name_of(3))) as container:
        assert [packet.is_keyframe for packet in container.demux(video=0) if packet.size] == [True] * 16


def test_a_second_start_makes_only_what_is_missing(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = make(tmp_path)
    kept, lost = out / demo.name_of(1), out / demo.name_of(2)
    content = lost.read_bytes()
    before = kept.stat().st_mtime_ns
    lost.unlink()
    (out / "videos/00003.mp4.tmp").write_bytes(b"half")
    capsys.readouterr()
    make(tmp_path)
    assert "56 videos (1 written now, 55 existed)" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content
    assert not list(out.rglob("*.tmp"))


def test_a_folder_of_other_settings_or_other_files_is_left_alone(small: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"other settings.*'seed': 0"):
        demo.main(["--out", str(small), "--train", "40", "--val", "16", "--seed", "9"])
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*") if path.is_file()} == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        demo.main(["--out", str(mine)])
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]


def test_wrong_use_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*--out"):
        demo.main(["--out", str(tmp_path / "file" / "motion8")])
    with pytest.raises(UserError, match="8 or more"):
        demo.main(["--out", str(tmp_path / "a"), "--train", "3"])
    assert not (tmp_path / "a").exists()


def test_settings_survive_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / demo.SETTINGS).write_text("{")
    with pytest.raises(UserError, match="other settings"):
        demo.open_folder(tmp_path, {"seed": 0})
    (tmp_path / demo.SETTINGS).write_text(json.dumps({"seed": 0}))
    demo.open_folder(tmp_path, {"seed": 0})


@pytest.mark.slow
def test_a_linear_model_on_the_mean_frame_cannot_tell_a_pair_apart() -> None:
    # Every second frame, as a test clip of TSN takes them: that subset is not symmetric in time, the hardest case.
    count = 320
    for pair in (PAIRS[0], PAIRS[3]):
        label = np.arange(count) % 2
        clips = (motion8.clip(7, i, pair[label[i]], motion8.SHAPES[i // 2 % 4]) for i in range(count))
        mean = np.stack([clip[1::2].mean(axis=(0, 3))[::2, ::2].ravel() for clip in clips])  # (N, 32*32)
        half = count // 2
        model = RidgeClassifier(alpha=1e4).fit(mean[:half], label[:half])
        accuracy = np.mean(model.predict(mean[half:]) == label[half:])
        assert accuracy <= 0.6, (pair, accuracy)


@pytest.mark.parametrize("part", ["videos", "lists"])
def test_a_start_that_was_killed_at_once_is_resumed(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def killed(path: Path, *words: Any, **more: Any) -> None:
        if path.name == part:
            raise KeyboardInterrupt
        mkdir(path, *words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", killed)
        with pytest.raises(KeyboardInterrupt):
            demo.open_folder(tmp_path / "motion8", {"seed": 0})
    demo.open_folder(tmp_path / "motion8", {"seed": 0})
    assert {path.name for path in (tmp_path / "motion8").iterdir()} == {demo.SETTINGS, "videos", "lists"}
