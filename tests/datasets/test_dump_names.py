"""A dump replaces nothing but its own files: lists, reports and videos of others stay."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets.dump import verb
from datasets.dump.lists import target_names
from datasets.dump.pixels import Coder
from datasets.dump.settings import DumpSettings
from datasets.dump.source import Picture
from datasets.dump.video import Dumper
from datasets.dump.write import ClipFile
from datasets.lists.records import Records
from datasets.loading.messages import DumpVideo
from datasets.plan.metadata import VideoMetadata
from tests.datasets.videos import write_video
from utils.errors import MediaError, UserError

FORM = ("--as", "frames", "--workers", "1")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of four frames."""
    path = tmp_path_factory.mktemp("video") / "x.mp4"
    write_video(path, "libx264", 4)
    return path


def records_of(folder: Path, *paths: str | Path, name: str = "list.txt") -> Records:
    """The records of a list with these paths, below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(f"{path} 0\n" for path in paths))
    return Records.load(folder / name, folder, num_class=None)


def targets_of(records: Records, form: str = "frames") -> dict[str, str]:
    return target_names(records, DumpSettings(form), {"train.txt", "failed.txt"})


def dump_one(records: Records, i: int, dst: Path, form: str = "frames", **settings: Any) -> dict[str, Any]:
    """What a worker does for record i."""
    (dst / ".dump").mkdir(parents=True, exist_ok=True)
    dump_settings = DumpSettings(form, **settings)
    target = dst / target_names(records, dump_settings, set())[records.path(i)]
    return Dumper(records, 0.05).answer(i, DumpVideo(i, dump_settings, str(target), str(dst / ".dump")))


def test_the_list_itself_and_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    lists, out = tmp_path / "lists", tmp_path / "out"
    (tmp_path / "videos").mkdir()
    records_of(lists, "x.mp4", name="train.txt")
    before = (lists / "train.txt").read_text()
    (tmp_path / "link").symlink_to(lists)
    for dst in (lists, tmp_path / "link"):
        with pytest.raises(UserError, match="folder of the list"):
            verb.main([str(lists / "train.txt"), str(dst), "--root", str(tmp_path / "videos"), *FORM])
    for name in ("train.txt", "failed.txt"):
        out.mkdir(exist_ok=True)
        (out / name).write_text("mine\n")
        with pytest.raises(UserError, match=f"{name}: no dump wrote this file"):
            verb.main([str(lists / "train.txt"), str(out), "--root", str(tmp_path / "videos"), *FORM])
        assert (out / name).read_text() == "mine\n"
        (out / name).unlink()
    assert (lists / "train.txt").read_text() == before
    assert not list(out.iterdir())
    assert not (lists / ".dump").exists()


def test_a_list_called_failed_txt_is_refused(tmp_path: Path) -> None:
    records_of(tmp_path, "x.mp4", name="failed.txt")
    with pytest.raises(UserError, match="name of the dump's own report"):
        verb.main([str(tmp_path / "failed.txt"), str(tmp_path / "out"), *FORM])


def test_absolute_paths_stay_below_dst_and_one_file_has_one_target(tmp_path: Path) -> None:
    records = records_of(tmp_path, tmp_path / "a" / "x.mp4", "a/x.mp4", "./a/y.mp4")
    assert list(targets_of(records).values()) == ["a/x", "a/x", "a/y"]
    for path in (".dump/x.mp4", "train.txt", "failed.txt/x.mp4", "."):
        with pytest.raises(UserError, match="cannot be the name of a video"):
            targets_of(records_of(tmp_path, path))


def test_nested_targets_keep_their_ending(tmp_path: Path) -> None:
    paths = ("a.mp4", "a/b.mp4", "c.mp4", "c.avi", "c.mp4.avi")
    assert list(targets_of(records_of(tmp_path, *paths)).values()) == ["a.mp4", "a/b", "c.mp4", "c.avi", "c.mp4.avi"]
    assert list(targets_of(records_of(tmp_path, "a.mp4", "a/b.mp4"), "clips").values()) == ["a.mp4", "a/b.mp4"]
    with pytest.raises(UserError, match="a would hold other videos"):
        targets_of(records_of(tmp_path, "a", "a/b"))


def test_a_video_is_not_replaced_by_that_of_another_source(video: Path, tmp_path: Path) -> None:
    for name in ("train/x.mp4", "val/x.mp4", "val/x.avi", "gone/x.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(video.read_bytes())
    for form in ("frames", "packs", "clips"):
        dst = tmp_path / form
        assert dump_one(records_of(tmp_path / "train", "x.mp4"), 0, dst, form)["frames"] == 4
        for root, name in (("val", "x.mp4"), ("val", "x.avi")):
            with pytest.raises(MediaError, match=f"already exists from {tmp_path}/train/x.mp4; choose another folder"):
                dump_one(records_of(tmp_path / root, name), 0, dst, form)
        assert dump_one(records_of(tmp_path / "train", tmp_path / "train" / "x.mp4"), 0, dst, form)["kept"]
    dst = tmp_path / "moved"
    dump_one(records_of(tmp_path / "gone", "x.mp4"), 0, dst)
    os.rename(tmp_path / "gone", tmp_path / "new")
    assert dump_one(records_of(tmp_path / "new", "x.mp4"), 0, dst)["kept"]


def test_a_result_never_replaces_its_source_or_the_videos_inside_an_older_one(video: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    records = records_of(root, "x.mp4")
    (root / "x.mp4").write_bytes(video.read_bytes())
    (tmp_path / "out").symlink_to(root)
    with pytest.raises(MediaError, match="is the video itself"):
        dump_one(records, 0, tmp_path / "out", "clips")
    assert (root / "x.mp4").read_bytes() == video.read_bytes()
    dst = tmp_path / "frames"
    dump_one(records, 0, dst)
    (dst / "x" / "other").mkdir()
    assert dump_one(records, 0, dst)["kept"]
    with pytest.raises(MediaError, match="holds folders too"):
        dump_one(records, 0, dst, quality=40)
    assert (dst / "x" / "other").is_dir()


@pytest.mark.system
def test_lists_of_one_folder(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out, empty = tmp_path / "root", tmp_path / "out", tmp_path / "empty"
    records_of(root, "x.mp4", name="a.txt")
    (root / "x.mp4").write_bytes(video.read_bytes())
    (root / "b.json").write_text(json.dumps([{"filename": str(root / "x.mp4"), "label": 3}]))
    assert verb.main([str(root / "a.txt"), str(out), *FORM]) == 0
    assert verb.main([str(root / "b.json"), str(out), *FORM]) == 0  # the same video: nothing to do
    assert "1 of 1 videos exist already" in capsys.readouterr().out
    assert (out / "b.txt").read_text() == "x 4 3\n"
    assert len(Records.load(out / "b.txt", out, num_class=4)) == 1
    assert sorted(path.name for path in root.iterdir()) == ["a.txt", "b.json", "x.mp4"]
    # A wrong root does not empty a list.
    empty.mkdir()
    assert verb.main([str(root / "a.txt"), str(out), "--root", str(empty), *FORM]) == 1
    assert "left as it was" in capsys.readouterr().err
    assert (out / "a.txt").read_text() == "x 4 0\n"
    assert (out / "failed.txt").read_text().startswith("x.mp4\t")
    with pytest.raises(UserError, match="there is no such folder"):
        verb.main([str(root / "a.txt"), str(out), "--root", str(tmp_path / "nowhere"), *FORM])
    # A copy of the videos is another source, even with the same size and time.
    records_of(tmp_path / "copy", "x.mp4", name="c.txt")
    shutil.copy2(root / "x.mp4", tmp_path / "copy")
    assert verb.main([str(tmp_path / "copy" / "c.txt"), str(out), *FORM]) == 1
    assert f"already exists from {root}/x.mp4" in (out / "failed.txt").read_text()
    assert not (out / "c.txt").exists()
    # Two lists of one name, and a folder of an earlier version.
    records_of(tmp_path / "other", "x.mp4", name="a.txt")
    call = [str(tmp_path / "other" / "a.txt"), str(out), "--root", str(root), *FORM]
    with pytest.raises(UserError, match="was made from .*root/a.txt, which is still there"):
        verb.main(call)
    (out / "notes.txt").write_text("mine\n")
    (out / ".dump" / "lists.json").unlink()
    assert verb.main(call) == 0
    assert json.loads((out / ".dump" / "lists.json").read_text()).keys() == {"a.txt", "b.txt"}
    assert not (out / "failed.txt").exists()


@pytest.mark.parametrize("name", ["settings.json", "lists.json"])
def test_a_damaged_file_of_the_dump_is_named(name: str, tmp_path: Path) -> None:
    records_of(tmp_path, "x.mp4", name="train.txt")
    (tmp_path / "out" / ".dump").mkdir(parents=True)
    for content in (b'{"form": ', b"[]", b"\xff\xfe"):
        (tmp_path / "out" / ".dump" / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: this file of the dump is damaged; delete it"):
            verb.main([str(tmp_path / "train.txt"), str(tmp_path / "out"), *FORM])


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    records_of(tmp_path, "x.mp4", name="train.txt")
    call = [str(tmp_path / "train.txt"), str(tmp_path / "out"), *FORM]
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=f"--deadline {wrong}: give a number of seconds above 0"):
            verb.main([*call, "--deadline", wrong])
    with pytest.raises(UserError, match="--missing-share 1: give a share from 0 to below 1"):
        verb.main([*call, "--missing-share", "1"])
    with pytest.raises(UserError, match="path_frames_labels"):
        verb.main([*call, "--layout", "kinetics"])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small_files() -> Any:
    """A function that limits files of this process to some bytes until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_clip_that_cannot_be_closed_is_abandoned(small_files: Callable[[int], None], tmp_path: Path) -> None:
    import av

    settings, tmp = DumpSettings("clips"), tmp_path / "clip"
    coder = Coder(settings, 0, VideoMetadata(3, 64, 64, 25.0))
    clip = ClipFile(str(tmp), coder, settings, {}, Fraction(25))
    for value in range(90):  # more than the encoder keeps to itself
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), value, np.uint8), format="rgb24")
        clip.add(Picture(frame, None, "x"))
    small_files(1)
    clip.abandon()
    assert not tmp.exists()
