from __future__ import annotations

import csv
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from datasets.readers import open_reader
from datasets.readers.video import VideoReader
from datasets.readers.video_index import Grade
from tests import golden
from tests.datasets.specs import build_index, reader_spec
from tests.datasets.videos import SIZE, decode_all, number_in, records_of, write_cut, write_video
from utils.errors import MediaError

X264 = "libx264"
CASES = {
    "long_gop.mp4": (X264, {"options": {"bf": "3", "g": "250"}}, Grade.TIMED),
    "gop12.mp4": (X264, {"options": {"bf": "2", "g": "12"}}, Grade.TIMED),
    "open_gop.mkv": (X264, {"options": {"bf": "8", "g": "40", "x264-params": "open-gop=1"}}, Grade.TIMED),
    "refresh.mp4": (X264, {"options": {"g": "20", "x264-params": "intra-refresh=1"}}, Grade.TIMED),
    "intra.mp4": (X264, {"options": {"g": "1"}}, Grade.TIMED),
    "vfr.mp4": (X264, {"options": {"g": "30"}, "stamps": [i * 40 + (i * 7919) % 31 for i in range(120)]}, Grade.TIMED),
    "open_gop_hevc.mp4": (
        "libx265",
        {"options": {"x265-params": "log-level=none:keyint=20:bframes=4:open-gop=1"}},
        Grade.TIMED,
    ),
    "mpeg4.mp4": ("mpeg4", {"options": {"g": "12", "bf": "2"}}, Grade.TIMED),
    "mpeg4.avi": ("mpeg4", {"options": {"g": "12", "bf": "2"}}, Grade.COUNTED),
    "mjpeg.avi": ("mjpeg", {"pix_fmt": "yuvj420p"}, Grade.TIMED),
    "vp9.webm": ("libvpx-vp9", {"options": {"g": "30", "deadline": "realtime", "cpu-used": "8"}}, Grade.TIMED),
    "vp8.webm": ("libvpx", {"options": {"g": "30", "lag-in-frames": "10"}}, Grade.TIMED),
    "mpeg2.ts": ("mpeg2video", {"options": {"g": "12", "bf": "2"}}, Grade.SCANNED),
}


def open_videos(folder: Path, names: list[str], root: Path | None = None) -> VideoReader:
    reader = open_reader(reader_spec("video"), records_of(folder, [f"{name} 0" for name in names], root=root))
    assert isinstance(reader, VideoReader)
    return reader


def read(reader: VideoReader, i: int, frames: list[int]) -> np.ndarray:
    metadata = reader.probe(i)
    out = np.empty((len(frames), metadata.height, metadata.width, 3), np.uint8)
    reader.read(i, np.array(frames), None, (metadata.height, metadata.width), out)
    return out


def assert_like_sequential(reader: VideoReader, path: Path, turns: int = 0, seed: int = 0, draws: int = 12) -> None:
    """Metadata and random subsets of frames against a plain decode of the whole file."""
    reference = [np.rot90(image, turns) for image in decode_all(path)]
    metadata = reader.probe(0)
    assert metadata.frames == len(reference)
    assert (metadata.height, metadata.width) == reference[0].shape[:2]
    rng = np.random.default_rng(seed)
    for draw in range(draws):
        if draw == draws // 2:
            reader._drop()  # from here on without the packets that were kept: by seeking in the file
        chosen = rng.choice(metadata.frames, rng.integers(1, min(8, metadata.frames) + 1), replace=False).tolist()
        for image, ordinal in zip(read(reader, 0, chosen), chosen, strict=True):
            assert np.array_equal(image, reference[ordinal]), f"{path.name}: frame {ordinal} of {chosen}"


@pytest.mark.parametrize("name", CASES)
def test_any_frames_equal_the_sequential_decode(name: str, tmp_path: Path) -> None:
    codec, how, grade = CASES[name]
    path = write_video(tmp_path / name, codec, **how)
    assert build_index(str(path), name).grade is grade
    reader = open_videos(tmp_path, [name])
    assert reader.probe(0).frames == 120
    assert_like_sequential(reader, path)
    assert [number_in(image) for image in read(reader, 0, [119, 0, 57, 57, 3])] == [119, 0, 57, 57, 3]


@pytest.mark.parametrize(("source", "hidden"), [("long_gop.mp4", 10), ("gop12.mp4", 17)])
def test_edit_list_hides_frames_before_the_cut(source: str, hidden: int, tmp_path: Path) -> None:
    codec, how, _ = CASES[source]
    path = write_cut(write_video(tmp_path / source, codec, **how), tmp_path / "cut.mp4", hidden)
    reader = open_videos(tmp_path, ["cut.mp4"])
    assert reader.probe(0).frames == 120 - hidden
    assert number_in(read(reader, 0, [0])[0]) == hidden
    assert_like_sequential(reader, path)


