"""Write a small mp4 with only the packets that some frames of a video need, for decoders of whole files. Torch-free.

A hardware decoder gets only files that are written here, so they are simple: one video stream, no edit list, no
rotation, no audio, a constant frame rate. Frame k of the cut is the packet with the k-th smallest time stamp. Runs of
packets begin where a decoder can begin, and end with the last wanted frame. H.264 pictures that are neither wanted nor
referred to are left out, so there is less to decode.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from datasets.dali import bitstream
from datasets.readers.video_index import Grade, Index, open_container, packets, video_stream

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

#: Decoder name -> codec name, if they differ.
_CODECS = {"libdav1d": "av1", "libaom-av1": "av1", "libvpx-vp9": "vp9"}
#: With more packets or bytes than these between two places of a file, a seek is cheaper than reading on.
_SEEK_PACKETS = 250
_SEEK_BYTES = 1 << 20
# The rate does not matter: frames are chosen by number, not by time.
_TICK = Fraction(1, 25)


class Refused(Exception):  # not an error: the clip is read in a different way
    """A file that the device decoder does not get; the text gives the reason in a few words."""


def cut(
    path: str, shown: str, index: Index, ordinals: Iterable[int], codecs: frozenset[str], sides: tuple[int, int]
) -> tuple[bytes, np.ndarray, str | None]:
    """Cut the packets that some frames need out of a file.

    Args:
        path: the file on disk.
        shown: the path as the list writes it, for messages.
        index: the index of that file.
        ordinals: of frames, in any order; repeats are allowed.
        codecs: names of the codecs that the decoder takes.
        sides: smallest and largest width and height that the decoder takes [pixels].

    Returns:
        (an mp4 file, (len(wanted),) int32 ordinals of the wanted frames in that file, the name of its colour matrix in
        `bitstream.MATRICES` if it is not BT.601).

    Raises:
        Refused: the decoder cannot read the file, or might take one frame for another.
        MediaError: the file cannot be opened.
    """
    codec = codec_of(index)
    height, width = index.metadata.height, index.metadata.width

    # What the index already shows needs no open file.
    if codec not in codecs:
        raise Refused(f"the codec {codec} is not decoded there")
    if index.grade is not Grade.TIMED:
        raise Refused("its time stamps do not tell its frames apart")
    if index.rotation:
        raise Refused("its frames are stored rotated")
    if not (sides[0] <= height <= sides[1] and sides[0] <= width <= sides[1]):
        raise Refused(f"frames of {width}x{height} are outside of what is decoded there")
    if width % 2 or height % 2:
        raise Refused("its frames have an odd side")

    positions = index.positions[np.fromiter(ordinals, np.int64)].tolist()
    # Try all key frames first. With an open GOP among them, read once more from packet 0.
    for keys in (np.flatnonzero(index.keys), np.zeros(1, np.int64)):
        with open_container(path, shown) as container:
            stream = video_stream(container, shown)
            if stream.codec_context.pix_fmt not in ("yuv420p", "yuvj420p"):
                raise Refused(f"the pixel format {stream.codec_context.pix_fmt} is not decoded there")
            if codec == "h264" and bitstream.h264_may_have_fields(stream.codec_context.extradata):
                raise Refused("its pictures may be stored as fields")

            try:
                chosen = _choose(container, stream, index, codec, set(positions), keys)
            except _NoBeginning:
                continue  # read again from the start of the file, where decoding may always begin

            # Frames of the cut are numbered by time stamp, so equal stamps would swap frames.
            at = np.array([position for position, _ in chosen])
            if len(np.unique(index.pts[at])) < len(at):
                raise Refused("its time stamps do not tell its frames apart")

            # rank[i]: the number under which packet i of the cut is shown.
            rank = np.empty(len(at), np.int64)
            rank[np.argsort(index.pts[at])] = np.arange(len(at))

            matrix = _matrix(stream, codec, [packet for _, packet in chosen])
            data = _mux(stream, [packet for _, packet in chosen], rank)

        rank_of = dict(zip(at.tolist(), rank.tolist(), strict=True))
        return data, np.array([rank_of[position] for position in positions], np.int32), matrix
    raise AssertionError("packet 0 needs no check")


def codec_of(index: Index) -> str:
    """Return the name of a file's codec."""
    return _CODECS.get(index.codec, index.codec)


def _matrix(stream: av.VideoStream, codec: str, packets: list[av.Packet]) -> str | None:
    """Return the name of the colour matrix unless it is BT.601, which decoders assume. Also look for hidden frames.

    Raises:
        Refused: it has frames that are never shown, or colours that no matrix describes.
    """
    tag = int(stream.codec_context.colorspace)

    if codec == "vp9":
        if any(bitstream.vp9_has_hidden_frames(bytes(packet)) for packet in packets):
            raise Refused("it has frames that are never shown")
        tag = bitstream.vp9_colour_tag(bytes(packets[0]))  # the frame itself names its matrix

    if tag in bitstream.WITHOUT_MATRIX:
        raise Refused("its colours are not stored as luma and two differences")
    name = bitstream.MATRIX_OF_TAG.get(tag, "bt601")
    return None if name == "bt601" else name


class _NoBeginning(Exception):
    """A key frame that refers to frames before it (open GOP)."""


