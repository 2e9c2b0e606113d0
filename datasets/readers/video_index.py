"""Which frames a video file has: the table of its packets, made by demuxing (nothing is decoded but one key frame).

The frame count of a header is never used. Three grades say how far the table can be trusted:

- TIMED: every shown packet has a pts of its own and the decoder stamps its frames with them (mp4, mov, Matroska and
  WebM without anything suspicious). Ordinal i is the i-th smallest pts; readers may seek.
- COUNTED: one packet gives one frame, but time stamps are guesses (AVI, unless every frame is a key frame). Frames are
  found by counting from the start.
- SCANNED: packets do not tell the number of frames (MPEG-TS and -PS, missing or repeated stamps, hidden frames, damaged
  packets, leading pictures without reference). The file is decoded once to count; frames are found by counting.

Encrypted files, files without a video stream and files without a decodable frame raise MediaError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import stat
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.plan import Facts
from utils.faults import MediaError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

_TIMED_FORMATS = {"mov", "mp4", "matroska", "webm"}
_COUNTED_FORMATS = {"avi"}
#: An average rate of the header is believed when the time stamps say the same within this relative difference.
_RATE_TOLERANCE = 0.05
_DEFAULT_RATE = 25.0


class Grade(enum.Enum):
    """How far a packet table can be trusted; see the module's text."""

    TIMED = "timed"
    COUNTED = "counted"
    SCANNED = "scanned"


@dataclasses.dataclass(frozen=True)
class Index:
    """The frames of one video file.

    Attributes:
        facts: frames, height, width after rotation, frames/s.
        grade: how to find a frame.
        rotation: counter-clockwise quarter turns that make a frame upright, 0..3.
        codec: name of the decoder.
        pts, dts, sizes, keys: (P,) one entry per packet in file order (pts and dts only for TIMED).
        positions: (N,) packet of each frame in presentation order (only for TIMED).
    """

    facts: Facts
    grade: Grade
    rotation: int
    codec: str
    pts: np.ndarray
    dts: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray
    positions: np.ndarray


def open_container(path: str, shown: str) -> InputContainer:
    """Open a local, regular file; MediaError otherwise.

    The absolute path behind "file:" keeps names such as "-i", "http:x" or "concat:a" from being options or protocols,
    and the white list keeps a play list that calls itself .mp4 from reaching the network.
    """
    import av
    from av import logging
    from av.error import FFmpegError

    logging.set_level(logging.PANIC)  # what matters is said by the exception; the rest would be noise of every worker
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise MediaError(shown, "it is not a regular file")
        url = "file:" + os.path.abspath(path)
        return av.open(url, metadata_errors="ignore", options={"protocol_whitelist": "file"})
    except (FFmpegError, OSError, ValueError) as error:
        raise MediaError(shown, _why(path, error)) from error


def _why(path: str, error: Exception) -> str:
    try:
        if os.path.getsize(path) == 0:
            return "the file is empty"
    except OSError as missing:
        return missing.strerror or str(missing)
    return f"it cannot be opened as a video ({getattr(error, 'strerror', None) or error})"


def video_stream(container: InputContainer, shown: str) -> av.VideoStream:
    """The first real video stream (a cover picture is not one), set up for single-threaded decoding."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise MediaError(shown, "there is no decoder for its video stream")
        if stream.codec_tag in ("encv", "drmi"):
            raise MediaError(shown, "the video is encrypted")
        stream.codec_context.thread_count = 1
        return stream
    raise MediaError(shown, "it has no video stream")


def packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Packets of the stream that carry data, in file order; a demuxer error ends the file."""
    from av.error import FFmpegError

    # PyAV 18 loses 0.3 kB for each demux() that is neither read to its end nor closed.
    with contextlib.closing(container.demux(stream)) as demuxed:  # type: ignore[type-var]
        try:
            for packet in demuxed:
                if packet.size:
                    yield packet
        except FFmpegError:
            return


