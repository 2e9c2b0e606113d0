"""Write the files of `predict`: infer.json, subtitles (.srt) and the video with the predictions drawn in (.mp4)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from datasets.readers import Reader
from utils import files, ranking
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.plan.metadata import VideoMetadata

SHORT_SIDE = 480  # pixels; larger videos are scaled down to it
CHUNK_BYTES = 1 << 28  # frames of the annotated video that are decoded together
CODECS = ("libx264", "libopenh264", "mpeg4")  # the first one that this PyAV has is used


class TopClass(TypedDict):
    """One of the best classes of a video."""

    label: int
    name: str
    score: float


@dataclass(frozen=True)
class Cue:
    """The best classes (label, name, score) of a part of a video, best first; `start` and `end` are in seconds."""

    start: float
    end: float
    top: list[TopClass]

    def to_dict(self) -> dict[str, object]:
        """Return the entry of infer.json."""
        return {"start": round(self.start, 3), "end": round(self.end, 3), "top": self.top}


def top_classes(score: np.ndarray, classes: Sequence[str], count: int = 5) -> list[TopClass]:
    """Return the best classes of one video, best first; among equal scores the higher label, as the accuracy ranks.

    Args:
        score: (K,).
        classes: K names.
        count: how many; all classes if there are fewer.
    """
    best: list[int] = ranking.order(score[None])[0, :count].tolist()
    return [TopClass(label=k, name=classes[k], score=round(float(score[k]), 6)) for k in best]


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file, whole or not at all; bytes of names that are not UTF-8 become escapes."""
    files.write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_srt(path: Path, cues: Sequence[Cue]) -> None:
    """Write SubRip subtitles: one block per window with its three best classes."""
    blocks = []
    for number, cue in enumerate(cues, start=1):
        lines = [f"{entry['name']}  {entry['score']:.2f}" for entry in cue.top[:3]]
        text = "\n".join(" ".join(line.split()) for line in lines)  # a blank line would end the block
        blocks.append(f"{number}\n{_stamp(cue.start)} --> {_stamp(cue.end)}\n{text}\n")
    files.write_text(path, "\n".join(blocks), errors="backslashreplace")


def _stamp(seconds: float) -> str:
    """Return the time as `hh:mm:ss,mmm`."""
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d},{rest % 1000:03d}"


def write_video(path: Path, reader: Reader, record: int, cues: Sequence[Cue]) -> None:
    """Write a video as H.264 mp4 with the best classes of each moment drawn in.

    Frames come from the reader, upright as the network sees them, and play at the average rate of the video, without
    sound.

    Raises:
        MediaError: a frame does not decode; no file remains.
        UserError: no codec, no space, no permission.
    """
    import av
    from av.error import FFmpegError

    metadata = reader.probe(record)
    height, width = _even_size(metadata)
    codec = next((name for name in CODECS if _has_codec(name)), None)
    if codec is None:
        raise UserError(f"{path}: this PyAV has no encoder for mp4 ({', '.join(CODECS)})")

    # 1001 is the denominator of NTSC rates, such as 30000/1001
    rate = Fraction(min(max(metadata.fps, 1.0), 240.0)).limit_denominator(1001)

    try:
        with files.replacing(path) as temporary, av.open(os.fspath(temporary), "w", format="mp4") as output:
            stream: Any = output.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1
            for ordinal, image in _frames(reader, record, metadata, (height, width)):
                draw(image, _cue_at(cues, ordinal / metadata.fps).top)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            # None flushes the frames that the encoder still holds
            output.mux(stream.encode(None))
    except FFmpegError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def draw(image: np.ndarray, top: Sequence[TopClass]) -> None:
    """Write the three best classes into the upper left corner of (H, W, 3) uint8, in place; ASCII letters only."""
    import cv2

    # size of the letters relative to the picture, and still readable on a small one
    scale = max(0.35, image.shape[0] / 640)
    line = int(28 * scale) + 4

    for row, entry in enumerate(top[:3], start=1):
        text = f"{entry['score']:.2f} {entry['name']}".encode("ascii", "replace").decode()
        x, y = 6, row * line
        # The outline is the same thin text, shifted: a thicker stroke makes letters wider, so they would not match.
        for dx, dy in itertools.product((-1, 0, 1), repeat=2):
            cv2.putText(image, text, (x + dx, y + dy), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
        cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)


def _even_size(metadata: VideoMetadata) -> tuple[int, int]:
    """Return (h, w) of the annotated video: short side at most SHORT_SIDE, even numbers for H.264, at least 16."""
    factor = min(1.0, SHORT_SIDE / min(metadata.height, metadata.width))
    height, width = (max(16, 2 * round(side * factor / 2)) for side in (metadata.height, metadata.width))
    return height, width


def _has_codec(name: str) -> bool:
    from av.codec import Codec

    with contextlib.suppress(ValueError):
        return bool(Codec(name, "w").name)
    return False


def _frames(
    reader: Reader, record: int, metadata: VideoMetadata, size: tuple[int, int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (ordinal, (h, w, 3) uint8) of all frames, decoded in large pieces."""
    # a piece is large because each one starts with a seek, and bounded because its frames are all in memory
    count = max(1, CHUNK_BYTES // (size[0] * size[1] * 3))
    for first in range(0, metadata.frames, count):
        ordinals = np.arange(first, min(first + count, metadata.frames))
        images = np.empty((len(ordinals), *size, 3), np.uint8)
        reader.read(record, ordinals, None, size, images)
        yield from zip(ordinals.tolist(), images, strict=True)


def _cue_at(cues: Sequence[Cue], seconds: float) -> Cue:
    return next((cue for cue in cues if seconds < cue.end), cues[-1])