def _choose(
    container: InputContainer, stream: av.VideoStream, index: Index, codec: str, positions: set[int], keys: np.ndarray
) -> list[tuple[int, av.Packet]]:
    """Return (position, packet) of all packets that the wanted positions need, in file order."""
    nals = _Nals(codec, stream.codec_context.extradata)

    # Group the wanted packets into runs, by the key frame from which each is decoded.
    first_of: dict[int, int] = {}  # first packet of a run -> its last wanted packet
    for position in sorted(positions):
        before = keys[: np.searchsorted(keys, position, side="right")]
        before = before[index.pts[before] <= index.pts[position]]  # a leading picture belongs to the previous run
        first_of[int(before[-1]) if len(before) else 0] = position

    # Read the runs in file order, and keep what their wanted packets need.
    chosen: list[tuple[int, av.Packet]] = []
    reading = _Reading(container, stream, index)
    end = 0  # packets before this one are chosen or left out for good
    for start, last in first_of.items():
        start = max(start, end)
        for position, packet in reading.run(start, last + 1):
            if position == start > end and not nals.may_begin(packet):
                raise _NoBeginning
            # Pictures shown before the key frame that begins a run refer to packets that were left out.
            leading = start > end and index.pts[position] < index.pts[start]
            if position in positions or not (leading or nals.is_unneeded(packet)):
                chosen.append((position, packet))
        end = last + 1

    return chosen


class _Reading:
    """Packets of an open file by position."""

    def __init__(self, container: InputContainer, stream: av.VideoStream, index: Index) -> None:
        self.container, self.stream, self.index = container, stream, index
        self.packets = packets(container, stream)
        self.next = 0

    def run(self, start: int, stop: int) -> Iterator[tuple[int, av.Packet]]:
        """Yield packets start..stop-1, each checked against the index."""
        index = self.index
        gap = start - self.next

        if gap > _SEEK_PACKETS or (gap > 0 and index.sizes[self.next : start].sum() > _SEEK_BYTES):
            self._seek(start)

        while self.next < stop:
            packet = next(self.packets, None)
            if packet is None or (packet.pts, packet.size) != (index.pts[self.next], index.sizes[self.next]):
                raise Refused("its packets are not where its index says")
            self.next += 1

            if self.next > start:
                yield self.next - 1, packet

    def _seek(self, position: int) -> None:
        """Seek to `position`, or to a packet shortly before it."""
        from av.error import FFmpegError

        index = self.index
        try:
            self.container.seek(int(index.dts[position]), stream=self.stream, backward=True)
            rest = packets(self.container, self.stream)
            first = next(rest, None)
        except FFmpegError:
            first, rest = None, iter(())

        # A seek may land anywhere: find the packet by its time stamp, which must be unique.
        landed = np.flatnonzero(index.pts == first.pts) if first is not None and first.pts is not None else []
        if first is None or len(landed) != 1 or landed[0] > position:
            raise Refused("a seek in it does not land where its index says")
        self.next = int(landed[0])
        self.packets = itertools.chain([first], rest)


class _Nals:
    """Read the NAL units of an H.264 or HEVC packet (ITU-T H.264 7.4.1, H.265 7.4.2); other codecs have none."""

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        at = {"h264": 4, "hevc": 21}.get(codec)  # byte with the length size in the decoder configuration record
        self.codec = codec
        self.prefix = (extradata[at] & 3) + 1 if at and extradata and len(extradata) > at and extradata[0] == 1 else 0

    def heads(self, packet: av.Packet) -> list[int]:
        """Return the first byte of each unit; no bytes if the units are not length-prefixed."""
        data, at, first_bytes = memoryview(packet), 0, []
        while self.prefix and at + self.prefix < len(data):
            first_bytes.append(data[at + self.prefix])
            at += self.prefix + int.from_bytes(data[at : at + self.prefix], "big")
        return first_bytes

    def may_begin(self, packet: av.Packet) -> bool:
        """Return True if decoding may begin with this key frame although other packets came before it."""
        if self.codec == "h264":
            return any(head & 31 == 5 for head in self.heads(packet))  # an IDR picture
        if self.codec == "hevc":
            return any(head >> 1 & 63 in (19, 20) for head in self.heads(packet))  # IDR_W_RADL, IDR_N_LP
        return True

    def is_unneeded(self, packet: av.Packet) -> bool:
        """Return True if no other picture refers to this one."""
        if self.codec != "h264":
            return False
        # Slices with nal_ref_idc 0 are not used for reference.
        slices = [head for head in self.heads(packet) if 1 <= head & 31 <= 5]
        return bool(slices) and not any(head >> 5 & 3 for head in slices)


def _mux(stream: av.VideoStream, chosen: list[av.Packet], rank: np.ndarray) -> bytes:
    """Return an mp4 with these packets in this order; packet i is shown as number rank[i]."""
    import av
    from av.error import FFmpegError

    delay = int((np.arange(len(rank)) - rank).max())  # keeps each decoding time at or before the time of display
    file = io.BytesIO()

    try:
        with av.open(file, "w", format="mp4") as output:
            copy = output.add_stream_from_template(stream)
            copy.time_base = _TICK
            for i, (packet, number) in enumerate(zip(chosen, rank.tolist(), strict=True)):
                packet.stream = copy
                packet.time_base = _TICK
                packet.pts, packet.dts, packet.duration = number, i - delay, 1
                output.mux(packet)
    except (FFmpegError, ValueError) as error:
        raise Refused(f"its stream does not fit into an mp4 ({error})") from error

    return file.getvalue()
