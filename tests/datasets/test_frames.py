from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg

from datasets.readers import Reader, open_reader
from datasets.readers.frames import Layout, decode, find_layout
from tests.datasets.specs import reader_spec
from tests.datasets.videos import frame_image, number_in, records_of
from utils.errors import MediaError, UserError


def write_frames(folder: Path, template: str, base: int, count: int, size: tuple[int, int] = (48, 64)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for ordinal in range(count):
        image = frame_image(ordinal, *size)
        file = folder / template.format(base + ordinal)
        if file.suffix == ".jpg":
            file.write_bytes(simplejpeg.encode_jpeg(image, quality=95))
        else:
            assert cv2.imwrite(str(file), image[..., ::-1])
    return folder


def open_frames(folder: Path, lines: list[str], **spec: Any) -> Reader:
    return open_reader(reader_spec("frames", **spec), records_of(folder, lines))


def numbers(reader: Reader, i: int, frames: list[int]) -> list[int]:
    metadata = reader.probe(i)
    out = np.empty((len(frames), metadata.height, metadata.width, 3), np.uint8)
    reader.read(i, np.array(frames), None, (metadata.height, metadata.width), out)
    return [number_in(image) for image in out]


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize(
    "template",
    ["img_{:05d}.jpg", "{:06d}.jpg", "{:05d}.jpg", "image_{:05d}.jpg", "frame{:06d}.jpg", "{:d}.png", "{{_{:03d}.bmp"],
)
def test_template_and_base_are_found(template: str, base: int, tmp_path: Path) -> None:
    write_frames(tmp_path / "v", template, base, 12)
    for line in ("v 0", "v 12 0"):
        reader = open_frames(tmp_path, [line])
        assert reader.probe(0).frames == 12
        assert (reader.probe(0).height, reader.probe(0).width) == (48, 64)
        assert numbers(reader, 0, [0, 11, 4, 4]) == [0, 11, 4, 4]


def test_layout_prefers_rgb_over_flow_and_ends_at_a_gap() -> None:
    names = [f"{kind}_{i:05d}.jpg" for kind in ("flow_x", "flow_y", "img") for i in range(1, 9)]
    assert find_layout(names) == Layout("img_{:05d}.jpg", 1, 8)
    assert find_layout(["000003.jpg", "000001.jpg", "000002.jpg", "000005.jpg", "x.txt"]) == Layout("{:06d}.jpg", 1, 3)
    assert find_layout(["notes.txt", "thumb.jpg"]) is None


def test_a_folder_with_another_base_than_the_first_one_is_not_shifted(tmp_path: Path) -> None:
    write_frames(tmp_path / "a", "img_{:05d}.jpg", 1, 10)
    write_frames(tmp_path / "b", "img_{:05d}.jpg", 0, 11)
    write_frames(tmp_path / "c", "{:06d}.jpg", 0, 10)
    lines = ["a 10 0", "b 10 0", "c 10 0"]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        reader = open_frames(tmp_path, lines)
        assert [numbers(reader, i, [0, 9]) for i in order] == [[0, 9]] * 3


def test_count_of_the_list_is_used(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", "img_{:05d}.jpg", 1, 12)
    assert open_frames(tmp_path, ["v 8 0"]).probe(0).frames == 8


def test_missing_last_frame_is_named_with_the_nearest_file(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", "img_{:05d}.jpg", 1, 12)
    with pytest.raises(MediaError, match=r"img_00015.jpg is missing .*nearest file there is img_0001\d.jpg"):
        open_frames(tmp_path, ["v 15 0"]).probe(0)


def test_given_base_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", "img_{:05d}.jpg", 1, 5)
    with pytest.raises(MediaError, match=r"img_00000.jpg is missing"):
        open_frames(tmp_path, ["v 5 0"], template="img_{:05d}.jpg", frame_base=0).probe(0)
    reader = open_frames(tmp_path, ["v 0"], template="img_{:05d}.jpg")
    assert reader.probe(0).frames == 5
    assert numbers(reader, 0, [0, 4]) == [0, 4]


def test_missing_frame_in_the_middle(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", "img_{:05d}.jpg", 1, 12)
    (tmp_path / "v" / "img_00006.jpg").unlink()
    reader = open_frames(tmp_path, ["v 12 0"])
    assert numbers(reader, 0, [0, 11]) == [0, 11]
    with pytest.raises(MediaError, match="nearest file"):
        numbers(reader, 0, [5])


def test_single_images_are_videos_of_one_frame(tmp_path: Path) -> None:
    write_frames(tmp_path, "pic{:d}.jpg", 3, 4)
    reader = open_frames(tmp_path, ["pic3.jpg 0", "pic6.jpg 1"])
    assert [reader.probe(i).frames for i in range(2)] == [1, 1]
    assert [numbers(reader, i, [0]) for i in range(2)] == [[0], [3]]


def test_box_and_resize(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", "{:05d}.png", 0, 3)
    reader = open_frames(tmp_path, ["v 3 0"])
    out = np.empty((2, 30, 30, 3), np.uint8)
    reader.read(0, np.array([1, 2]), (4, 8, 44, 48), (30, 30), out)
    expected = cv2.resize(frame_image(2, 48, 64)[8:48, 4:44], (30, 30), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(out[1], expected)


def test_frames_of_mixed_sizes_are_scaled_to_the_first(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", "{:05d}.png", 0, 2)
    cv2.imwrite(str(tmp_path / "v" / "00001.png"), frame_image(1, 96, 128)[..., ::-1])
    assert numbers(open_frames(tmp_path, ["v 2 0"]), 0, [0, 1]) == [0, 1]


def test_damaged_images_are_refused(tmp_path: Path) -> None:
    jpeg = simplejpeg.encode_jpeg(frame_image(5))
    for data, reason in [(jpeg[: len(jpeg) // 2], "damaged"), (b"", "empty"), (b"hello", "not an image")]:
        with pytest.raises(MediaError, match=reason):
            decode(data, "x.jpg")
    harmless = jpeg[:-2] + b"\0\0" + jpeg[-2:]
    assert np.array_equal(decode(harmless, "x.jpg"), decode(jpeg, "x.jpg"))


def test_grey_and_alpha_images_become_rgb(tmp_path: Path) -> None:
    grey = np.full((10, 12), 77, np.uint8)
    for suffix, image in [(".jpg", grey), (".png", grey), (".png", np.full((10, 12, 4), 77, np.uint8))]:
        cv2.imwrite(str(tmp_path / f"x{suffix}"), image)
        assert decode((tmp_path / f"x{suffix}").read_bytes(), "x").shape == (10, 12, 3)


def test_fifo_and_empty_folder_do_not_hang(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "v").mkdir()
    os.mkfifo(tmp_path / "v" / "img_00001.jpg")
    reader = open_frames(tmp_path, ["empty 0", "v 0", "gone 0"])
    for i, reason in enumerate(["no numbered images", "not a regular file|missing", "no such folder"]):
        with pytest.raises(MediaError, match=reason):
            reader.probe(i)


def test_unknown_reader_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    with pytest.raises(UserError, match="choose one of frames, "):
        open_reader(reader_spec("vide"), records_of(tmp_path, ["v 0"]))


def test_real_frame_folders(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "frames" / "raivokoot_demo"
    lines = ["jumping/0001 17 0", "running/0002 15 1"]
    reader = open_reader(reader_spec("frames"), records_of(tmp_path, lines, root=root))
    assert [reader.probe(i).frames for i in range(2)] == [17, 15]


@pytest.mark.parametrize("template", ["x", "{:d", "{:q}", "{} {}", "{name}", "{0.real.x}"])
def test_a_template_without_a_number_is_refused(template: str, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "x").touch()
    with pytest.raises(UserError, match="not a file name with one number"):
        open_frames(tmp_path, ["v 0"], template=template).probe(0)
