"""Packets that are not frames, videos without their last frames, and text files that name other files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from datasets.dump.verb import main as dump
from datasets.loading.base import LoaderOptions
from datasets.loading.eval import EvalLoader
from datasets.loading.train import TrainLoader
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec
from datasets.readers import open_reader
from datasets.readers.ending import EndsEarly, is_tolerable, on_what_decodes
from datasets.readers.metadata_cache import KnownMetadata
from datasets.readers.video_index import Grade
from datasets.scan.verb import main as scan
from tests.datasets.media_files import DIVX_PACKED, XVID, encode, packed, placeholder, write_avi
from tests.datasets.specs import build_index, reader_spec, train_spec
from tests.datasets.videos import decode_all, number_in, records_of, write_video
from utils.errors import MediaError
from utils.shards import ShardPlan

WITH_B = {"bf": "2", "g": "12"}


def frames_of(folder: Path, name: str, missing_share: float = 0.05) -> list[int]:
    """Numbers of all frames by the reader, in one read."""
    reader = open_reader(
        reader_spec("video", missing_share=missing_share), records_of(folder, [f"{name} 0"], name="one.txt")
    )

    def work(reader) -> list[int]:
        metadata = reader.probe(0)
        out = np.empty((metadata.frames, metadata.height, metadata.width, 3), np.uint8)
        reader.read(0, np.arange(metadata.frames), None, (metadata.height, metadata.width), out)
        return [number_in(image) for image in out]

    numbers, _ = on_what_decodes(reader, 0, work)
    reader.close()
    return numbers


def numbers_in(path: Path) -> list[int]:
    return [number_in(image) for image in decode_all(path)]


@pytest.mark.parametrize("at_end", [0, 1, 2, 3])
@pytest.mark.parametrize("b_frames", [1, 2, 3])
def test_packed_frames_are_counted_by_their_headers(b_frames: int, at_end: int, tmp_path: Path) -> None:
    chunks = packed(encode("mpeg4", 24, options={"bf": str(b_frames), "g": "12"}), at_end=at_end)
    path = write_avi(tmp_path / "a.avi", chunks)
    index = build_index(str(path), "a.avi")
    assert len(chunks) >= 24 + at_end
    assert (index.grade, index.metadata.frames) == (Grade.COUNTED, len(decode_all(path)))
    assert frames_of(tmp_path, "a.avi") == numbers_in(path)


CASES = {
    "no placeholder is due": [("insert", 5, placeholder(3))],
    "placeholder at the end, nothing reordered": [("append", placeholder())],
    "one byte": [("append", b"\x7f")],
    "empty chunk": [("insert", 4, b""), ("insert", 9, b"")],
    "packed, but not announced": [("join",)],
    "a third picture in a packet": [("join3",)],
    "a packet that is no picture": [("insert", 7, b"\xff" * 40)],
    "placeholder before the first B-frame": [("insert", 1, placeholder())],
}


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("case", CASES)
def test_count_and_frames_are_those_of_a_full_decode(case: str, b_frames: int, tmp_path: Path) -> None:
    chunks = encode("mpeg4", 20, options={"bf": str(b_frames), "g": "250"})
    for what, *more in CASES[case]:
        if what == "insert":
            chunks.insert(*more)
        elif what == "append":
            chunks.append(*more)
        else:
            size = 2 if what == "join" else 3
            chunks[4 : 4 + size] = [b"".join(chunks[4 : 4 + size])]
    path = write_avi(tmp_path / "a.avi", chunks)
    truth, damaged = plain_count(path)
    if damaged:  # by the first packet that does not decode, most of the video is missing
        with pytest.raises(MediaError, match="decode"):
            frames_of(tmp_path, "a.avi")
        return
    assert build_index(str(path), "a.avi").metadata.frames == truth
    assert len(frames_of(tmp_path, "a.avi")) == truth


def plain_count(path: Path) -> tuple[int, bool]:
    """Frames of a file, packet by packet, and whether a packet of more than 8 bytes did not decode."""
    import av
    from av.error import FFmpegError

    count, damaged = 0, False
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            if packet.size:
                try:
                    count += len(stream.codec_context.decode(packet))
                except FFmpegError:
                    damaged |= packet.size > 8
        count += len(stream.codec_context.decode(None))
    return count, damaged


def test_interlaced_h264_is_not_counted_by_its_packets(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", "libx264", 20, options={"x264-params": "tff=1"})
    assert build_index(str(path), "a.mp4").grade is Grade.SCANNED
    assert frames_of(tmp_path, "a.mp4") == list(range(20))


def test_a_stream_that_begins_between_key_frames(tmp_path: Path) -> None:
    data = write_video(tmp_path / "whole.ts", "libx264", 60, options={"g": "20", "bf": "0"}).read_bytes()
    (tmp_path / "a.ts").write_bytes(data[: 188 * 3] + data[188 * (len(data) // 188 // 3) :])
    numbers = frames_of(tmp_path, "a.ts")
    assert numbers == list(range(numbers[0], 60))
    assert 0 < numbers[0] <= 40


def overwrite(path: Path, first: int, last: int, fill: bytes) -> None:
    """Replace the content of packets `first` to `last` - 1 of an mp4 file."""
    sizes = build_index(str(path), path.name).sizes
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4 + int(sizes[:first].sum())
    length = int(sizes[first:last].sum())
    data[start : start + length] = (fill * length)[:length]
    path.write_bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 60 frames: whole.mp4, short.mp4 without its last 2, bad.mp4 without its last 8, vp9.mp4 like short."""
    videos = tmp_path_factory.mktemp("videos")
    for name, lost in (("whole", 0), ("short", 2), ("bad", 8)):
        path = write_video(videos / f"{name}.mp4", "libx264", 60, options={"bf": "0", "g": "12"})
        if lost:
            overwrite(path, 60 - lost, 60, b"\0")
    overwrite(write_video(videos / "vp9.mp4", "libvpx-vp9", 60, options={"cpu-used": "8"}), 58, 60, b"\x86\xff\x01")
    (videos / "list.txt").write_text("whole.mp4 0\nshort.mp4 1\nvp9.mp4 0\n")
    return videos


