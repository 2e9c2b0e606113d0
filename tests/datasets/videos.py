"""Barcoded videos for the tests of this folder: every frame carries its number, so a wrong frame cannot pass."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError

from datasets.lists.records import Records

SIZE = 96
BITS = 8


def frame_image(number: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """(H, W, 3) uint8: a slow gradient with `BITS` black or white columns, lowest bit left."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    for bit in range(BITS):
        image[:, bit * width // BITS : (bit + 1) * width // BITS, :] //= 2
        image[:, bit * width // BITS : (bit + 1) * width // BITS, 0] = 235 if number >> bit & 1 else 20
    return image


def number_in(image: np.ndarray) -> int:
    """The number that `frame_image` drew, read from an upright RGB image of any size."""
    width = image.shape[1]
    columns = [image[:, int((bit + 0.5) * width / BITS), 0].mean() for bit in range(BITS)]
    return sum(int(value > 127) << bit for bit, value in enumerate(columns))


def write_video(
    path: Path,
    codec: str,
    frames: int = 120,
    *,
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    stamps: list[int] | None = None,
    container: str | None = None,
) -> Path:
    """Write a barcoded video; `stamps`: pts in 1/1000 s for a variable frame rate."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options or {})
        stream.width = stream.height = SIZE
        stream.pix_fmt = pix_fmt
        if stamps is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(frame_image(number), format="rgb24").reformat(format=pix_fmt)
            frame.pts = number if stamps is None else stamps[number]
            frame.time_base = Fraction(1, 25) if stamps is None else Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def write_cut(source: Path, path: Path, frames: int) -> Path:
    """A copy of the packets whose edit list hides the first `frames` frames, as `ffmpeg -ss -c copy` makes them."""
    with av.open(str(source)) as given, av.open(str(path), "w") as output:
        stream = given.streams.video[0]
        assert stream.average_rate is not None
        assert stream.time_base is not None
        shift = round(frames / stream.average_rate / stream.time_base)
        copy = output.add_stream_from_template(stream)
        for packet in given.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = copy
                output.mux(packet)
    return path


def decode_all(path: Path | str) -> list[np.ndarray]:
    """The plain sequential decode that readers are compared with: frames up to the first error, not rotated."""
    images = []
    with av.open("file:" + str(Path(path).absolute())) as container:
        try:
            for frame in container.decode(video=0):
                images.append(frame.to_ndarray(format="rgb24"))
        except FFmpegError:
            pass
    return images


def records_of(folder: Path, lines: list[str], *, root: Path | None = None, name: str = "list.txt") -> Records:
    """Write a list file and load it."""
    listed = folder / name
    listed.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"))
    return Records.load(listed, root or folder, num_class=None)
