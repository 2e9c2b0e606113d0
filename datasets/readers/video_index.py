"""Find the frames of a video file: the table of its packets, made by demuxing and decoding one key frame.

The frame count of a header is never used. Three grades describe how far the table can be trusted:

- TIMED: every shown packet has a unique pts, and the decoder stamps its frames with them (mp4, mov, Matroska and WebM
  without anything suspicious). Ordinal i is the i-th smallest pts. Readers may seek.
- COUNTED: headers give the number of frames in the packets, but time stamps are guesses (AVI, unless every frame is a
  key frame). Frames are found by counting from the start.
- SCANNED: packets do not give the number of frames (MPEG-TS and -PS, missing or repeated stamps, hidden frames, packed
  frames and placeholders, fields, damaged packets, leading pictures without reference, codecs that bitstreams.py does
  not handle). The file is decoded once to count. Frames are found by counting.

If the last packets do not look like packets of their codec, the file is decoded once too. A video that lacks no more
than `data.missing_share` of its frames, all at its end, has the frames that decode (ending.py).

Encrypted files, files without a video stream, files without a decodable frame and files in a format that is not in
`FORMATS` raise MediaError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from datasets.plan.metadata import VideoMetadata
from datasets.readers.bitstreams import PacketCheck
from datasets.readers.ending import is_tolerable
from utils.errors import MediaError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

_TIMED_FORMATS = {"mov", "mp4", "matroska", "webm"}
_COUNTED_FORMATS = {"avi"}
#: The average rate of the header is used if the time stamps agree within this relative difference.
_RATE_TOLERANCE = 0.05
_DEFAULT_RATE = 25.0  # FFmpeg's default, for files with neither
#: Demuxers that read one file and open no other. Playlists, concat scripts, manifests and image patterns are excluded,
#: because they name files outside of the data root. Audio formats are included for a better message: no video stream.
FORMATS = (
    "mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "flv", "live_flv", "asf", "asf_o", "mpegts",
    "mpeg", "mpegvideo", "m4v", "h261", "h263", "h264", "hevc", "vc1", "av1", "obu", "ivf", "mjpeg", "ogg", "mxf",
    "nut", "rm", "dv", "gif", "wtv", "yuv4mpegpipe", "mp3", "wav", "aac", "flac",
)  # fmt: skip
#: Largest frame that is decoded, in pixels; 8K has 33 million.
MAX_PIXELS = 36_000_000
#: Packets at the end of a file whose headers are checked.
_TAIL = 4
#: Packets up to this size hold no frame of their own [bytes].
_PLACEHOLDER = 8


class Grade(enum.Enum):
    """How far a packet table can be trusted; see the module docstring."""

    TIMED = "timed"
    COUNTED = "counted"
    SCANNED = "scanned"


@dataclasses.dataclass(frozen=True)
class Index:
    """The frames of one video file.

    Attributes:
        metadata: frames, height, width after rotation, frames/s.
        grade: how to find a frame.
        rotation: counter-clockwise quarter turns that make a frame upright, 0..3.
        codec: name of the decoder.
        pts, dts, sizes, keys: (P,) one entry per packet in file order (pts and dts only for TIMED).
        positions: (N,) packet of each frame in presentation order (only for TIMED).
        missing: frames at the end that do not decode and are not in `metadata`.
    """

    metadata: VideoMetadata
    grade: Grade
    rotation: int
    codec: str
    pts: np.ndarray
    dts: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray
    positions: np.ndarray
    missing: int = 0


def open_container(path: str, shown: str) -> InputContainer:
    """Open a local, regular file in one of `FORMATS`. Raise MediaError otherwise.

    The absolute path behind "file:" keeps names such as "-i", "http:x" or "concat:a" from acting as options or
    protocols. The format is checked before its demuxer runs, so a playlist that is named .mp4 opens no other file.
    """
    import av
    from av import logging
    from av.error import FFmpegError

    logging.set_level(logging.PANIC)  # exceptions report what matters; every process would print the rest

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise MediaError(shown, "it is not a regular file")
        url = "file:" + os.path.abspath(path)
        options = {"protocol_whitelist": "file", "format_whitelist": ",".join(FORMATS)}
        return av.open(url, metadata_errors="ignore", options=options)
    except (FFmpegError, OSError, ValueError) as error:
        raise MediaError(shown, _why(path, error)) from error


def _why(path: str, error: Exception) -> str:
    try:
        if os.path.getsize(path) == 0:
            return "the file is empty"
    except OSError as missing:
        return missing.strerror or str(missing)
    if getattr(error, "errno", None) == errno.EINVAL:  # FFmpeg's error for a format that is not in the whitelist
        return "its format is not a video container that is read here (a playlist, a script, a picture, or other data)"
    return f"it cannot be opened as a video ({getattr(error, 'strerror', None) or error})"


def video_stream(container: InputContainer, shown: str) -> av.VideoStream:
    """Return the first real video stream (not a cover picture), set up for single-threaded decoding."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise MediaError(shown, "there is no decoder for its video stream (`python main.py doctor` lists codecs)")
        with contextlib.suppress(UnicodeDecodeError):  # a damaged tag is not that of an encrypted stream
            if stream.codec_tag in ("encv", "drmi"):
                raise MediaError(shown, "the video is encrypted")

        stream.codec_context.thread_count = 1  # one reader process is one core
        # A few damaged bytes may promise frames of gigabytes.
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        return stream

    raise MediaError(shown, "it has no video stream")


def packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yield the packets of the stream that carry data, in file order. A demuxer error ends the file."""
    from av.error import FFmpegError

    while True:
        # PyAV 18 loses 0.3 kB for each demux() that is neither read to its end nor closed.
        with contextlib.closing(container.demux(stream)) as demuxed:  # pyright: ignore[reportArgumentType]
            try:
                for packet in demuxed:
                    if packet.size:
                        yield packet
            except FFmpegError:
                return  # the grade, or a decode of the end, finds what is missing
            except (
                IndexError
            ):  # PyAV does not support streams that begin in the middle of a file, and has lost one packet of it
                continue
            return


@dataclasses.dataclass(frozen=True)
class Kept:
    """A file that stays open after indexing: its packets in file order, and a decoder in its initial state."""

    container: InputContainer
    stream: av.VideoStream
    packets: list[av.Packet]


class Decoding:
    """Iterate over all frames of an open file, in the order of the decoder's output.

    Packets before the first frame that do not decode are skipped: a recording may begin between two key frames. After
    that the first packet that does not decode ends the video. If only few packets are left, the video is a shorter
    one, and the frames that the decoder still holds come out.

    Args:
        missing_share: largest share of packets that counts as few.

    Attributes:
        trouble: why decoding ended early, or "".
        left: number of packets with a frame that were not decoded.
    """

    def __init__(self, container: InputContainer, stream: av.VideoStream, missing_share: float) -> None:
        self.trouble = ""
        self.left = 0
        self._missing_share = missing_share
        self._packets = packets(container, stream)
        self._decoder = stream.codec_context

    def __iter__(self) -> Iterator[av.VideoFrame]:
        from av.error import FFmpegError

        given, begun = 0, False
        # An empty packet would end the decoder. AVI has empty chunks for dropped frames, which `packets` leaves out.
        for packet in self._packets:
            try:
                frames = self._decoder.decode(packet)
            except FFmpegError as error:
                if packet.size <= _PLACEHOLDER:  # without a frame, of a kind that this decoder rejects
                    continue
                self.trouble = error.strerror or str(error)
                if begun:
                    self.left = 1 + sum(packet.size > _PLACEHOLDER for packet in self._packets)
                    break
                continue

            given += 1
            begun = begun or bool(frames)
            yield from frames

        if self.left and not is_tolerable(self.left, given + self.left, self._missing_share):
            return
        # Errors before the first frame were harmless.
        if begun and not self.left:
            self.trouble = ""

        # Drain the frames that the decoder has delayed.
        try:
            yield from self._decoder.decode(None)
        except FFmpegError as error:
            self.trouble = self.trouble or error.strerror or str(error)


def build_index(path: str, shown: str, *, missing_share: float) -> Index:
    """Return the index of one file; see `index_file`."""
    return index_file(path, shown, missing_share=missing_share)[0]


def index_file(path: str, shown: str, *, keep: int = 0, missing_share: float) -> tuple[Index, Kept | None]:
    """Return the index of one file, and keep the file open if its frames can be found by time.

    Args:
        path: path of the file.
        shown: the path as written in the list, for messages.
        keep: largest number of bytes of packets to keep; 0 = close the file.
        missing_share: largest share of the frames that may be missing at the end.
    """
    container = open_container(path, shown)
    try:
        index, kept = _index(container, path, shown, keep, missing_share)
    except BaseException:
        container.close()
        raise

    if kept is None or index.grade is not Grade.TIMED:
        container.close()
        return index, None
    return index, kept


def _index(
    container: InputContainer, path: str, shown: str, keep: int, missing_share: float
) -> tuple[Index, Kept | None]:
    stream = video_stream(container, shown)
    context, formats = stream.codec_context, set(container.format.name.split(","))
    check = PacketCheck(context.codec.name, context.extradata, formats)
    table = _Table(context.codec.name)
    first_key, held, room = None, [], keep  # room: bytes that may still be kept
    tail: deque[av.Packet] = deque(maxlen=_TAIL)
    reads_all = check.reads_all

    # Demux the whole file once.
    for packet in packets(container, stream):
        table.add(packet)
        tail.append(packet)
        if reads_all:
            check.add(bytes(packet))
        if first_key is None and packet.is_keyframe:
            first_key = bytes(packet)
        room -= packet.size
        if room >= 0:
            held.append(packet)
        else:
            held.clear()

    if not table.pts:
        raise MediaError(shown, "it has no video data (header only, or cut off)")

    # The grade that headers justify. Frames must be decoded to be counted if a packet may not be one frame.
    grade = table.grade(formats)
    if not check.countable or check.allows_fields(first_key) or (grade is Grade.TIMED and not check.one_each):
        grade = Grade.SCANNED

    frame = _decode_one(stream, first_key)
    rate, time_base = stream.average_rate, stream.time_base
    stamps = table.stamps()
    # The number of frames, from headers if they are reliable, else from a decode.
    counted = _Counted(grade, check.frames(len(stamps)), frame, stamps)
    if grade is Grade.SCANNED or frame is None:
        counted = _decode_whole(path, shown, missing_share)
        _check_missing(counted, shown, missing_share)
    elif not all(check.looks_whole(bytes(packet)) for packet in tail):
        counted = _without_tail(counted, _decode_whole(path, shown, missing_share), missing_share)

    # An MP4 that was cut off lists the packets that it has lost.
    if cut_off := _cut_off(stream, path, formats, len(table.pts)):
        expected = len(stamps) + cut_off
        lost = max(counted.missing + cut_off, expected - counted.count)
        counted = dataclasses.replace(counted, missing=lost, trouble="the file is cut off")
        _check_missing(counted, shown, missing_share)

    grade = counted.grade
    index = table.finish(counted, _rate(counted.stamps, rate, time_base))

    if grade is not Grade.TIMED or room < 0 or not keep:
        return index, None
    stream.codec_context.flush_buffers()  # `_decode_one` has used the decoder
    return index, Kept(container, stream, held)


def _cut_off(stream: av.VideoStream, path: str, formats: set[str], there: int) -> int:
    """Return how many packets the table of an MP4 or MOV file lists beyond the end of the file.

    Args:
        stream: of the file.
        path: path of the file.
        formats: names of its container format.
        there: number of packets that were read.
    """
    missing = int(stream.frames or 0) - there
    # An edit list leaves out packets too, but then the last box ends at the end of the file.
    return missing if missing > 0 and "mov" in formats and _overruns(path) else 0


def _overruns(path: str) -> bool:
    """Return True if a top-level box of an MP4 or MOV file should end after the end of the file."""
    with open(path, "rb") as file:
        at, end = 0, os.fstat(file.fileno()).st_size
        while at < end:
            file.seek(at)
            head = file.read(16)
            size = int.from_bytes(head[:4], "big")
            if size == 1:  # the size follows in 64 bits
                size = int.from_bytes(head[8:16], "big")
            if size < 8:  # 0: to the end of the file
                return False
            at += size

    return at > end


class _Table:
    """The columns of the packet table while a file is demuxed."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.pts: list[int | None] = []
        self.dts: list[int | None] = []
        self.sizes: list[int] = []
        self.keys: list[bool] = []
        self.shown: list[bool] = []
        self.damaged = False

    def add(self, packet: av.Packet) -> None:
        """Add one packet. A discarded packet is outside the edit list: it is decoded for reference, but not shown."""
        self.pts.append(packet.pts)
        self.dts.append(packet.dts)
        self.sizes.append(packet.size)
        self.keys.append(packet.is_keyframe)
        self.shown.append(not packet.is_discard)
        self.damaged |= packet.is_corrupt

    def stamps(self) -> list[int | None]:
        """Return the time stamps of the packets that are shown, in file order."""
        return [pts for pts, shown in zip(self.pts, self.shown, strict=True) if shown]

    def grade(self, formats: set[str]) -> Grade:
        """Return the grade of the whole table, judged by its content only."""
        stamps = self.stamps()
        if self.damaged or not self.keys[0] or not stamps:
            return Grade.SCANNED

        odd = any(p is None for p in self.pts) or len(set(stamps)) < len(stamps)
        if formats & _COUNTED_FORMATS:
            # AVI has no stamps, so FFmpeg counts packets. That is right only if no frame is reordered.
            return Grade.TIMED if all(self.keys) and not odd else Grade.COUNTED
        # A stamp before that of the first packet belongs to a leading picture, which lacks its reference.
        if odd or not formats & _TIMED_FORMATS or min(p for p in stamps if p is not None) < (self.pts[0] or 0):
            return Grade.SCANNED
        return Grade.TIMED

    def finish(self, counted: _Counted, fps: float) -> Index:
        """Return the index of a completed table."""
        grade, frame = counted.grade, counted.first
        assert frame is not None

        timed = grade is Grade.TIMED
        rotation = round(frame.rotation / 90) % 4
        # A quarter turn swaps height and width.
        height, width = (frame.width, frame.height) if rotation % 2 else (frame.height, frame.width)

        none = np.zeros(0, np.int64)
        pts = np.array(self.pts, np.int64) if timed else none
        shown = np.flatnonzero(self.shown)

        return Index(
            metadata=VideoMetadata(frames=counted.count, height=height, width=width, fps=fps),
            grade=grade,
            rotation=rotation,
            codec=self.codec,
            pts=pts,
            dts=np.array([p if d is None else d for p, d in zip(self.pts, self.dts, strict=True)]) if timed else none,
            sizes=np.array(self.sizes, np.int64),
            keys=np.array(self.keys, bool),
            positions=shown[np.argsort(pts[shown], kind="stable")] if timed else none,
            missing=counted.missing,
        )