def test_a_video_without_its_last_frames_is_a_shorter_one(folder: Path) -> None:
    index = build_index(str(folder / "short.mp4"), "short.mp4")
    assert (index.metadata.frames, index.missing) == (58, 2)
    assert frames_of(folder, "short.mp4") == list(range(58))
    assert frames_of(folder, "short.mp4", missing_share=2 / 60) == list(range(58))


@pytest.mark.parametrize(("name", "share"), [("bad.mp4", 0.05), ("short.mp4", 0.0), ("short.mp4", 1.9 / 60)])
def test_a_video_that_lacks_more_is_bad(name: str, share: float, folder: Path) -> None:
    with pytest.raises(MediaError, match="of its 60 frames decode") as caught:
        frames_of(folder, name, missing_share=share)
    assert not isinstance(caught.value, EndsEarly)


def test_what_only_decoding_finds_out_ends_in_the_same_video(folder: Path) -> None:
    assert build_index(str(folder / "vp9.mp4"), "vp9.mp4").metadata.frames == 60, "its headers promise them"
    assert frames_of(folder, "vp9.mp4") == list(range(58))
    reader = open_reader(reader_spec("video"), records_of(folder, ["vp9.mp4 0"], name="vp9.txt"))
    with pytest.raises(EndsEarly) as caught:
        reader.read(0, np.array([3, 59]), None, (8, 8), np.empty((2, 8, 8, 3), np.uint8))
    assert (caught.value.frames, caught.value.missing) == (58, 2)
    assert reader.probe(0).frames == 60, "a read does not change what the next plan sees"


