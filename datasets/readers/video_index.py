"""Which frames a video file has: the table of its packets, made by demuxing (nothing is decoded but one key frame).

The frame count of a header is never used. Three grades say how far the table can be trusted:

- TIMED: every shown packet has a pts of its own and the decoder stamps its frames with them (mp4, mov, Matroska and
  WebM without anything suspicious). Ordinal i is the i-th smallest pts; readers may seek.
- COUNTED: headers tell how many frames the packets give, but time stamps are guesses (AVI, unless every frame is a key
  frame). Frames are found by counting from the start.
- SCANNED: packets do not tell the number of frames (MPEG-TS and -PS, missing or repeated stamps, hidden frames, packed
  frames and placeholders, fields, damaged packets, leading pictures without reference, codecs that bitstreams.py does
  not know). The file is decoded once to count; frames are found by counting.

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

from datasets.plan.facts import Facts
from datasets.readers.bitstreams import PacketCheck
from datasets.readers.ending import is_tolerable
from utils.faults import MediaError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

_TIMED_FORMATS = {"mov", "mp4", "matroska", "webm"}
_COUNTED_FORMATS = {"avi"}
#: An average rate of the header is believed when the time stamps say the same within this relative difference.
_RATE_TOLERANCE = 0.05
_DEFAULT_RATE = 25.0
#: Demuxers that read one file and open no other. Playlists, concat scripts, manifests and image patterns are not among
#: them: they name files outside of the data root. The audio formats are here to say that there is no video stream.
FORMATS = (
    "mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "flv", "live_flv", "asf", "asf_o", "mpegts",
    "mpeg", "mpegvideo", "m4v", "h261", "h263", "h264", "hevc", "vc1", "av1", "obu", "ivf", "mjpeg", "ogg", "mxf",
    "nut", "rm", "dv", "gif", "wtv", "yuv4mpegpipe", "mp3", "wav", "aac", "flac",
)  # fmt: skip
#: Largest frame that is decoded; 8K has 33 million pixels.
MAX_PIXELS = 36_000_000
#: Packets at the end of a file whose headers are looked at.
_TAIL = 4
#: Packets of no more bytes than this hold no frame of their own [bytes].
_PLACEHOLDER = 8


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
        missing: frames at the end that do not decode and are not in `facts`.
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
    missing: int = 0


def open_container(path: str, shown: str) -> InputContainer:
    """Open a local, regular file in one of `FORMATS`; MediaError otherwise.

    The absolute path behind "file:" keeps names such as "-i", "http:x" or "concat:a" from being options or protocols.
    The format is checked before its demuxer runs: a playlist that calls itself .mp4 opens no other file.
    """
    import av
    from av import logging
    from av.error import FFmpegError

    logging.set_level(logging.PANIC)  # what matters is said by the exception; the rest would be noise of every worker
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
    if getattr(error, "errno", None) == errno.EINVAL:  # how FFmpeg reports a format that is not in the list
        return "its format is not a video container that is read here (a playlist, a script, a picture, or other data)"
    return f"it cannot be opened as a video ({getattr(error, 'strerror', None) or error})"


def video_stream(container: InputContainer, shown: str) -> av.VideoStream:
    """The first real video stream (a cover picture is not one), set up for single-threaded decoding."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise MediaError(shown, "there is no decoder for its video stream (`python main.py doctor` lists codecs)")
        with contextlib.suppress(UnicodeDecodeError):  # four damaged letters are not those of an encrypted stream
            if stream.codec_tag in ("encv", "drmi"):
                raise MediaError(shown, "the video is encrypted")
        stream.codec_context.thread_count = 1
        # A few damaged bytes may promise frames of gigabytes.
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        return stream
    raise MediaError(shown, "it has no video stream")


def packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Packets of the stream that carry data, in file order; a demuxer error ends the file."""
    from av.error import FFmpegError

    while True:
        # PyAV 18 loses 0.3 kB for each demux() that is neither read to its end nor closed.
        with contextlib.closing(container.demux(stream)) as demuxed:  # type: ignore[type-var]
            try:
                for packet in demuxed:
                    if packet.size:
                        yield packet
            except FFmpegError:
                return
            except (
                IndexError
            ):  # PyAV does not know streams that begin in the middle of a file: it lost one packet of it
                continue
            return


@dataclasses.dataclass(frozen=True)
class Kept:
    """A file that stays open after it was indexed: its packets in file order, and a decoder in its first state."""

    container: InputContainer
    stream: av.VideoStream
    packets: list[av.Packet]


class Decoding:
    """All frames of an open file, in the order in which the decoder puts them out.

    Packets before the first frame that do not decode are left out: a recording may begin between two key frames. After
    that the first packet that does not decode ends the video. If only few packets are left, the video is a shorter one,
    and frames that the decoder still holds come out.

    Args:
        missing_share: how many packets are few.

    Attributes:
        trouble: why decoding ended early, or "".
        left: packets with a frame that were not decoded.
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
        # An empty packet would end the decoder: `packets` leaves out the empty chunks that AVI has for dropped frames.
        for packet in self._packets:
            try:
                frames = self._decoder.decode(packet)
            except FFmpegError as error:
                if packet.size <= _PLACEHOLDER:  # it holds no frame, and this decoder does not know its kind
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
        if begun and not self.left:
            self.trouble = ""
        try:
            yield from self._decoder.decode(None)
        except FFmpegError as error:
            self.trouble = self.trouble or error.strerror or str(error)


def build_index(path: str, shown: str, *, missing_share: float) -> Index:
    """Make the index of one file; see `index_file`."""
    return index_file(path, shown, missing_share=missing_share)[0]