def _decode_one(stream: av.VideoStream, data: bytes | None) -> av.VideoFrame | None:
    """Decode one key frame from its bytes alone. Its size and rotation are reliable, those of a header are not."""
    import av
    from av.error import FFmpegError

    if data is None:
        return None
    try:
        # A new packet has no discard flag, so the key frame before an edit list comes out too.
        decoded = [*stream.codec_context.decode(av.Packet(data)), *stream.codec_context.decode(None)]
    except (FFmpegError, EOFError):
        return None
    return decoded[0] if decoded else None


@dataclasses.dataclass(frozen=True)
class _Counted:
    """The frames of a file, from its headers or from one decode.

    Attributes:
        grade: how to find a frame.
        count: number of frames.
        first: a decoded frame; None only if nothing but headers was read.
        stamps: time stamps of the frames, or of their packets.
        missing: frames at the end that do not decode or are cut off.
        trouble: the reason.
    """

    grade: Grade
    count: int
    first: av.VideoFrame | None
    stamps: list[int | None]
    missing: int = 0
    trouble: str = ""


def _decode_whole(path: str, shown: str, missing_share: float) -> _Counted:
    """Decode a file to its end, or to the first packet that does not decode."""
    first, stamps = None, []
    with open_container(path, shown) as container:
        decoding = Decoding(container, video_stream(container, shown), missing_share)
        for frame in decoding:
            first = first or frame
            stamps.append(frame.pts)

    if first is None:
        trouble = f" ({decoding.trouble})" if decoding.trouble else ""
        raise MediaError(shown, f"no frame of it decodes{trouble}")
    return _Counted(Grade.SCANNED, len(stamps), first, stamps, decoding.left, decoding.trouble)