@pytest.mark.system
def test_scan_has_a_category_of_its_own(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan([str(folder / "list.txt"), "--root", str(folder), "--out", str(tmp_path), "--workers", "1"]) == 0
    (part,) = json.loads((tmp_path / "scan.json").read_text())["lists"]
    assert part["bad"] == []
    assert [(one["path"], one["what"]) for one in part["shorter"]] == [
        ("short.mp4", "its last 2 of 60 frames do not decode"),
        ("vp9.mp4", "its last 2 of 60 frames do not decode"),
    ]
    assert (tmp_path / "list.clean.txt").read_text() == "whole.mp4 60 0\nshort.mp4 58 1\nvp9.mp4 58 0\n"
    assert "2 shorter than their packets promise, such as short.mp4" in capsys.readouterr().out
    assert "its last 2 of 60 frames do not decode" in (tmp_path / "index.html").read_text()


@pytest.mark.system
@pytest.mark.parametrize("form", ["frames", "packs", "clips"])
def test_dump_writes_the_frames_that_decode(form: str, folder: Path, tmp_path: Path) -> None:
    words = [str(folder / "list.txt"), str(tmp_path), "--as", form, "--root", str(folder), "--workers", "1"]
    assert dump(words) == 0
    rows = (tmp_path / "list.txt").read_text().splitlines()
    assert [int(row.split()[1]) for row in rows] == [60, 58, 58]


def clips_of(folder: Path, options: LoaderOptions, rank: int = 0, world: int = 1) -> tuple[dict[int, str], list[str]]:
    """Position -> hash of the clip, and the notes."""
    records = records_of(folder, ["whole.mp4 0", "short.mp4 1", "vp9.mp4 0"], name=f"train{rank}.txt")
    spec, digests = train_spec(Sampling("tsn", 30), input_size=32), {}
    plan = ShardPlan(total=2, batch_size=2, world=world, rank=rank, group_size=1)
    with TrainLoader(records, spec, options, seed=4, shards=plan, stop=6) as loader:
        for _, batches in loader:
            for batch in batches:
                clips = [hashlib.sha256(clip.numpy().tobytes()).hexdigest() for clip in batch.clips]
                digests |= dict(zip(batch.positions, clips, strict=True))
        assert not loader.ledger.samples
        return digests, loader.notes()


@pytest.mark.system
def test_clips_do_not_depend_on_workers_ranks_or_a_cache(folder: Path, tmp_path: Path) -> None:
    options = LoaderOptions(reader_spec("video"), on_bad="error")
    clips, notes = clips_of(folder, options)
    assert len(clips) == 24
    assert len(notes) == 1
    assert "2 videos are used without the last frames, which do not decode (short.mp4: the last 2)" in notes[0]
    assert clips_of(folder, dataclasses.replace(options, workers=2)) == (clips, notes)
    shared = clips_of(folder, options, 0, 2)[0] | clips_of(folder, options, 1, 2)[0]
    assert shared == clips
    for level in ("header", "all"):
        out = tmp_path / level
        scan([str(folder / "list.txt"), "--root", str(folder), "--out", str(out), "--decode", level, "--workers", "1"])
        cached = dataclasses.replace(options, reader=reader_spec("video", metadata=str(out / "metadata.bin")))
        assert clips_of(folder, cached) == (clips, notes)


def test_an_evaluation_sees_the_frames_that_decode_and_repairs_none(folder: Path) -> None:
    records = records_of(folder, ["whole.mp4 0", "short.mp4 1", "vp9.mp4 0"], name="val.txt")
    views = EvalSpec(Sampling("tsn", 60), scale=48, crop_size=32)
    for on_bad in ("error", "substitute"):
        with EvalLoader(records, views, LoaderOptions(reader_spec("video"), on_bad=on_bad)) as loader:
            items = [(item.failure, item.repaired, item.plan.frames.tolist()) for item in loader if item.plan]
            assert [item[:2] for item in items] == [(None, "")] * 3
            assert items[1][2] == items[2][2] != items[0][2]
            assert len(loader.notes()) == 1
            assert loader.notes() == []


@pytest.mark.system
def test_a_cache_of_another_share_is_not_used(folder: Path, tmp_path: Path) -> None:
    scan([str(folder / "list.txt"), "--root", str(folder), "--out", str(tmp_path), "--workers", "1"])
    records = records_of(folder, ["short.mp4 1"], name="one.txt")
    for share, hits in ((0.05, 1), (0.5, 0)):
        reader = open_reader(
            reader_spec("video", metadata=str(tmp_path / "metadata.bin"), missing_share=share), records
        )
        assert reader.probe(0).frames == 58
        assert isinstance(reader, KnownMetadata)
        assert reader.hits == hits
        assert reader.missing(0) == 2
        reader.close()


@pytest.mark.system
def test_a_scan_looks_again_at_what_an_older_one_counted(folder: Path, tmp_path: Path) -> None:
    words = [str(folder / "list.txt"), "--root", str(folder), "--out", str(tmp_path), "--workers", "1"]
    scan([*words, "--decode", "header"])
    journal = tmp_path / "files.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line.update({"naming": None, "frames": 61} if "naming" in line else {})
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scan([*words, "--decode", "header"])
    assert (tmp_path / "list.clean.txt").read_text().split()[1::3] == ["60", "58", "60"]


@pytest.mark.parametrize(
    ("missing", "expected", "share", "tolerable"),
    [(0, 10, 0.0, True), (1, 20, 0.05, True), (1, 19, 0.05, False), (10, 10, 1.0, False), (9, 10, 0.95, True)],
)
def test_the_share_is_inclusive_and_one_frame_has_to_be_left(
    missing: int, expected: int, share: float, tolerable: bool
) -> None:
    assert is_tolerable(missing, expected, share) is tolerable


PLAYLISTS = {
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile '{secret}'\n",
    "dash.mp4": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" profiles="urn:mpeg:dash:profile">'
    '<Period><AdaptationSet contentType="video"><Representation id="0"><BaseURL>{secret}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>\n",
    "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_text_that_names_other_files_is_no_media(name: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write_video(tmp_path / "secret.mp4", "libx264", 12)
    os.mkfifo(tmp_path / "fifo.ts")  # a reader that opens it waits for a writer, and this test never ends
    for secret in ("../secret.mp4", str(tmp_path / "secret.mp4"), "../fifo.ts"):
        (root / name).write_text(PLAYLISTS[name].format(secret=secret))
        with pytest.raises(MediaError, match="not a video container|cannot be opened"):
            open_reader(reader_spec("video"), records_of(root, [f"{name} 0"])).probe(0)


def test_a_loop_of_links_is_named_by_predict(tmp_path: Path) -> None:
    from anal_tools.predict.out_folder import file_names
    from anal_tools.predict.sources import InputVideo

    (tmp_path / "a.mp4").symlink_to("b.mp4")
    (tmp_path / "b.mp4").symlink_to("a.mp4")
    assert file_names([InputVideo(str(tmp_path / "a.mp4"), "video"), InputVideo("x/a.avi", "video")]) == ["a", "a-2"]


def test_random_streams_of_pictures_are_counted_right(tmp_path: Path) -> None:
    """Placeholders, packed frames and empty chunks at random places: the count is that of a full decode."""
    rng = random.Random(8)
    for number in range(40):
        chunks = encode("mpeg4", rng.randint(1, 20), options={"bf": str(rng.randint(0, 3)), "g": "9"})
        if rng.random() < 0.6:
            chunks = packed(chunks, at_end=rng.randint(0, 3), user_data=rng.choice((DIVX_PACKED, DIVX_PACKED + XVID)))
        for _ in range(rng.randint(0, 2)):
            chunks.insert(rng.randint(1, len(chunks)), rng.choice((b"", b"\x7f", placeholder(rng.randint(0, 24)))))
        path = write_avi(tmp_path / f"{number}.avi", chunks)
        assert build_index(str(path), path.name).metadata.frames == plain_count(path)[0]


@pytest.mark.parametrize("kept", [0.995, 0.9, 0.5])
def test_an_mp4_that_is_cut_off_knows_how_much_is_lost(kept: float, tmp_path: Path) -> None:
    import av

    source = write_video(tmp_path / "source.mp4", "libx264", 60, options={"bf": "0", "g": "12"})
    with av.open(str(source)) as given, av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as out:
        copy = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.stream = copy
                out.mux(packet)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: int(kept * len(data))])
    if kept < 0.95:
        with pytest.raises(MediaError, match="only [0-9]+ of about [0-9]+ frames decode"):
            frames_of(tmp_path, "a.mp4")
        return
    numbers = frames_of(tmp_path, "a.mp4")
    assert numbers == list(range(len(numbers)))
    index = build_index(str(tmp_path / "a.mp4"), "a.mp4")
    assert (index.metadata.frames, index.missing) == (len(numbers), 60 - len(numbers))
    assert index.missing > 0
