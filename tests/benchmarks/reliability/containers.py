"""Measure kinds of containers and codecs: frame counts and frames against a full decode by another program.

The oracle is the program `ffmpeg` where it is installed, else OpenCV; both bring a build of the codecs of their own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from datasets.lists.records import Records
from datasets.readers import open_reader
from tests.datasets.media_files import DIVX_PACKED, XVID, encode, packed, placeholder, write_avi
from tests.datasets.specs import build_index, reader_spec
from tests.datasets.videos import frame_image
from utils.errors import MediaError

FILES = 10
SIDE = 96
Make = Callable[[Path, int, random.Random], None]


def mux(path: Path, codec: str, frames: int, *, container: str, side: int = SIDE, **options: str) -> None:
    """Write a file by the muxers of FFmpeg; `start` among the options is the first time stamp in frames."""
    start = int(options.pop("start", "0"))
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = (176, 144) if codec == "h263" else (side, side)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(frames):
            image = frame_image(number, stream.height, stream.width)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = start + number, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def _packed(user_data: bytes, tag: bytes, *, with_b: bool = True) -> Make:
    def make(path: Path, frames: int, rng: random.Random) -> None:
        b_frames = rng.randint(1, 3) if with_b else 0
        packets = encode("mpeg4", frames, side=SIDE, options={"bf": str(b_frames), "g": str(rng.choice((5, 12, 250)))})
        keys = None if rng.random() < 0.7 else [rng.random() < 0.5 for _ in range(4 * frames)]
        # Some builds of FFmpeg repeat the last frame for a placeholder that ends a file without B-frames.
        chunks = packed(packets, at_end=rng.randint(0, 3) if with_b else 0, user_data=user_data)
        write_avi(path, chunks, tag=tag, side=SIDE, keys=keys)

    return make


def _plain_avi(path: Path, frames: int, rng: random.Random) -> None:
    """As UCF101 and HMDB51: no B-frames; some with dropped frames as empty chunks or placeholders."""
    packets = encode("mpeg4", frames, side=SIDE, options={"g": "12"})
    for dropped in (b"", b"\x7f", placeholder())[: rng.randint(0, 3)]:
        packets.insert(rng.randint(1, len(packets) - 1), dropped)
    write_avi(path, packets, side=SIDE)


def _unpacked_avi(path: Path, frames: int, rng: random.Random) -> None:
    packets = encode("mpeg4", frames, side=SIDE, options={"bf": str(rng.randint(1, 3)), "g": "12"})
    write_avi(path, packets, side=SIDE, tag=b"FMP4", keys=[rng.random() < 0.5 for _ in packets])


def _mencoder(path: Path, frames: int, rng: random.Random) -> None:
    source = path.with_suffix(".source.avi")
    mux(source, "ffv1", frames, container="avi")
    options = f"packed:max_bframes={rng.randint(0, 2)}:max_key_interval={rng.choice((5, 100))}:fixed_quant=3"
    words = ["mencoder", str(source), "-o", str(path), "-ovc", "xvid", "-xvidencopts", options, "-nosound"]
    subprocess.run(words, check=True, capture_output=True)
    source.unlink()


def _with(codec: str, container: str, b_frames: tuple[int, ...] = (0,), **options: str) -> Make:
    def make(path: Path, frames: int, rng: random.Random) -> None:
        more = {"bf": str(rng.choice(b_frames))} if max(b_frames) else {}
        mux(path, codec, frames, container=container, side=SIDE, **options, **more)

    return make


KINDS: dict[str, tuple[str, Make]] = {
    "XviD packed, AVI": ("avi", _packed(DIVX_PACKED + XVID, b"XVID")),
    "DivX 5 packed, AVI": ("avi", _packed(DIVX_PACKED, b"DX50")),
    "XviD packed without B-frames, AVI": ("avi", _packed(DIVX_PACKED + XVID, b"XVID", with_b=False)),
    "MPEG-4 without B-frames, dropped frames, AVI": ("avi", _plain_avi),
    "MPEG-4 with B-frames, wrong key flags, AVI": ("avi", _unpacked_avi),
    "XviD of mencoder, packed, AVI": ("avi", _mencoder),
    "DivX 3, AVI": ("avi", _with("msmpeg4", "avi", g="12")),
    "Sorenson H.263, FLV": ("flv", _with("flv", "flv", g="12")),
    "H.264, FLV": ("flv", _with("libx264", "flv", (0, 3), g="12")),
    "WMV 2, ASF": ("wmv", _with("wmv2", "asf", g="12")),
    "H.263, 3GP": ("3gp", _with("h263", "3gp", g="12")),
    "MPEG-4, 3GP": ("3gp", _with("mpeg4", "3gp", (0, 2), g="12")),
    "MPEG-1, program stream": ("mpg", _with("mpeg1video", "mpeg", (0, 2), g="12")),
    "MPEG-2, transport stream": ("ts", _with("mpeg2video", "mpegts", (0, 2), g="12")),
    "H.264, transport stream across the wrap of its clock": (
        "ts",
        _with("libx264", "mpegts", (0, 3), g="12", start=str((2**33 - 90_000) // 3600)),
    ),
    "MPEG-2, VOB": ("vob", _with("mpeg2video", "vob", (0, 2), g="12")),
    "H.264 interlaced, MP4": ("mp4", _with("libx264", "mp4", (0, 3), g="12", **{"x264-params": "tff=1"})),
    "H.264, MKV": ("mkv", _with("libx264", "matroska", (0, 3), g="12")),
}


def full_decode(path: Path, height: int, width: int) -> np.ndarray:
    """(N, H, W, 3) RGB by a program that shares no code with the readers."""
    if shutil.which("ffmpeg"):
        words = ["ffmpeg", "-v", "quiet", "-threads", "1", "-i", str(path), "-map", "0:v:0", "-vsync", "passthrough"]
        words += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        data = subprocess.run(words, check=True, capture_output=True).stdout
        return np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)
    import cv2

    capture, images = cv2.VideoCapture(str(path)), []
    while True:
        there, image = capture.read()
        if not there:
            return np.stack(images)
        images.append(image[..., ::-1])


def compare(path: Path, rng: random.Random) -> tuple[str, str]:
    """Compare a file with its full decode: (grade of its index, what differs or "")."""
    listed = path.with_suffix(".txt")
    listed.write_text(f"{path.name} 0\n")
    records = Records.load(listed, path.parent, num_class=None)
    reader = open_reader(reader_spec("video"), records)
    try:
        metadata = reader.probe(0)
        grade = build_index(str(path), path.name).grade.value
        truth = full_decode(path, metadata.height, metadata.width)
        if metadata.frames != len(truth):
            return grade, f"{metadata.frames} frames, a full decode gives {len(truth)}"
        chosen = (
            [*range(metadata.frames)] if rng.random() < 0.5 else sorted({0, metadata.frames - 1, metadata.frames // 2})
        )
        out = np.empty((len(chosen), metadata.height, metadata.width, 3), np.uint8)
        reader.read(0, np.array(chosen), None, (metadata.height, metadata.width), out)
        apart = np.abs(out.astype(int) - truth[chosen]).mean(axis=(1, 2, 3))
        worst = int(apart.argmax())
        return grade, "" if apart[worst] < 3 else f"frame {chosen[worst]} differs by {apart[worst]:.1f} of 255"
    except MediaError as error:
        return "", f"refused: {error.reason}"
    finally:
        reader.close()


def row(files: int = FILES) -> dict:
    """Measure the row; `files` of each kind."""
    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(1 << 30))
    rng = random.Random(seed)
    oracle = "ffmpeg" if shutil.which("ffmpeg") else "opencv"
    grades_of: dict[str, object] = {}
    wrong: list[str] = []
    skipped: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, (ending, make) in KINDS.items():
            if make is _mencoder and not shutil.which("mencoder"):
                skipped.append(f"{kind}: mencoder is not installed")
                continue
            grades = set()
            for number in range(files):
                path = Path(folder) / f"{len(grades_of)}-{number}.{ending}"
                frames = 2 * rng.randint(2, 40) + 1  # no program finds a stream in a shorter transport stream
                make(path, frames, rng)
                grade, fault = compare(path, rng)
                grades.add(grade)
                if fault:
                    wrong.append(f"{kind}, {frames} frames: {fault}")
                path.unlink()
            grades_of[kind] = "/".join(sorted(grades))
    measured = {"seed": seed, "oracle": oracle, "files of a kind": files, "kinds": grades_of, "wrong": wrong[:20]}
    return {"measured": measured | {"skipped": skipped}, "holds": len(grades_of) >= 12 and not wrong}


if __name__ == "__main__":
    print(json.dumps(row()))
