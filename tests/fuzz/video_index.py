"""Fuzz target: the packet table of video files and the reader of their frames.

The mutants keep the structure of their container most of the time: chunks of AVI, boxes of MP4, packets of MPEG-TS and
units of the codec are changed one by one, so that demuxers accept them and the code behind them runs.
"""

from __future__ import annotations

import functools
import random
import struct
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from datasets.lists.records import Records
from datasets.readers.ending import on_what_decodes
from datasets.readers.video import VideoReader
from datasets.readers.video_index import open_container, video_stream
from tests.datasets.media_files import DIVX_PACKED, XVID, avi_bytes, encode, packed, placeholder
from tests.datasets.specs import reader_spec
from tests.datasets.videos import frame_image
from utils.errors import MediaError

NAME = "video_index"
# PyAV's compiled modules make code objects for the lines of their tracebacks; running one would be the event `exec`.
EXPECTED_EVENTS = frozenset({"compile", "code.__new__"})
MODULES = [
    "datasets/readers/bitstreams.py",
    "datasets/readers/ending.py",
    "datasets/readers/video.py",
    "datasets/readers/video_index.py",
]
SIDE = 32
FRAMES = 9
_START = b"\x00\x00\x01"
_TOP = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"}  # boxes that hold boxes


@functools.lru_cache(maxsize=1)
def seeds() -> list[bytes]:
    """Return valid files of each container and codec that the table treats in its own way."""
    with_b = encode("mpeg4", FRAMES, side=SIDE, options={"bf": "2", "g": "6"})
    packets = encode("mpeg4", FRAMES, side=SIDE, options={"g": "4"})
    files = [
        avi_bytes(packed(with_b, at_end=1), side=SIDE),
        avi_bytes(packed(with_b, user_data=DIVX_PACKED), side=SIDE, tag=b"DX50"),
        avi_bytes(packed(with_b, user_data=XVID), side=SIDE),
        avi_bytes([*packets[:3], b"", placeholder(), *packets[3:]], side=SIDE),
        avi_bytes(encode("mjpeg", 4, side=SIDE), side=SIDE, tag=b"MJPG", keys=[True] * 4),
    ]
    for codec, container, options in (
        ("libx264", "mp4", {"bf": "2", "g": "4"}),
        ("libx264", "mp4", {"bf": "0", "x264-params": "tff=1"}),
        ("libx264", "matroska", {"bf": "2", "g": "4"}),
        ("mpeg4", "mp4", {"bf": "1"}),
        ("libvpx-vp9", "webm", {"cpu-used": "8", "deadline": "realtime", "lag-in-frames": "8"}),
        ("libvpx", "webm", {"deadline": "realtime"}),
        ("libx264", "mpegts", {"g": "4"}),
        ("mpeg2video", "mpegts", {"g": "4"}),
        ("mpeg1video", "mpeg", {"g": "4"}),
        ("flv", "flv", {}),
    ):
        files.append(_muxed(codec, container, options))
    return files


