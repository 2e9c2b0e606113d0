from __future__ import annotations

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from datasets.lists.records import Records
from datasets.plan.sampling import Sampling
from datasets.plan.train import draw, resolve
from datasets.readers import open_reader
from datasets.readers.frame_pack import PackWriter
from datasets.readers.metadata_cache import KnownMetadata, MetadataCache
from datasets.scan import verb as scan
from tests.datasets.specs import reader_spec, train_spec
from tests.datasets.videos import frame_image, number_in, write_video
from utils.errors import MediaError, UserError

VIDEOS = ("a.mp4", "b.avi", "c.ts", "part.mp4")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Videos of each grade (b: counted, c: scanned) and two folders of frames; their metadata in scan/."""
    root = tmp_path / "data"
    root.mkdir()
    write_video(root / "a.mp4", "libx264", 30)
    shutil.copy(root / "a.mp4", root / "part.mp4")
    write_video(root / "b.avi", "mpeg4", 30, options={"g": "12", "bf": "2"})
    write_video(root / "c.ts", "mpeg2video", 30, options={"g": "12", "bf": "2"})
    for name, count in (("f", 9), ("g", 7)):
        (root / name).mkdir()
        for number in range(1, count + 1):
            cv2.imwrite(str(root / name / f"img_{number:05d}.jpg"), frame_image(number))
    (root / "video.txt").write_text("a.mp4 0 30 0\nb.avi 0 30 0\nc.ts 0 30 1\npart.mp4 10 5 1\n")
    shard = PackWriter(str(root / "s.fsh"), template="img_{:05d}.jpg", base=1, height=96, width=96, fps=12.0)
    for number in range(6):
        shard.add(cv2.imencode(".jpg", frame_image(number))[1].tobytes())
    shard.close()
    (root / "frames.txt").write_text("f 9 0\ng 5 1\ns.fsh 6 1\n")  # g is believed to have 5
    lists = [str(root / "video.txt"), str(root / "frames.txt")]
    assert (
        scan.main(
            [*lists, "--root", str(root), "--out", str(tmp_path / "scan"), "--decode", "header", "--workers", "1"]
        )
        == 0
    )
    return root


def plans(kind: str, data: Path, name: str, metadata: Path | None) -> tuple[list, KnownMetadata | None]:
    records = Records.load(data / name, data, num_class=2)
    reader = open_reader(reader_spec(kind, metadata=None if metadata is None else str(metadata)), records)
    spec = train_spec(Sampling("tsn", 3), input_size=32)
    read_plans = []
    for position in range(6 if kind == "frames" else 8):
        i = position % len(records)
        plan = resolve(draw(7, 0, position, spec), reader.probe(i), spec, i)
        clip = np.empty((3, 32, 32, 3), np.uint8)
        reader.read(i, plan.frames, plan.box, plan.size, clip)
        read_plans.append((reader.probe(i), plan.frames.tolist(), plan.box, clip.tobytes()))
    reader.close()
    return read_plans, reader if isinstance(reader, KnownMetadata) else None


@pytest.mark.parametrize(("kind", "name", "unknown"), [("video", "video.txt", 0), ("frames", "frames.txt", 4)])
def test_clips_are_the_same_with_and_without_metadata(kind: str, name: str, unknown: int, data: Path) -> None:
    without, _ = plans(kind, data, name, None)
    known, reader = plans(kind, data, name, data.parent / "scan" / "metadata.bin")
    assert known == without
    assert reader is not None
    assert (reader.asked, reader.asked - reader.hits) == (2 * len(known), unknown)


def test_a_file_that_changed_is_probed_again(data: Path) -> None:
    cache = data.parent / "scan" / "metadata.bin"
    write_video(data / "a.mp4", "libx264", 12)
    cv2.imwrite(str(data / "f" / "img_00001.jpg"), frame_image(1, 48, 64))  # in place: the folder's time stays
    records = Records.load(data / "video.txt", data, num_class=2)
    assert open_reader(reader_spec("video", metadata=str(cache)), records).probe(0).frames == 12
    frames = Records.load(data / "frames.txt", data, num_class=2)
    assert open_reader(reader_spec("frames", metadata=str(cache)), frames).probe(0).height == 48
    os.remove(data / "b.avi")
    with pytest.raises(MediaError, match="No such file"):
        open_reader(reader_spec("video", metadata=str(cache)), records).probe(1)


def test_metadata_spare_the_decoding_that_counts(data: Path) -> None:
    """A transport stream is decoded to its end to count its frames; known, only the frames up to the wanted one are."""
    records = Records.load(data / "video.txt", data, num_class=2)
    reader = open_reader(reader_spec("video", metadata=str(data.parent / "scan" / "metadata.bin")), records)
    assert reader.probe(2).frames == 30
    whole = (data / "c.ts").stat()
    with open(data / "c.ts", "r+b") as file:  # the second half is gone; the reader must not need it
        file.seek(whole.st_size // 2)
        file.write(bytes(whole.st_size - whole.st_size // 2))
    out = np.empty((1, 96, 96, 3), np.uint8)
    reader.read(2, np.array([3]), None, (96, 96), out)
    assert number_in(out[0]) == 3


def test_naming_of_frames_is_part_of_the_answer(data: Path) -> None:
    cache = str(data.parent / "scan" / "metadata.bin")
    frames = Records.load(data / "frames.txt", data, num_class=2)
    reader = open_reader(reader_spec("frames", fps=12.0, metadata=cache), frames)
    assert reader.probe(0).fps == 12.0
    assert isinstance(reader, KnownMetadata)
    assert reader.hits == 0


def test_wrong_caches_are_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not the metadata.bin of a scan"):
        MetadataCache(data / "video.txt")
    with pytest.raises(UserError, match="makes it"):
        MetadataCache(data / "none.bin")
    monkeypatch.setattr("datasets.readers.metadata_cache.PROBE_VERSION", 99)
    with pytest.raises(UserError, match="probe version .* main.py scan .* again"):
        MetadataCache(data.parent / "scan" / "metadata.bin")


def test_training_takes_metadata_from_the_config(motion_videos: Path, tmp_path: Path) -> None:
    from datasets.loading import loader
    from datasets.loading.train import TrainLoader
    from datasets.plan.train import train_spec
    from tests import experiment
    from utils import config
    from utils.shards import ShardPlan

    exp = experiment.make(tmp_path / "exp", motion_videos, workers=1)
    listed = str(motion_videos / "lists/train.txt")
    scan.main(
        [listed, "--root", str(motion_videos), "--out", str(exp / "scan"), "--decode", "header", "--workers", "1"]
    )
    clips = []
    for overrides in ([], ["data.metadata=scan/metadata.bin"]):
        cfg = config.load(exp, overrides)
        options = loader.loader_options(cfg)
        assert options.reader.metadata == (str(exp / "scan" / "metadata.bin") if overrides else None)
        plan = ShardPlan(total=1, batch_size=4, world=1, rank=0, group_size=1)
        with TrainLoader(
            loader.records_of(cfg, "train"), train_spec(cfg), options, seed=3, shards=plan, stop=3
        ) as clip_loader:
            clips.append([batch.clips.clone() for _, batches in clip_loader for batch in batches])
    assert all(bool((a == b).all()) for a, b in zip(*clips, strict=True))
    (exp / "scan" / "metadata.bin").write_bytes(b"something else")
    with pytest.raises(UserError, match="is not the metadata.bin of a scan"):
        loader.loader_options(config.load(exp, ["data.metadata=scan/metadata.bin"]))
    with pytest.raises(UserError, match=r"data\.metadata: there is no .*none\.bin"):
        config.check_files(config.load(exp, ["data.metadata=scan/none.bin"]))


def test_damaged_caches_are_refused(data: Path, tmp_path: Path) -> None:
    good = (data.parent / "scan" / "metadata.bin").read_bytes()
    length = int.from_bytes(good[8:16], "little")
    header = good[16 : 16 + length]
    changes = [
        good[: len(good) // 2],
        good[:-1],
        good + b"x",
        good[:12],
        good[:16] + b"?" * length + good[16 + length :],
        good[:16] + b"[]".ljust(length) + good[16 + length :],
        good.replace(b'"words"', b'"wards"'),
        good.replace(b'"entries"', b'"entrees"'),
        good.replace(header, header.replace(b'"entries": ', b'"entries":-')),
    ]
    for bad in changes:
        assert bad != good
        (tmp_path / "bad.bin").write_bytes(bad)
        with pytest.raises(UserError, match="scan again"):
            MetadataCache(tmp_path / "bad.bin")