@dataclasses.dataclass(frozen=True)
class Kept:
    """A file that stays open after it was indexed: its packets in file order, and a decoder in its first state."""

    container: InputContainer
    stream: av.VideoStream
    packets: list[av.Packet]


def build_index(path: str, shown: str) -> Index:
    """Make the index of one file.

    Args:
        path: where the file is.
        shown: the path as the list writes it, for messages.
    """
    return index_file(path, shown)[0]


def index_file(path: str, shown: str, *, keep: int = 0) -> tuple[Index, Kept | None]:
    """Make the index of one file, and keep it open where its frames can be found by time.

    Args:
        path: where the file is.
        shown: the path as the list writes it, for messages.
        keep: most bytes of packets to keep; 0 = keep nothing and close the file.
    """
    container = open_container(path, shown)
    try:
        index, kept = _index(container, path, shown, keep)
    except BaseException:
        container.close()
        raise
    if kept is None or index.grade is not Grade.TIMED:
        container.close()
        return index, None
    return index, kept


def _index(container: InputContainer, path: str, shown: str, keep: int) -> tuple[Index, Kept | None]:
    stream = video_stream(container, shown)
    table = _Table(stream.codec_context.codec.name)
    first_key, held, room = None, [], keep
    for packet in packets(container, stream):
        table.add(packet)
        if first_key is None and packet.is_keyframe:
            first_key = bytes(packet)
        room -= packet.size
        if room >= 0:
            held.append(packet)
        else:
            held.clear()
    if not table.pts:
        raise MediaError(shown, "it has no video data (header only, or cut off)")
    grade = table.grade(set(container.format.name.split(",")))
    frame = _decode_one(stream, first_key)
    rate, time_base = stream.average_rate, stream.time_base
    count, scanned_pts = int(np.count_nonzero(table.shown)), None
    if grade is Grade.SCANNED or frame is None:
        grade = Grade.SCANNED
        count, scanned_pts, frame = _scan(path, shown)
    assert frame is not None
    stamps = table.stamps() if scanned_pts is None else scanned_pts
    index = table.finish(grade, count, frame, _rate(stamps, rate, time_base))
    if grade is not Grade.TIMED or room < 0 or not keep:
        return index, None
    stream.codec_context.flush_buffers()
    return index, Kept(container, stream, held)