def _without_tail(promised: _Counted, decoded: _Counted, missing_share: float) -> _Counted:
    """Return the frames that decode if only the last ones are missing, else the frames that the headers promise."""
    missing = promised.count - decoded.count
    if missing > 0 and is_tolerable(missing, promised.count, missing_share):
        return dataclasses.replace(promised, grade=Grade.SCANNED, count=decoded.count, missing=missing)
    return promised


def _check_missing(counted: _Counted, shown: str, missing_share: float) -> None:
    """Raise MediaError if more frames are missing than `missing_share` allows."""
    expected = counted.count + counted.missing
    if not is_tolerable(counted.missing, expected, missing_share):
        raise MediaError(shown, f"only {counted.count} of about {expected} frames decode ({counted.trouble})")


def _rate(stamps: list[int | None], rate: Fraction | None, time_base: Fraction | None) -> float:
    """Return frames/s: the container's average if the time stamps agree with it, else the rate of the stamps."""
    stated = float(rate) if rate else 0.0
    times = [stamp for stamp in stamps if stamp is not None]
    span = (max(times) - min(times)) * float(time_base or 0) if len(times) > 1 else 0.0
    measured = (len(times) - 1) / span if span > 0 else 0.0

    if measured and abs(stated - measured) > _RATE_TOLERANCE * measured:
        return measured
    return stated or measured or _DEFAULT_RATE