def _muxed(codec: str, container: str, options: dict[str, str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed"
        with av.open(str(path), "w", format=container) as output:
            stream = output.add_stream(codec, rate=25, options=options)
            stream.width = stream.height = SIDE
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            for number in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(frame_image(number, SIDE, SIDE), format="rgb24")
                frame = frame.reformat(format="yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return path.read_bytes()


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Return a mutant of a seed, or of a mutant."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_mutators(data))(rng, data)
    return data


Mutator = Callable[[random.Random, bytes], bytes]


def _mutators(data: bytes) -> list[Mutator]:
    fitting: list[Mutator] = [_flip, _overwrite, _cut, _unit]
    if data[:4] == b"RIFF":
        fitting += [_chunk] * 6
    elif data[4:8] == b"ftyp":
        fitting += [_box] * 4
    elif data[:1] == b"\x47" and len(data) % 188 == 0:
        fitting += [_transport] * 4
    return fitting


def _flip(rng: random.Random, data: bytes) -> bytes:
    """Flip a few bits anywhere behind the signature."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8)) if len(data) > 16 else 0):
        changed[rng.randrange(12, len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    """Zero, fill or scramble a part, often at the end, where a download was cut off."""
    length = rng.randint(1, max(1, len(data) // 8))
    start = rng.choice((len(data) - length, rng.randrange(max(1, len(data) - length))))
    fill = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:start] + fill + data[start + length :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randint(len(data) * 2 // 3, len(data))]


def _unit(rng: random.Random, data: bytes) -> bytes:
    """Change bytes behind a start code of MPEG video or H.264."""
    places = []
    at = data.find(_START)
    while at >= 0:
        places.append(at)
        at = data.find(_START, at + 3)
    if not places:
        return _flip(rng, data)
    changed = bytearray(data)
    at = rng.choice(places) + 3 + rng.randrange(6)
    if at < len(changed):
        changed[at] = rng.choice((0xB6, 0xB0, 0x20, 0x65, 0x67, changed[at] ^ 1 << rng.randrange(8)))
    return bytes(changed)


def _chunk(rng: random.Random, data: bytes) -> bytes:
    """Drop, repeat, exchange, join or replace frames of an AVI file, with sizes and index that fit."""
    at = data.find(b"movi") + 4
    frames = []
    while data[at : at + 4] == b"00dc" and at + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        frames.append(data[at + 8 : at + 8 + size])
        at += 8 + size + size % 2
    if not frames:
        return _flip(rng, data)
    i, what = rng.randrange(len(frames)), rng.randrange(7)
    if what == 0:
        del frames[i]
    elif what == 1:
        frames.insert(i, rng.choice(frames))
    elif what == 2:
        frames.insert(i, rng.choice((b"", b"\x7f", placeholder(rng.randrange(25)), rng.randbytes(6))))
    elif what == 3:
        k = rng.randrange(len(frames))
        frames[i], frames[k] = frames[k], frames[i]
    elif what == 4:
        frames[i : i + 2] = [b"".join(frames[i : i + 2])]
    elif what == 5:
        frames[i] = _flip_head(rng, frames[i])
    else:
        frames[i] = frames[i][: rng.randint(0, len(frames[i]))]
    return avi_bytes(frames, side=SIDE, tag=data[112:116], keys=[rng.random() < 0.5 for _ in frames])


def _flip_head(rng: random.Random, frame: bytes) -> bytes:
    if not frame:
        return frame
    changed = bytearray(frame)
    changed[rng.randrange(min(len(frame), 64))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _box(rng: random.Random, data: bytes) -> bytes:
    """Change numbers of one box of an MP4 file."""
    boxes, todo = [], [(0, len(data))]
    while todo:
        at, end = todo.pop()
        while at + 8 <= end:
            size, name = struct.unpack_from(">I4s", data, at)
            if size < 8:
                break
            boxes.append((at, min(size, end - at)))
            if name in _TOP:
                todo.append((at + 8, min(at + size, end)))
            at += size
    at, size = rng.choice(boxes)
    changed = bytearray(data)
    place = at + rng.choice((0, 8, 12, 16)) + 4 * rng.randrange(max(1, size // 4))
    if place + 4 > len(changed):
        return _flip(rng, data)
    (number,) = struct.unpack_from(">I", changed, place)
    number = rng.choice((0, 1, number + 1, max(0, number - 1), 2**31 - 1, 2**32 - 1, number ^ 1 << rng.randrange(32)))
    struct.pack_into(">I", changed, place, number % 2**32)
    return bytes(changed)


def _transport(rng: random.Random, data: bytes) -> bytes:
    """Drop, repeat, exchange or damage packets of 188 bytes."""
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    i, what = rng.randrange(len(packets)), rng.randrange(4)
    if what == 0 and len(packets) > 1:
        del packets[i]
    elif what == 1:
        packets.insert(i, packets[i])
    elif what == 2:
        k = rng.randrange(len(packets))
        packets[i], packets[k] = packets[k], packets[i]
    else:
        packets[i] = packets[i][:4] + _flip(rng, packets[i])[4:]
    return b"".join(packets)


def run(data: bytes, folder: Path) -> str:
    """Index one file and read frames of it: "ok", "refused", or "stage0" if no demuxer takes it."""
    path = folder / "x.video"
    path.write_bytes(data)
    try:
        with open_container(str(path), path.name) as container:
            video_stream(container, path.name)
    except MediaError:
        return "stage0"
    reader = VideoReader(reader_spec("video", missing_share=0.25), _records(folder))
    try:
        on_what_decodes(reader, 0, _use)
    except MediaError:
        return "refused"
    finally:
        reader.close()
    return "ok"


def _use(reader: Any) -> None:
    """Plan and read, from the packets in memory and then from the file."""
    metadata = reader.probe(0)
    assert metadata.frames > 0
    assert metadata.height > 0
    assert metadata.width > 0
    assert metadata.fps > 0
    ordinals = np.unique([0, metadata.frames // 2, metadata.frames - 1])
    reader.read(0, ordinals, None, (8, 8), np.empty((len(ordinals), 8, 8, 3), np.uint8))
    reader._drop()
    reader.read(0, ordinals[-1:], None, (8, 8), np.empty((1, 8, 8, 3), np.uint8))


def _records(folder: Path) -> Records:
    """A list with the one file."""
    name = b"x.video"
    columns = {
        "paths": np.frombuffer(name, np.uint8),
        "ends": np.array([0, len(name)], np.int64),
        "labels": np.zeros(1, np.int32),
        "frames": np.full(1, -1, np.int32),
        "starts": np.zeros(1, np.int32),
    }
    about = {"list_hash": "", "list_file": "fuzz", "root": str(folder), "duplicates": 0, "num_class": 1}
    return Records(columns, about)