def index_file(path: str, shown: str, *, keep: int = 0, missing_share: float) -> tuple[Index, Kept | None]:
    """Make the index of one file, and keep it open where its frames can be found by time.

    Args:
        path: where the file is.
        shown: the path as the list writes it, for messages.
        keep: most bytes of packets to keep; 0 = keep nothing and close the file.
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
    first_key, held, room = None, [], keep
    tail: deque[av.Packet] = deque(maxlen=_TAIL)
    reads_all = check.reads_all
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
    grade = table.grade(formats)
    if not check.countable or check.allows_fields(first_key) or (grade is Grade.TIMED and not check.one_each):
        grade = Grade.SCANNED
    frame = _decode_one(stream, first_key)
    rate, time_base = stream.average_rate, stream.time_base
    stamps = table.stamps()
    counted = _Counted(grade, check.frames(len(stamps)), frame, stamps)
    if grade is Grade.SCANNED or frame is None:
        counted = _decode_whole(path, shown, missing_share)
        _check_missing(counted, shown, missing_share)
    elif not all(check.looks_whole(bytes(packet)) for packet in tail):
        counted = _without_tail(counted, _decode_whole(path, shown, missing_share), missing_share)
    if cut_off := _cut_off(stream, path, formats, len(table.pts)):
        expected = len(stamps) + cut_off
        lost = max(counted.missing + cut_off, expected - counted.count)
        counted = dataclasses.replace(counted, missing=lost, trouble="the file is cut off")
        _check_missing(counted, shown, missing_share)
    grade = counted.grade
    index = table.finish(counted, _rate(counted.stamps, rate, time_base))
    if grade is not Grade.TIMED or room < 0 or not keep:
        return index, None
    stream.codec_context.flush_buffers()
    return index, Kept(container, stream, held)


def _cut_off(stream: av.VideoStream, path: str, formats: set[str], there: int) -> int:
    """Return how many packets the table of an MP4 or MOV file lists beyond the end of the file.

    Args:
        stream: of the file.
        path: where the file is.
        formats: names of its container format.
        there: packets that were read.
    """
    missing = int(stream.frames or 0) - there
    # An edit list leaves out packets too; then the last box ends where the file ends.
    return missing if missing > 0 and "mov" in formats and _overruns(path) else 0


def _overruns(path: str) -> bool:
    """Return whether a top-level box of an MP4 or MOV file claims to end behind the end of the file."""
    with open(path, "rb") as file:
        at, end = 0, os.fstat(file.fileno()).st_size
        while at < end:
            file.seek(at)
            head = file.read(16)
            size = int.from_bytes(head[:4], "big")
            if size == 1:
                size = int.from_bytes(head[8:16], "big")
            if size < 8:  # 0: to the end of the file
                return False
            at += size
    return at > end


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

    def add(self, packet: av.Packet) -> None:
        """Add one packet. A discarded one lies outside the edit list: it is decoded for reference, not shown."""
        self.pts.append(packet.pts)
        self.dts.append(packet.dts)
        self.sizes.append(packet.size)
        self.keys.append(packet.is_keyframe)
        self.shown.append(not packet.is_discard)
        self.damaged |= packet.is_corrupt

    def stamps(self) -> list[int | None]:
        """Time stamps of the packets that are shown, in file order."""
        return [pts for pts, shown in zip(self.pts, self.shown, strict=True) if shown]

    def grade(self, formats: set[str]) -> Grade:
        """Grade of the whole table, by its content only."""
        stamps = self.stamps()
        if self.damaged or not self.keys[0] or not stamps:
            return Grade.SCANNED
        odd = any(p is None for p in self.pts) or len(set(stamps)) < len(stamps)
        if formats & _COUNTED_FORMATS:
            # Stamps are counted packets there: right only where no frame waits for another one.
            return Grade.TIMED if all(self.keys) and not odd else Grade.COUNTED
        if odd or not formats & _TIMED_FORMATS or min(p for p in stamps if p is not None) < (self.pts[0] or 0):
            return Grade.SCANNED
        return Grade.TIMED

    def finish(self, counted: _Counted, fps: float) -> Index:
        """Freeze the table."""
        grade, frame = counted.grade, counted.first
        assert frame is not None
        timed = grade is Grade.TIMED
        rotation = round(frame.rotation / 90) % 4
        height, width = (frame.width, frame.height) if rotation % 2 else (frame.height, frame.width)
        none = np.zeros(0, np.int64)
        pts = np.array(self.pts, np.int64) if timed else none
        shown = np.flatnonzero(self.shown)
        return Index(
            facts=Facts(frames=counted.count, height=height, width=width, fps=fps),
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


@dataclasses.dataclass(frozen=True)
class _Counted:
    """The frames of a file, by its headers or by one decode.

    Attributes:
        grade: how to find a frame.
        count: number of frames.
        first: a decoded frame; None only while headers alone were looked at.
        stamps: time stamps of the frames, or of their packets.
        missing: frames at the end that do not decode, or are cut off.
        trouble: why.
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
    """Return what decodes where only the last frames are missing, else what the headers promise."""
    missing = promised.count - decoded.count
    if missing > 0 and is_tolerable(missing, promised.count, missing_share):
        return dataclasses.replace(promised, grade=Grade.SCANNED, count=decoded.count, missing=missing)
    return promised


def _check_missing(counted: _Counted, shown: str, missing_share: float) -> None:
    """MediaError if more frames are missing than a shorter video may lack."""
    expected = counted.count + counted.missing
    if not is_tolerable(counted.missing, expected, missing_share):
        raise MediaError(shown, f"only {counted.count} of about {expected} frames decode ({counted.trouble})")


def _rate(stamps: list[int | None], rate: Fraction | None, time_base: Fraction | None) -> float:
    """Frames/s: the container's average where the time stamps agree with it, else what the stamps say."""
    stated = float(rate) if rate else 0.0
    times = [stamp for stamp in stamps if stamp is not None]
    span = (max(times) - min(times)) * float(time_base or 0) if len(times) > 1 else 0.0
    measured = (len(times) - 1) / span if span > 0 else 0.0
    if measured and abs(stated - measured) > _RATE_TOLERANCE * measured:
        return measured
    return stated or measured or _DEFAULT_RATE
