"""One plan through every reader: the same frames by ordinal, and the same pixels.

The reader `video` on the original is the reference. Lossless dumps of it (folders of PNG, shards, clips) must give the
same bits through `video`, `frames` and `memcached`; `dali` converts colours by its own rules and has a tolerance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datasets.dump import verb as dump
from datasets.lists.records import Records
from datasets.memcached.source import MemcachedReader
from datasets.plan.sampling import Sampling
from datasets.plan.train import draw, resolve
from datasets.readers import READERS, Reader, open_reader
from tests.datasets.specs import reader_spec, train_spec
from tests.datasets.videos import SIZE, number_in, write_cut, write_video
from tests.memcached import MISSING, Server

FRAMES = 60
REAL = [
    "odd/torchcodec/h264_10bits.mp4", "odd/datumaro/test.mp4", "odd/exoplayer/bear-vp9.webm",
    "single/mmaction2/part_0.mp4",
]  # fmt: skip
#: form: (reader, the format of `dump --as`; None = the original)
FORMS: dict[str, tuple[str, str | None]] = {
    "frames": ("frames", "frames"),
    "packs": ("frames", "packs"),
    "clips": ("video", "clips"),
    "memcached, packs": ("memcached", "packs"),
    "memcached, folders": ("memcached", "frames"),
    "dali": ("dali", None),
}
#: of 255, for dali: mean difference of a clip, its bias.
MEAN, BIAS = 4.0, 2.0
SPECS = {
    "TSN-8": train_spec(Sampling("tsn", 8), input_size=64, crop="random_resized"),
    "8x2": train_spec(Sampling("mmaction2_1x", 1, 8, 2), input_size=80, crop="multi_scale"),
}


@pytest.fixture(scope="module")
def barcodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos whose frames carry their numbers, and a list: long and short GOP, B-frames, VFR, an edit list, MPEG-4."""
    folder = tmp_path_factory.mktemp("barcodes")
    stamps = np.cumsum(np.random.default_rng(1).integers(20, 90, FRAMES)).tolist()
    write_video(folder / "long.mp4", "libx264", FRAMES, options={"g": "250", "bf": "3"})
    write_video(folder / "short.mp4", "libx264", FRAMES, options={"g": "12", "tune": "fastdecode"})
    write_video(folder / "vfr.mp4", "libvpx-vp9", FRAMES, options={"g": "20", "cpu-used": "8"}, stamps=stamps)
    write_video(folder / "vp9.webm", "libvpx-vp9", FRAMES, options={"g": "12", "cpu-used": "8"})
    write_cut(folder / "vp9.webm", folder / "edited.mp4", 7)
    write_video(folder / "old.avi", "mpeg4", FRAMES, options={"g": "15", "bf": "2"})
    names = ["long.mp4", "short.mp4", "vfr.mp4", "vp9.webm", "edited.mp4", "old.avi"]
    (folder / "train.txt").write_text("".join(f"{name} 0\n" for name in names))
    return folder


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to real files, and a list."""
    folder = tmp_path_factory.mktemp("real")
    names = [*REAL, next((shared_data / "weizmann4").rglob("*.*")).relative_to(shared_data).as_posix()]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(shared_data / name)
    (folder / "train.txt").write_text("".join(f"{name} 0\n" for name in names))
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Server | None]:
    """A memcached on a socket, None where it is not installed."""
    if MISSING:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="zoe-") as folder:  # the name of a socket must be short
        running = Server(Path(folder), "s")
        yield running
        running.close()


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Path, str], Path]:
    """Lossless dumps that were made so far: (folder, form) -> folder."""
    return {}


def stored(folder: Path, form: str | None, dumps: dict[tuple[Path, str], Path]) -> Path:
    """The folder with the media in a form; it is made when it is first asked for."""
    if form is None:
        return folder
    if (folder, form) not in dumps:
        out = folder.with_name(f"{folder.name}-{form}")
        words = [str(folder / "train.txt"), str(out), "--as", form, "--lossless", "--short-side", "0"]
        assert dump.main([*words, "--workers", "1"]) == 0
        dumps[folder, form] = out
    return dumps[folder, form]


def opened(folder: Path, kind: str, server: Server | None) -> tuple[Reader, Records]:
    if kind == "memcached" and server is None:
        pytest.skip(f"{MISSING}")
    if kind == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (pip install '.[dali]')")
    records = Records.load(folder / "train.txt", folder, num_class=1)
    places = {"timeout_ms": 5000.0, "connect_timeout_ms": 5000.0, "secret_file": None, "namespace": ""}
    cached = {"servers": [server.name], **places} if kind == "memcached" and server else None
    return open_reader(reader_spec(kind, memcached=cached), records), records


def read(reader: Reader, i: int, frames: np.ndarray, box, size: tuple[int, int]) -> np.ndarray:
    clip = np.zeros((len(frames), *size, 3), np.uint8)
    reader.read(i, frames, box, size, clip)
    return clip


def assert_same(ours: np.ndarray, reference: np.ndarray, kind: str, where: str) -> None:
    """Bit for bit; for dali within its tolerance."""
    if kind != "dali":
        assert np.array_equal(ours, reference), where
        return
    difference = ours.astype(int) - reference
    assert np.abs(difference).mean() < MEAN, where
    assert abs(difference.mean()) < BIAS, where


def test_every_reader_of_a_config_is_compared() -> None:
    compared = {kind for kind, _ in FORMS.values()} | {"video"}
    assert set(READERS) - {"encoded"} == compared, "a new reader joins FORMS; `encoded` gives bytes, not pixels"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["barcodes", "real"])
def test_same_clips_of_the_same_plans(
    source: str,
    form: str,
    server: Server | None,
    dumps: dict[tuple[Path, str], Path],
    request: pytest.FixtureRequest,
) -> None:
    folder: Path = request.getfixturevalue(source)
    kind, written = FORMS[form]
    reference, records = opened(folder, "video", None)
    reader, theirs = opened(stored(folder, written, dumps), kind, server)
    assert len(records) == len(theirs)
    for i in range(len(records)):
        expected_facts, facts_read = reference.probe(i), reader.probe(i)
        assert (facts_read.frames, facts_read.height, facts_read.width) == (
            expected_facts.frames,
            expected_facts.height,
            expected_facts.width,
        ), records.path(i)
        for name, spec in SPECS.items():
            for position in range(3):
                plans = [
                    resolve(draw(3, 0, position, spec), metadata, spec, i) for metadata in (expected_facts, facts_read)
                ]
                assert np.array_equal(plans[0].frames, plans[1].frames)
                assert plans[0].box == plans[1].box
                clips = [
                    read(each, i, plan.frames, plan.box, plan.size)
                    for each, plan in zip((reader, reference), plans, strict=True)
                ]
                assert clips[1].std() > 1, "a clip of one colour would prove nothing"
                assert_same(clips[0], clips[1], kind, f"{records.path(i)}, {name}, clip {position}")
    reader.close()
    reference.close()


@pytest.mark.parametrize("form", ["video", *FORMS])
def test_barcodes_show_the_ordinal_that_was_asked_for(
    form: str, barcodes: Path, server: Server | None, dumps: dict[tuple[Path, str], Path]
) -> None:
    kind, written = FORMS.get(form, ("video", None))
    reader, records = opened(stored(barcodes, written, dumps), kind, server)
    for i in range(len(records)):
        hidden = 7 if "edited" in records.path(i) else 0
        frames = np.array([0, 31, 7, FRAMES - 1 - hidden, 12, 11, 31, 13])
        shown = [number_in(image) for image in read(reader, i, frames, None, (SIZE, SIZE))]
        assert shown == (frames + hidden).tolist(), records.path(i)
    reader.close()


def test_a_warm_cache_answers_with_the_same_pixels(
    barcodes: Path, server: Server | None, dumps: dict[tuple[Path, str], Path]
) -> None:
    """The second read comes from the servers, and says so."""
    reader, _ = opened(stored(barcodes, "frames", dumps), "memcached", server)
    assert isinstance(reader, MemcachedReader)
    frames = np.arange(8)
    first = read(reader, 0, frames, None, (SIZE, SIZE))
    reader.pool.flush(30)
    reader.counters()
    assert np.array_equal(read(reader, 0, frames, None, (SIZE, SIZE)), first)
    assert reader.pool.take()[0]["hits"] >= len(frames)
    reader.close()