def test_the_file_that_was_indexed_last_is_read_once_and_closed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_files() -> list[str]:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sorted(os.path.basename(os.readlink(link)) for link in links if os.path.lexists(link))

    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, X264, 30, options={"g": "12"})
    reader = open_videos(tmp_path, ["a.mp4", "b.mp4"])
    first = read(reader, 0, [29, 3])
    (tmp_path / "a.mp4").unlink()
    assert np.array_equal(read(reader, 0, [29, 3]), first), "nothing was read from the file again"
    assert "b.mp4" not in open_files()
    read(reader, 1, [5])
    held = open_files()
    assert "b.mp4" in held
    assert not [name for name in held if name.startswith("a.mp4")], "one file is open at most"
    reader.close()
    assert "b.mp4" not in open_files()
    monkeypatch.setattr("datasets.readers.video._KEPT_BYTES", 1000)
    reader = open_videos(tmp_path, ["b.mp4"])
    assert number_in(read(reader, 0, [17])[0]) == 17
    assert "b.mp4" not in open_files(), "too large to keep"


def test_frame_rate_comes_from_the_stamps_where_the_header_is_wrong(tmp_path: Path) -> None:
    stamps = list(range(0, 60 * 100, 100))
    write_video(tmp_path / "slow.mkv", X264, 60, stamps=stamps)
    assert open_videos(tmp_path, ["slow.mkv"]).probe(0).fps == pytest.approx(10, rel=1e-3)


def test_box_size_and_repeats(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", X264, 30)
    reader = open_videos(tmp_path, ["a.mp4"])
    whole = read(reader, 0, [7])[0]
    out = np.empty((3, 20, 30, 3), np.uint8)
    reader.read(0, np.array([7, 2, 7]), (10, 20, 70, 60), (20, 30), out)
    expected = cv2.resize(whole[20:60, 10:70], (30, 20), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(out[0], expected)
    assert np.array_equal(out[2], expected)
    exact = np.empty((1, 40, 60, 3), np.uint8)
    reader.read(0, np.array([7]), (10, 20, 70, 60), (40, 60), exact)
    assert np.array_equal(exact[0], whole[20:60, 10:70])


@pytest.mark.parametrize(
    "name", ["-i.mp4", "http:x.mp4", "concat:a.mp4", "a b%20c#?.mp4", "pipe:0", os.fsdecode(b"caf\xe9.mp4")]
)
def test_names_that_look_like_options_or_protocols(name: str, tmp_path: Path) -> None:
    shutil.copy(write_video(tmp_path / "plain.mp4", X264, 12), tmp_path / name)
    records = records_of(tmp_path, [f"{name}\t0" if " " in name else f"{name} 0"])
    assert records.path(0) == name
    reader = open_reader(reader_spec("video"), records)
    out = np.empty((1, SIZE, SIZE, 3), np.uint8)
    reader.read(0, np.array([5]), None, (SIZE, SIZE), out)
    assert number_in(out[0]) == 5


def test_truncated_file_has_the_frames_whose_packets_are_there(tmp_path: Path) -> None:
    data = write_video(tmp_path / "whole.mkv", X264, options={"bf": "0"}).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    reader = open_videos(tmp_path, ["cut.mkv"])
    frames = reader.probe(0).frames
    assert 0 < frames < 120
    assert [number_in(image) for image in read(reader, 0, [0, frames - 1])] == [0, frames - 1]
    with pytest.raises(MediaError, match=f"there are {frames}"):
        reader.read(0, np.array([frames]), None, (8, 8), np.empty((1, 8, 8, 3), np.uint8))


def test_damaged_packet_never_shifts_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", X264, 60, options={"g": "10", "bf": "0"})
    index = build_index(str(path), "a.mp4")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4 + int(index.sizes[:25].sum())
    data[start : start + int(index.sizes[25])] = b"\xff" * int(index.sizes[25])
    (tmp_path / "b.mp4").write_bytes(data)
    reader = open_videos(tmp_path, ["b.mp4"])
    assert [number_in(image) for image in read(reader, 0, [3, 12, 41, 59])] == [3, 12, 41, 59]
    with pytest.raises(MediaError, match="decode"):
        read(reader, 0, [25])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "cannot be opened"),
        (lambda p: p.mkdir(), "not a regular file"),
        (lambda p: os.mkfifo(p), "not a regular file"),
        (lambda p: None, "No such file"),
    ],
)
def test_what_is_no_video_says_why(make, reason: str, tmp_path: Path) -> None:
    make(tmp_path / "x.mp4")
    with pytest.raises(MediaError, match=reason):
        open_videos(tmp_path, ["x.mp4"]).probe(0)


def test_play_list_may_not_reach_the_network(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError):
        open_videos(tmp_path, ["x.mp4"]).probe(0)