class _Table:
    """Columns of the packet table while a file is demuxed."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.pts: list[int | None] = []
        self.dts: list[int | None] = []
        self.sizes: list[int] = []
        self.keys: list[bool] = []
        self.shown: list[bool] = []
        self.damaged = False
        self.hidden = False

    def add(self, packet: av.Packet) -> None:
        """Add one packet. A discarded one lies outside the edit list: it is decoded for reference, not shown."""
        self.pts.append(packet.pts)
        self.dts.append(packet.dts)
        self.sizes.append(packet.size)
        self.keys.append(packet.is_keyframe)
        self.shown.append(not packet.is_discard)
        self.damaged |= packet.is_corrupt
        if self.codec in _HIDES:
            self.hidden |= _HIDES[self.codec](memoryview(packet))

    def stamps(self) -> list[int | None]:
        """Time stamps of the packets that are shown, in file order."""
        return [pts for pts, shown in zip(self.pts, self.shown, strict=True) if shown]

    def grade(self, formats: set[str]) -> Grade:
        """Grade of the whole table, by its content only."""
        stamps = self.stamps()
        if self.damaged or self.hidden or not self.keys[0] or not stamps:
            return Grade.SCANNED
        odd = any(p is None for p in self.pts) or len(set(stamps)) < len(stamps)
        if formats & _COUNTED_FORMATS:
            # Stamps are counted packets there: right only where no frame waits for another one.
            return Grade.TIMED if all(self.keys) and not odd else Grade.COUNTED
        if odd or not formats & _TIMED_FORMATS or min(p for p in stamps if p is not None) < (self.pts[0] or 0):
            return Grade.SCANNED
        return Grade.TIMED

    def finish(self, grade: Grade, count: int, frame: av.VideoFrame, fps: float) -> Index:
        """Freeze the table."""
        timed = grade is Grade.TIMED
        rotation = round(frame.rotation / 90) % 4
        height, width = (frame.width, frame.height) if rotation % 2 else (frame.height, frame.width)
        none = np.zeros(0, np.int64)
        pts = np.array(self.pts, np.int64) if timed else none
        shown = np.flatnonzero(self.shown)
        return Index(
            facts=Facts(frames=count, height=height, width=width, fps=fps),
            grade=grade,
            rotation=rotation,
            codec=self.codec,
            pts=pts,
            dts=np.array([p if d is None else d for p, d in zip(self.pts, self.dts, strict=True)]) if timed else none,
            sizes=np.array(self.sizes, np.int64),
            keys=np.array(self.keys, bool),
            positions=shown[np.argsort(pts[shown], kind="stable")] if timed else none,
        )


def _vp8_hides(data: memoryview) -> bool:
    """VP8 frame header (RFC 6386 section 9.1): bit 4 of the first byte is show_frame."""
    return not data[0] & 0x10


def _vp9_hides(data: memoryview) -> bool:
    """VP9 frame header (bitstream specification section 6.2): show_existing_frame or show_frame, else hidden.

    A superframe (last byte 110xxxxx, annex B) bundles hidden frames with the one that is shown.
    """
    if data[-1] & 0xE0 == 0xC0:
        return False
    bits, position = data[0], 4  # frame_marker 2 bits, profile 2 bits
    if bits & 0x30 == 0x30:  # profile 3 has one reserved bit more
        position = 5
    show_existing = bits >> (7 - position) & 1
    show_frame = bits >> (5 - position) & 1
    return not (show_existing or show_frame)


#: Codecs whose packets may hold a frame that is never shown.
_HIDES: dict[str, Any] = {"vp8": _vp8_hides, "libvpx": _vp8_hides, "vp9": _vp9_hides, "libvpx-vp9": _vp9_hides}


def _decode_one(stream: av.VideoStream, data: bytes | None) -> av.VideoFrame | None:
    """Decode one key frame from its bytes alone: its size and rotation are the truth, a header's are a claim."""
    import av
    from av.error import FFmpegError

    if data is None:
        return None
    try:
        # A fresh packet carries no discard flag, so the key frame in front of an edit list comes out too.
        decoded = [*stream.codec_context.decode(av.Packet(data)), *stream.codec_context.decode(None)]
    except (FFmpegError, EOFError):
        return None
    return decoded[0] if decoded else None


def _scan(path: str, shown: str) -> tuple[int, list[int | None], av.VideoFrame]:
    """Decode the file to its end or its first error: number of frames, their pts, the first frame."""
    from av.error import FFmpegError

    first, stamps, trouble = None, [], ""
    with open_container(path, shown) as container:
        stream = video_stream(container, shown)
        try:
            for frame in container.decode(stream):
                first = first or frame
                stamps.append(frame.pts)
        except FFmpegError as error:
            trouble = f" ({error.strerror})"
    if first is None:
        raise MediaError(shown, f"no frame of it decodes{trouble}")
    return len(stamps), stamps, first


def _rate(stamps: list[int | None], rate: Fraction | None, time_base: Fraction | None) -> float:
    """Frames/s: the container's average where the time stamps agree with it, else what the stamps say."""
    stated = float(rate) if rate else 0.0
    times = [stamp for stamp in stamps if stamp is not None]
    span = (max(times) - min(times)) * float(time_base or 0) if len(times) > 1 else 0.0
    measured = (len(times) - 1) / span if span > 0 else 0.0
    if measured and abs(stated - measured) > _RATE_TOLERANCE * measured:
        return measured
    return stated or measured or _DEFAULT_RATE
