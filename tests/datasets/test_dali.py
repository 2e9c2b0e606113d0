"""The decoder of the reader `dali` on the CPU: which frames, which pixels, and what becomes of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from datasets.lists.records import Records
from datasets.readers import open_reader
from tests.conftest import ROOT
from tests.datasets.specs import reader_spec
from tests.datasets.videos import SIZE, frame_image, number_in, records_of, write_cut, write_video
from utils.errors import MediaError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install '.[dali]')")

from datasets.dali.reader import DaliReader  # noqa: E402

VP9 = "libvpx-vp9"
FRAMES = 60
#: DALI converts colours by its own rules: mean and largest difference of a clip from the reader `video`, of 255.
MEAN, BIAS, WORST = 4.0, 2.0, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    videos = tmp_path_factory.mktemp("dali")
    write_video(videos / "gop12.mp4", VP9, FRAMES, options={"g": "12"})
    write_video(videos / "long.webm", VP9, FRAMES, options={"g": "250"})
    stamps = np.cumsum(np.random.default_rng(1).integers(20, 90, FRAMES)).tolist()
    write_video(videos / "vfr.mp4", VP9, FRAMES, options={"g": "20"}, stamps=stamps)
    write_video(videos / "mjpeg.mp4", "mjpeg", FRAMES, pix_fmt="yuvj420p")
    write_cut(videos / "gop12.mp4", videos / "edited.mp4", 7)
    return videos


def both(records: Records, i: int, frames: list[int], box, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A clip by the readers `dali` and `video`; DALI must have decoded it."""
    clips = []
    for kind in ("dali", "video"):
        reader = open_reader(reader_spec(kind), records)
        clip = np.zeros((len(frames), *size, 3), np.uint8)
        reader.read(i, np.array(frames), box, size, clip)
        if kind == "dali":
            assert isinstance(reader, DaliReader)
            assert not reader.fallbacks
        reader.close()
        clips.append(clip)
    return clips[0], clips[1]


@pytest.mark.parametrize("name", ["gop12.mp4", "long.webm", "vfr.mp4", "mjpeg.mp4", "edited.mp4"])
def test_frames_are_exact_and_colours_near(name: str, folder: Path, tmp_path: Path) -> None:
    records = records_of(tmp_path, [f"{name} 0"], root=folder)
    last = FRAMES - 1 - (7 if name == "edited.mp4" else 0)
    frames = [0, 7, last, 26, 26, 25, 30, 13]
    ours, theirs = both(records, 0, frames, None, (SIZE, SIZE))
    assert [number_in(image) for image in ours] == [number_in(image) for image in theirs]
    assert len({number_in(image) for image in ours}) == len(set(frames))
    for box, size in ((None, (SIZE, SIZE)), ((5, 2, 90, 80), (56, 64)), ((0, 0, 96, 96), (120, 128))):
        ours, theirs = both(records, 0, frames, box, size)
        difference = ours.astype(int) - theirs
        assert np.abs(difference).mean() < MEAN
        assert abs(difference.mean()) < BIAS
        assert np.abs(difference).max() <= WORST


@pytest.mark.parametrize("shard", [False, True])
def test_jpeg_frames_differ_by_rounding_only(shard: bool, tmp_path: Path) -> None:
    if shard:
        from datasets.readers.frame_pack import PackWriter

        writer = PackWriter(
            str(tmp_path / "v.fsh"), template="img_{:05d}.jpg", base=1, fps=25.0, height=SIZE, width=SIZE
        )
        for number in range(12):
            writer.add(simplejpeg.encode_jpeg(frame_image(number), quality=92, colorsubsampling="420"))
        writer.close()
    else:
        (tmp_path / "v").mkdir()
        for number in range(12):
            data = simplejpeg.encode_jpeg(frame_image(number), quality=92, colorsubsampling="420")
            (tmp_path / "v" / f"img_{number + 1:05d}.jpg").write_bytes(data)
    records = records_of(tmp_path, ["v.fsh 0" if shard else "v 12 0"])
    for box, size in ((None, (SIZE, SIZE)), ((5, 2, 90, 80), (56, 64)), ((10, 10, 60, 60), (112, 112))):
        clips = []
        for kind in ("dali", "frames"):
            reader = open_reader(reader_spec(kind), records)
            clip = np.zeros((5, *size, 3), np.uint8)
            reader.read(0, np.array([0, 11, 4, 4, 7]), box, size, clip)
            assert not getattr(reader, "fallbacks", None)
            reader.close()
            clips.append(clip.astype(int))
        assert np.abs(clips[0] - clips[1]).max() <= (0 if box is None else 1)