def test_same_clip_from_video_and_from_a_lossless_dump(tmp_path: Path) -> None:
    from datasets.plan.sampling import Sampling
    from datasets.plan.train import draw, resolve
    from tests.datasets.specs import train_spec

    path = write_video(tmp_path / "a.mp4", X264, 90, options={"g": "12"})
    (tmp_path / "a").mkdir()
    for ordinal, image in enumerate(decode_all(path)):
        cv2.imwrite(str(tmp_path / "a" / f"img_{ordinal + 1:05d}.png"), image[..., ::-1])
    video = open_videos(tmp_path, ["a.mp4"])
    dump = open_reader(reader_spec("frames"), records_of(tmp_path, ["a 90 0"], name="frames.txt"))
    spec = train_spec(Sampling("tsn", 8), input_size=56)
    for position in range(10):
        plans = [resolve(draw(3, 0, position, spec), reader.probe(0), spec, 0) for reader in (video, dump)]
        clips = [np.empty((8, 56, 56, 3), np.uint8) for _ in plans]
        for reader, plan, clip in zip((video, dump), plans, clips, strict=True):
            reader.read(0, plan.frames, plan.box, plan.size, clip)
        assert np.array_equal(clips[0], clips[1])


ODD = [
    "decord/video_90.mov", "decord/video_180.mov", "mp4parse/video_rotation_90.mp4", "exoplayer/bear-vp9.webm",
    "exoplayer/roadtrip-vp92-10bit.webm", "exoplayer/sample.avi", "exoplayer/sample.flv",
    "exoplayer/sample_fragmented.mp4",
    "exoplayer/sample_sef_super_slow_motion.mp4", "exoplayer/sample_scte35.ts", "mp4parse/tiny_av1.mp4",
    "mp4parse/video_colr_nclx_hdr10.mp4", "torchcodec/h264_10bits.mp4", "torchcodec/nasa_13013.mp4",
    "sense/test_video.mp4",
]  # fmt: skip
SINGLE = ["c3d/v_ApplyEyeMakeup_g01_c01.avi", "mmaction2/demo.mp4", "ucf11/v_biking_01_01.mpg", "imageio/realshort.mp4"]


@pytest.mark.parametrize("name", [f"odd/{name}" for name in ODD] + [f"single/{name}" for name in SINGLE])
def test_real_files_equal_the_sequential_decode(name: str, shared_data: Path, tmp_path: Path) -> None:
    reader = open_videos(tmp_path, [name], root=shared_data)
    with open(shared_data / "manifest.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["path"] == name)
    assert reader.probe(0).frames == int(row["frames"])
    turns = round(float(row["rotation"] or 0) / 90) % 4
    assert_like_sequential(reader, shared_data / name, turns, draws=3)


def test_every_odd_file_is_read_or_refused(shared_data: Path, tmp_path: Path) -> None:
    with open(shared_data / "manifest.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["path"].startswith("odd/")]
    reader = open_videos(tmp_path, [row["path"] for row in rows], root=shared_data)
    for i, row in enumerate(rows):
        if int(row["frames"]) == 0:
            with pytest.raises(MediaError) as refused:
                reader.probe(i)
            assert refused.value.path == row["path"]
        elif int(row["width"]) < 1000:
            assert reader.probe(i).frames == int(row["frames"])


def test_corrupted_file_gives_its_first_frames_and_refuses_the_rest(shared_data: Path, tmp_path: Path) -> None:
    reader = open_videos(tmp_path, ["odd/decord/corrupted.mp4"], root=shared_data)
    assert reader.probe(0).frames == 50
    good = decode_all(shared_data / "odd/decord/corrupted.mp4")
    assert np.array_equal(read(reader, 0, [0, 20])[1], good[20])
    with pytest.raises(MediaError, match="only 28 of its 50 frames decode"):
        read(reader, 0, [40])


def test_pixels_equal_another_decoder_of_the_field(shared_data: Path, tmp_path: Path) -> None:
    rows = golden.rows("decoded_frames")
    for row in rows:
        name = "single/mmaction2/" + Path(row["file"]).name
        reader = open_videos(tmp_path, [name], root=shared_data)
        metadata = reader.probe(0)
        assert (metadata.frames, metadata.fps) == (row["frames"], row["fps"])
        assert [hashlib.sha1(image.tobytes()).hexdigest() for image in read(reader, 0, row["idx"])] == row["sha1"]


def test_files_that_are_read_in_part_cost_no_memory(tmp_path: Path, repo_root: Path) -> None:
    """PyAV loses memory for each demuxer that is left in the middle and not closed: 1.2 MB in this loop."""
    file = write_video(tmp_path / "a.mp4", "libx264", 24, options={"g": "12"})
    script = f"""
import resource, sys
from datasets.readers.video_index import open_container, packets, video_stream
peaks = []
for count in range(5000):
    with open_container({str(file)!r}, "a.mp4") as container:
        read = packets(container, video_stream(container, "a.mp4"))
        first = [next(read) for _ in range(10)]
        del read
    if count in (999, 4999):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(peaks[1] - peaks[0] > 512)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=repo_root, check=False).returncode == 0
