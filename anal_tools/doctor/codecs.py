"""Check which codecs decode here: encode clips of a few frames, decode them and compare their pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from anal_tools.doctor.finding import Finding, Subject, ok, warning
from anal_tools.doctor.finding import error as bad

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAMES, HEIGHT, WIDTH = 8, 64, 96  # of a test clip
LEAST_PSNR = 25.0  # dB; each encoder here gives 40 and more

# title: (decoder's name, encoders of which one is enough)
CODECS: dict[str, tuple[str, tuple[str, ...]]] = {
    "H.264": ("h264", ("libx264", "libopenh264")),
    "HEVC": ("hevc", ("libx265",)),
    "VP9": ("vp9", ("libvpx-vp9",)),
    "AV1": ("av1", ("libaom-av1", "libsvtav1", "librav1e")),
}
INSTALL = "pip install --force-reinstall --only-binary :all: av, whose wheels have all of them"


def codecs(subject: Subject, table: Mapping[str, tuple[str, tuple[str, ...]]] = CODECS) -> Iterator[Finding]:
    """Decode a clip of each codec on the CPU."""
    import av
    from av.error import FFmpegError

    good, untried = [], []
    # A missing H.264 decoder is an error: most datasets need it
    for title, (decoder, encoders) in table.items():
        if decoder not in av.codecs_available:
            text = f"this PyAV {av.__version__} does not decode {title}: such videos count as unreadable"
            yield (bad if title == "H.264" else warning)(text, INSTALL)
            continue

        encoder = next((name for name in encoders if name in av.codecs_available), None)
        if encoder is None:
            untried.append(title)
            continue
        # Encode and decode in memory: the test needs no sample files
        given = frames()
        try:
            psnr = quality(given, decoded(encoded(given, encoder), decoder))
        except (FFmpegError, ValueError) as error:
            yield bad(f"{title} does not decode: {error}", INSTALL)
            continue

        if psnr < LEAST_PSNR:
            yield bad(f"{title} decodes to wrong pixels (PSNR {psnr:.0f} dB)", INSTALL)
        else:
            good.append(title)

    if good:
        yield ok(f"{', '.join(good)} decode on the CPU")
    if untried:
        yield ok(f"{', '.join(untried)}: decoder present, but not tried because no encoder is available")


def frames() -> list[NDArray[np.uint8]]:
    """Return a test clip that shows a moving gradient, a list of (H, W, C) images."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    # Each channel differs, so that swapped channels or planes lower the PSNR
    return [np.stack([(x + 4 * n) % 256, y + 2 * n, x // 2 + y // 2], axis=-1).astype(np.uint8) for n in range(FRAMES)]


def encoded(images: list[NDArray[np.uint8]], encoder: str) -> bytes:
    """Return the images as a Matroska file."""
    import av

    os.environ.setdefault("SVT_LOG", "1")  # libsvtav1 prints its settings otherwise
    options = {"crf": "20"} | ({"x265-params": "log-level=none"} if encoder == "libx265" else {})

    file = io.BytesIO()
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        with av.open(file, "w", format="matroska") as output:
            stream = output.add_stream(encoder, rate=25, options=options)
            # 4:2:0, the layout of nearly all videos
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for image in images:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            # Flush: encoders hold frames back
            output.mux(stream.encode(None))
    finally:
        os.sched_setscheduler(0, policy, priority)  # libsvtav1 takes real-time priority and keeps it
    return file.getvalue()


def decoded(data: bytes, decoder: str) -> list[NDArray[np.uint8]]:
    """Return the frames of a video, (H, W, C) each.

    Raises:
        ValueError: FFmpeg chose another decoder.
    """
    import av

    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        family = container.streams.video[0].codec_context.codec.canonical_name
    # The canonical name is that of the codec: libdav1d counts as av1
    if family != decoder:
        raise ValueError(f"a {family} decoder was chosen")
    return frames


def quality(given: list[NDArray[np.uint8]], frames: list[NDArray[np.uint8]]) -> float:
    """Return the PSNR between two clips, dB.

    Raises:
        ValueError: the clips differ in their number of frames.
    """
    if len(given) != len(frames):
        raise ValueError(f"{len(frames)} of {len(given)} frames")

    # The floor avoids a division by zero for lossless clips
    error = np.mean((np.stack(given).astype(float) - np.stack(frames)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