def test_what_dali_is_not_given_is_read_by_pyav_and_counted(tmp_path: Path) -> None:
    write_video(tmp_path / "h264.mp4", "libx264", 30)
    write_video(tmp_path / "old.avi", "mpeg4", 30)
    (tmp_path / "png").mkdir()
    import cv2

    for number in range(3):
        cv2.imwrite(str(tmp_path / "png" / f"img_{number + 1:05d}.png"), frame_image(number)[..., ::-1])
    records = records_of(tmp_path, ["h264.mp4 0", "old.avi 0", "png 0"])
    reader = open_reader(reader_spec("dali"), records)
    for i in range(3):
        pyav_reader = open_reader(reader_spec("frames" if i == 2 else "video"), records)
        clips = [np.zeros((2, 48, 48, 3), np.uint8) for _ in range(2)]
        for one, clip in zip((reader, pyav_reader), clips, strict=True):
            one.read(i, np.array([0, 2]), (0, 0, 90, 90), (48, 48), clip)
        first, second = clips
        assert np.array_equal(first, second)
    assert isinstance(reader, DaliReader)
    counted = reader.fallbacks
    assert sum(counted.values()) == 3
    assert any("codec h264" in reason for reason in counted)
    assert any("not JPEG" in reason for reason in counted)


def test_damaged_files_fail_as_they_do_elsewhere(folder: Path, tmp_path: Path) -> None:
    from tests.datasets.specs import build_index

    path = folder / "gop12.mp4"
    sizes = build_index(str(path), path.name).sizes
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4 + int(sizes[:25].sum())
    data[start : start + int(sizes[25])] = b"\xff" * int(sizes[25])
    (tmp_path / "damaged.mp4").write_bytes(data)
    (tmp_path / "broken.mp4").write_bytes(b"nothing of the kind")
    records = records_of(tmp_path, ["damaged.mp4 0", "broken.mp4 0", "absent.mp4 0"])
    reader = open_reader(reader_spec("dali"), records)
    clip = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    with pytest.raises(MediaError, match="only 25 of its 60 frames decode"):
        reader.read(0, np.array([3, 26, 59]), None, (SIZE, SIZE), clip)
    reader.read(0, np.array([3, 14, 40]), None, (SIZE, SIZE), clip)
    assert [number_in(image) for image in clip] == [3, 14, 40]
    for i in (1, 2):
        with pytest.raises(MediaError):
            reader.probe(i)


def test_the_definition_for_a_gpu_is_accepted_everywhere() -> None:
    import torch

    from datasets.dali.pipeline import build
    from utils.errors import UserError

    if torch.cuda.is_available():
        for form in ("video", "images"):
            build(form, torch.device("cuda", 0), batch=2, threads=1)
        return
    for form in ("video", "images"):  # a wrong operator or argument would be another error
        with pytest.raises(UserError, match="CUDA is not available"):
            build(form, torch.device("cuda", 0), batch=2, threads=1)


def test_without_dali_the_error_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['nvidia.dali'] = None\n"
        "from datasets.loading.loader import loaders\n"
        "from datasets.dali.pipeline import require_dali\n"
        "from utils.errors import UserError\n"
        "try:\n    require_dali()\nexcept UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install '.[dali]'" in done.stdout
    assert "dali-cuda12" in done.stdout


def test_reader_processes_import_neither_torch_nor_dali(tmp_path: Path) -> None:
    code = (
        "import sys\nimport datasets.loading.workers, datasets.dali.encoded\n"
        "print([name for name in sys.modules if name in ('torch', 'nvidia.dali')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
