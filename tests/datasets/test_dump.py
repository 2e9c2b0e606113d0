"""The verb dump on real encoded videos: what is stored is what the reader `video` shows, and nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from datasets.dump import verb as dump
from datasets.dump.settings import DumpSettings
from datasets.lists.records import Records
from datasets.readers import Reader, open_reader
from datasets.readers.frames import decode
from tests.datasets.specs import reader_spec
from tests.datasets.videos import number_in, write_video
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FRAMES = 30


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three barcoded videos in a folder with a blank, one of them cut off, and a list."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "a b").mkdir()
    write_video(folder / "a b" / "one.mp4", "libx264", FRAMES, options={"g": "250"})
    write_video(folder / "two.webm", "libvpx-vp9", FRAMES, options={"cpu-used": "8", "deadline": "realtime"})
    whole = (folder / "a b" / "one.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "train.txt").write_text("a b/one.mp4\t2\ntwo.webm\t1\ncut.mp4\t0\na b/one.mp4\t2\n")
    return folder


def run_dump(videos: Path, dst: Path, *argv: str) -> int:
    """`main.py dump` in this process, with one worker."""
    return dump.main([str(videos / "train.txt"), str(dst), "--workers", "1", *argv])


def pixels(reader: Reader, i: int) -> np.ndarray:
    """(F, H, W, 3) every frame of a record."""
    metadata = reader.probe(i)
    out = np.empty((metadata.frames, metadata.height, metadata.width, 3), np.uint8)
    reader.read(i, np.arange(metadata.frames), None, (metadata.height, metadata.width), out)
    return out


def dumped(kind: str, dst: Path) -> tuple[Reader, Records]:
    records = Records.load(dst / "train.txt", dst, num_class=3)
    return open_reader(reader_spec(kind), records), records


@pytest.mark.parametrize(("form", "kind"), [("frames", "frames"), ("packs", "frames"), ("clips", "video")])
def test_each_form_has_every_frame_in_order(form: str, kind: str, videos: Path, tmp_path: Path) -> None:
    assert run_dump(videos, tmp_path, "--as", form, "--short-side", "0") == 1
    assert (tmp_path / "failed.txt").read_text().startswith("cut.mp4\t")
    reader, records = dumped(kind, tmp_path)
    assert [int(label) for label in records.labels] == [2, 1, 2]
    assert records.frames.tolist() == [FRAMES] * 3
    for i in range(2):
        assert [number_in(image) for image in pixels(reader, i)] == list(range(FRAMES))
    assert not list((tmp_path / ".dump").glob("tmp/*"))


def test_folders_and_packs_are_the_same_bytes_and_close_to_the_video(videos: Path, tmp_path: Path) -> None:
    for form in ("frames", "packs"):
        run_dump(videos, tmp_path / form, "--as", form, "--short-side", "64", "--quality", "95")
    folder, _ = dumped("frames", tmp_path / "frames")
    pack, records = dumped("frames", tmp_path / "packs")
    assert records.path(0).endswith(".fsh")
    assert folder.probe(0).height == pack.probe(0).height == 64
    assert (pixels(folder, 0) == pixels(pack, 0)).all()
    original = open_reader(reader_spec("video"), Records.load(videos / "train.txt", videos, num_class=3))
    expected = np.empty((FRAMES, 64, 64, 3), np.uint8)
    original.read(0, np.arange(FRAMES), None, (64, 64), expected)
    inner = np.abs(pixels(pack, 0).astype(int) - expected)[:, :, 1:7]  # not across the edges of the bars
    assert inner.mean() < 4


def test_lossless_dumps_show_exactly_what_the_video_shows(videos: Path, tmp_path: Path) -> None:
    original = open_reader(reader_spec("video"), Records.load(videos / "train.txt", videos, num_class=3))
    for form, kind in (("frames", "frames"), ("packs", "frames"), ("clips", "video")):
        run_dump(videos, tmp_path / form, "--as", form, "--lossless")
        reader, _ = dumped(kind, tmp_path / form)
        for i in range(2):
            assert (pixels(reader, i) == pixels(original, i)).all(), (form, i)


def test_clips_do_not_depend_on_what_was_in_memory_before(motion_videos: Path, tmp_path: Path) -> None:
    """The C library fills fresh memory with a byte: an encoder that reads unwritten memory then gives other bytes."""
    outputs = []
    for byte in ("0", "85", "170"):
        out = tmp_path / byte
        argv = ["dump", str(motion_videos / "lists/val.txt"), str(out), "--as", "clips", "--root", str(motion_videos)]
        done = subprocess.run(
            [sys.executable, "main.py", *argv, "--short-side", "32", "--workers", "1"],
            cwd=ROOT,
            env={**os.environ, "MALLOC_PERTURB_": byte},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        clips = sorted(out.rglob("*.mp4"))
        assert len(clips) > 8
        outputs.append([path.read_bytes() for path in clips])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_restart_does_nothing_twice_and_adopts_what_the_manifest_misses(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("frames", "packs", "clips"):
        dst = tmp_path / form
        run_dump(videos, dst, "--as", form)
        marked = [*dst.glob("two*"), *dst.glob("a b/one*")]
        inodes = [os.stat(path).st_ino for path in marked]
        manifest = dst / ".dump" / "manifest.jsonl"
        lines = manifest.read_text().splitlines()
        assert {json.loads(line)["path"] for line in lines} == {"a b/one.mp4", "two.webm"}
        manifest.write_text(lines[0] + "\n" + lines[1][:20])  # killed while it wrote the second line
        capsys.readouterr()
        run_dump(videos, dst, "--as", form)
        assert "1 of 3 videos are there already" in capsys.readouterr().out
        assert [os.stat(path).st_ino for path in marked] == inodes
        assert len(Records.load(dst / "train.txt", dst, num_class=3)) == 3


def test_a_changed_source_and_changed_settings(videos: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    run_dump(videos, dst, "--as", "frames")
    with pytest.raises(UserError, match="quality: 85 -> 40.*--redo"):
        run_dump(videos, dst, "--as", "frames", "--quality", "40")
    before = sum(file.stat().st_size for file in (dst / "two").iterdir())
    run_dump(videos, dst, "--as", "frames", "--quality", "40", "--redo")
    assert sum(file.stat().st_size for file in (dst / "two").iterdir()) < before
    with pytest.raises(UserError, match="holds frames"):
        run_dump(videos, dst, "--as", "packs", "--redo")
    inode = os.stat(dst / "two").st_ino
    os.utime(videos / "two.webm", ns=(1, time.time_ns()))
    run_dump(videos, dst, "--as", "frames", "--quality", "40")
    assert os.stat(dst / "two").st_ino != inode


def test_packs_of_folders_keep_the_bytes_and_foreign_files_are_left_alone(videos: Path, tmp_path: Path) -> None:
    run_dump(videos, tmp_path / "jpeg", "--as", "frames", "--template", "frame{:06d}.jpg", "--base", "0")
    (tmp_path / "out" / "a b").mkdir(parents=True)
    (tmp_path / "out" / "a b" / "one.fsh").write_text("mine")
    argv = [str(tmp_path / "jpeg" / "train.txt"), str(tmp_path / "out"), "--as", "packs", "--workers", "1"]
    assert dump.main(argv) == 1
    assert "was not written by a dump" in (tmp_path / "out" / "failed.txt").read_text()
    assert (tmp_path / "out" / "a b" / "one.fsh").read_text() == "mine"
    pack, folder = dumped("frames", tmp_path / "out")[0], dumped("frames", tmp_path / "jpeg")[0]
    assert (pixels(pack, 0) == pixels(folder, 1)).all()
    assert (tmp_path / "jpeg" / "two" / "frame000000.jpg").exists()
    with pytest.raises(UserError, match="folder of the videos themselves"):
        run_dump(videos, videos, "--as", "clips")


def test_turned_videos_are_stored_upright(shared_data: Path, tmp_path: Path) -> None:
    odd = shared_data / "odd" / "decord"
    (tmp_path / "train.txt").write_text("video_90.mov 0\nvideo_180.mov 1\n")
    original = open_reader(reader_spec("video"), Records.load(tmp_path / "train.txt", odd, num_class=2))
    for form, kind in (("frames", "frames"), ("clips", "video")):
        argv = ["--as", form, "--quality", "95", "--crf", "5", "--short-side", "0", "--root", str(odd)]
        assert run_dump(tmp_path, tmp_path / form, *argv) == 0
        reader = open_reader(
            reader_spec(kind), Records.load(tmp_path / form / "train.txt", tmp_path / form, num_class=2)
        )
        for i in range(2):
            difference = np.abs(pixels(reader, i).astype(int) - pixels(original, i))
            assert difference.mean() < 4, (form, i)


def test_kill_leaves_nothing_half_and_the_next_run_finishes(tmp_path: Path) -> None:
    for number in range(6):
        write_video(tmp_path / f"v{number}.mp4", "libx264", 60)
    (tmp_path / "train.txt").write_text("".join(f"v{number}.mp4 0\n" for number in range(6)))
    dst = tmp_path / "out"
    argv = ["dump", str(tmp_path / "train.txt"), str(dst), "--as", "frames", "--workers", "1"]
    process = subprocess.Popen([sys.executable, "main.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(dst.glob("v*")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.3)  # the worker dies with its parent
    whole = {folder.name: folder.stat().st_ino for folder in dst.glob("v*")}
    assert whole
    for name in whole:
        assert len(list((dst / name).glob("img_*.jpg"))) == 60
    assert dump.main(argv[1:]) == 0
    assert {folder.name: folder.stat().st_ino for folder in dst.glob("v*") if folder.name in whole} == whole
    assert len(list(dst.glob("v*"))) == 6


def test_settings_and_sizes() -> None:
    clips, frames = DumpSettings("clips"), DumpSettings("frames")
    assert frames.size(1080, 1920) == (256, 456)
    assert frames.size(1921, 1080) == (456, 256)
    assert frames.size(101, 77) == (101, 77)
    assert clips.size(101, 77) == (100, 76)
    for wrong in ({"form": "x"}, {"short_side": 3}, {"quality": 0}, {"template": "a/{:d}.jpg"}, {"base": 2}):
        with pytest.raises(UserError, match="dump: "):
            DumpSettings(**{"form": "frames", **wrong}).check()
    with pytest.raises(UserError, match="lossless dump writes .png"):
        DumpSettings("frames", lossless=True).check()


def test_stored_jpeg_has_the_size_asked_for(videos: Path, tmp_path: Path) -> None:
    run_dump(videos, tmp_path, "--as", "frames", "--short-side", "32", "--template", "{:06d}.jpg", "--base", "0")
    file = tmp_path / "two" / "000000.jpg"
    assert decode(file.read_bytes(), "x").shape == (32, 32, 3)
    with av.open(str(file)) as image:
        assert image.streams.video[0].codec_context.pix_fmt == "yuvj420p"
