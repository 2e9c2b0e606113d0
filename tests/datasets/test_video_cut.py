from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest

from datasets.dali.video_cut import Refused, cut
from tests.datasets.specs import build_index
from tests.datasets.videos import decode_all, write_cut, write_video

CODECS = frozenset({"h264", "hevc", "vp9", "mjpeg"})
SIDES = (16, 4096)
FRAMES = 90
CASES = {
    "long_gop.mp4": ("libx264", {"bf": "3", "g": "250"}),
    "gop12.mp4": ("libx264", {"bf": "2", "g": "12"}),
    "open_gop.mp4": ("libx264", {"bf": "2", "g": "12", "x264-params": "open-gop=1"}),
    "h264.mkv": ("libx264", {"bf": "3", "g": "30"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:keyint=20"}),
    "vp9.mp4": ("libvpx-vp9", {"g": "20"}),
    "vp9.webm": ("libvpx-vp9", {"g": "20"}),
    "mjpeg.mp4": ("mjpeg", {}),
}


def make(path: Path, codec: str, options: dict[str, str]) -> Path:
    return write_video(path, codec, FRAMES, options=options, pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p")


def cut_and_decode(path: Path, ordinals: list[int]) -> tuple[list[np.ndarray], np.ndarray]:
    data, rows, _ = cut(str(path), path.name, build_index(str(path), path.name), ordinals, CODECS, SIDES)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stated = stream.frames
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert len(container.streams) == 1
    assert stated == len(images)
    return images, rows


@pytest.mark.parametrize("name", CASES)
def test_frames_of_a_cut_are_those_of_the_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    path = make(tmp_path / name, *CASES[name])
    whole = decode_all(path)
    generator = np.random.default_rng(7)
    dense = (np.arange(16) * 2 + 31).tolist()
    for ordinals in ([0], [FRAMES - 1], [70, 3, 3, 44], dense, *generator.integers(0, FRAMES, (6, 8)).tolist()):
        images, rows = cut_and_decode(path, ordinals)
        for ordinal, row in zip(ordinals, rows, strict=True):
            assert np.array_equal(images[row], whole[ordinal]), f"frame {ordinal} of {name}"


def test_what_nobody_needs_is_left_out(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", *CASES["long_gop.mp4"])
    images, _ = cut_and_decode(path, [0, 30, 60])
    assert len(images) < 45
    images, _ = cut_and_decode(make(tmp_path / "b.mp4", *CASES["gop12.mp4"]), [FRAMES - 1])
    assert len(images) <= 12


def test_an_edit_list_hides_no_frame_from_a_cut(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole.mp4", *CASES["vp9.mp4"])
    path = write_cut(whole, tmp_path / "edited.mp4", 7)
    shown = decode_all(path)
    assert len(shown) == FRAMES - 7
    images, rows = cut_and_decode(path, [0, 5, 60])
    for ordinal, row in zip([0, 5, 60], rows, strict=True):
        assert np.array_equal(images[row], shown[ordinal])


def test_long_files_are_read_by_seeking(tmp_path: Path) -> None:
    path = write_video(tmp_path / "long.mp4", "libx264", 1200, options={"g": "50", "preset": "ultrafast"})
    index = build_index(str(path), path.name)
    data, rows, _ = cut(str(path), path.name, index, [3, 1111], CODECS, SIDES)
    assert len(data) < path.stat().st_size // 4
    whole = decode_all(path)
    with av.open(io.BytesIO(data)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.array_equal(images[rows[0]], whole[3])
    assert np.array_equal(images[rows[1]], whole[1111])


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "reason"),
    [
        ("a.mp4", "libx264", "yuv444p", "pixel format yuv444p"),
        ("a.avi", "mpeg4", "yuv420p", "codec mpeg4"),
        ("a.ts", "libx264", "yuv420p", "time stamps"),
    ],
)
def test_what_a_device_might_get_wrong_is_refused(
    name: str, codec: str, pix_fmt: str, reason: str, tmp_path: Path
) -> None:
    path = write_video(tmp_path / name, codec, 20, pix_fmt=pix_fmt)
    with pytest.raises(Refused, match=reason):
        cut(str(path), name, build_index(str(path), name), [3], CODECS, SIDES)


def test_frames_too_small_or_a_changed_file_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", "libx264", 20)
    index = build_index(str(path), "a.mp4")
    with pytest.raises(Refused, match="frames of 96x96"):
        cut(str(path), "a.mp4", index, [3], CODECS, (128, 4096))
    write_video(path, "libx264", 20, options={"crf": "40"})
    with pytest.raises(Refused, match="not where its index says"):
        cut(str(path), "a.mp4", index, [3], CODECS, SIDES)
