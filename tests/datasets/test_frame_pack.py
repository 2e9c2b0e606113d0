from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from datasets.readers import open_reader
from datasets.readers.frame_pack import FramePack, PackWriter
from datasets.readers.frame_source import FilesSource
from tests.datasets.specs import reader_spec
from tests.datasets.videos import frame_image, number_in, records_of
from utils.errors import MediaError

COUNT = 12


def write_shard(path: Path, count: int = COUNT, template: str = "img_{:05d}.jpg", base: int = 1) -> list[bytes]:
    images = [simplejpeg.encode_jpeg(frame_image(k, 48, 64), quality=95) for k in range(count)]
    pack = PackWriter(str(path), template=template, base=base, height=48, width=64, fps=25.0)
    for image in images:
        pack.add(image)
    assert not path.exists()
    pack.close()
    return images


def test_a_pack_answers_like_a_folder(tmp_path: Path) -> None:
    images = write_shard(tmp_path / "v.fsh", template="{{x}}_{:03d}.jpg", base=0)
    source, folder = FilesSource(), str(tmp_path / "v.fsh")
    names = [f"{{x}}_{k:03d}.jpg" for k in range(COUNT)]
    assert source.is_folder(folder)
    assert source.names(folder) == names
    assert source.read_many(folder, [names[7], names[0], names[7]]) == [images[7], images[0], images[7]]
    assert source.read(os.path.join(folder, names[11])) == images[11]
    for wrong in ("{x}_012.jpg", "{x}_1.jpg", "{x}_0001.jpg", "x", "{x}_-01.jpg"):
        assert not source.exists(os.path.join(folder, wrong)), wrong
        with pytest.raises(MediaError, match="no such frame"):
            source.read(os.path.join(folder, wrong))


def test_the_reader_reads_packs_and_knows_their_metadata(tmp_path: Path) -> None:
    write_shard(tmp_path / "v.fsh")
    records = records_of(tmp_path, ["v.fsh 0 12 0", "v.fsh 4 5 0", "v.fsh 8 9 0"])
    reader = open_reader(reader_spec("frames", template="other_{:d}.jpg", frame_base=0), records)
    metadata = reader.probe(0)
    assert (metadata.frames, metadata.height, metadata.width, metadata.fps) == (12, 48, 64, 25.0)
    out = np.empty((3, 48, 64, 3), np.uint8)
    reader.read(1, np.array([0, 4, 0]), None, (48, 64), out)
    assert [number_in(image) for image in out] == [4, 8, 4]
    with pytest.raises(MediaError, match="9 frames, starting at 8, were requested; the pack has 12"):
        reader.probe(2)


def test_damage_is_named_wherever_it_is(tmp_path: Path) -> None:
    images = write_shard(tmp_path / "v.fsh", count=3)
    good = (tmp_path / "v.fsh").read_bytes()
    for size in (0, 7, 100, len(good) // 2, len(good) - 1):
        (tmp_path / "cut.fsh").write_bytes(good[:size])
        with pytest.raises(MediaError, match="end is missing"):
            FramePack(str(tmp_path / "cut.fsh"))
    rng = np.random.default_rng(0)
    for position in [*rng.integers(0, len(good), 60).tolist(), *range(len(good) - 24, len(good))]:
        bad = bytearray(good)
        bad[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "bad.fsh").write_bytes(bad)
        try:
            pack = FramePack(str(tmp_path / "bad.fsh"))
            read = [pack.read([k]) for k in range(3)]
        except MediaError:
            continue
        pack.close()
        assert position < 8  # the magic at the start is the only byte that nothing depends on
        assert read == [[image] for image in images]
    os.mkfifo(tmp_path / "fifo.fsh")
    with pytest.raises(MediaError, match="not a regular file"):
        FramePack(str(tmp_path / "fifo.fsh"))


def test_a_long_pack_and_an_abandoned_one(tmp_path: Path) -> None:
    writer = PackWriter(str(tmp_path / "v.fsh"), template="{:06d}.jpg", base=1, height=1, width=1)
    for k in range(5000):
        writer.add(b"%d" % k)
    writer.close()
    pack = FramePack(str(tmp_path / "v.fsh"))
    assert pack.read([0, 4999, 2500]) == [b"0", b"4999", b"2500"]
    with pytest.raises(IndexError):
        pack.read([5000])
    pack.close()
    writer = PackWriter(str(tmp_path / "w.fsh"), template="{:06d}.jpg", base=1, height=1, width=1)
    writer.add(b"x")
    writer.abandon()
    assert [file.name for file in tmp_path.iterdir()] == ["v.fsh"]


@pytest.mark.parametrize(
    ("offsets", "info", "reason"),
    [
        ([8, 20, 18, 30], {}, "points to bytes that are not frames"),
        ([8, 18, 20, 4000], {}, "points to bytes that are not frames"),
        ([0, 18, 20, 30], {}, "points to bytes that are not frames"),
        (None, {"height": 0}, "says 64x0"),
        (None, {"width": -3}, "says -3x48"),
        (None, {"fps": float("nan")}, "at nan frames/s"),
        (None, {"height": float("inf")}, "the header of the pack is damaged"),
    ],
)
def test_tables_that_cannot_be_are_refused(
    offsets: list[int] | None, info: dict[str, float], reason: str, tmp_path: Path
) -> None:
    """The sums are right: somebody wrote it so."""
    path = tmp_path / "v.fsh"
    writer = PackWriter(str(path), template="{:06d}.jpg", base=1, height=48, width=64, info=info)
    for _ in range(3):
        writer.add(b"0123456789")
    if offsets:
        writer._offsets = offsets
    writer.close()
    with pytest.raises(MediaError, match=reason):
        FramePack(str(path))
