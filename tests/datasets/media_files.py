"""Write video files of many containers and codecs, as old data sets have them: for tests, rows and the fuzzer.

`write_avi` and `packed` are a muxer of our own: no library writes packed MPEG-4, placeholders or empty chunks.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av

from tests.datasets.videos import frame_image

VOP = b"\x00\x00\x01\xb6"
I_VOP, P_VOP, B_VOP = 0, 1, 2
SIDE = 48
#: User data by which an encoder announces packed frames, and by which decoders recognise them.
DIVX_PACKED = b"\x00\x00\x01\xb2DivX503b1393p"
XVID = b"\x00\x00\x01\xb2XviD0050"
_TICK = Fraction(1, 25)


def encode(codec: str, frames: int, *, side: int = SIDE, options: dict[str, str] | None = None) -> list[bytes]:
    """Return the packets of a barcoded video in the order of decoding; headers are in the first one."""
    context = av.CodecContext.create(codec, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width = context.height = side
    context.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    context.framerate, context.time_base = Fraction(25), _TICK
    context.options = options or {}
    context.thread_count = 1
    packets = []
    for number in range(frames):
        frame = av.VideoFrame.from_ndarray(frame_image(number, side, side), format="rgb24")
        frame = frame.reformat(format=context.pix_fmt)
        frame.pts, frame.time_base = number, _TICK
        packets += [bytes(packet) for packet in context.encode(frame)]
    return packets + [bytes(packet) for packet in context.encode(None)]


def kind_of(packet: bytes) -> int:
    """Return the vop_coding_type of the first VOP of an MPEG-4 packet."""
    return packet[packet.index(VOP) + 4] >> 6


def placeholder(time: int = 0, bits: int = 5) -> bytes:
    """Return a P-VOP that is not coded, as XviD writes it: 6 bytes.

    Args:
        time: its vop_time_increment.
        bits: number of bits of that, of the stream's header.
    """
    text = "01" + "0" + "1" + f"{time:0{bits}b}" + "1" + "0"
    text += "0" + "1" * (-(len(text) + 1) % 8)
    return VOP + int(text, 2).to_bytes(len(text) // 8, "big")


def packed(packets: Sequence[bytes], *, at_end: int = 0, user_data: bytes = DIVX_PACKED + XVID) -> list[bytes]:
    """Join each reference VOP with the B-VOP after it, and put a placeholder where the B-VOPs end.

    Args:
        packets: of `encode("mpeg4", ...)` with B-frames.
        at_end: placeholders more at the end.
        user_data: how the encoder names itself.
    """
    head, rest = packets[0], list(packets[1:])
    joined = [re.sub(rb"\x00\x00\x01\xb2Lavc[^\x00]*", lambda _: user_data, head)]
    while rest:
        one = rest.pop(0)
        if not rest or kind_of(one) == B_VOP or kind_of(rest[0]) != B_VOP:
            joined.append(one)
            continue
        joined.append(one + rest.pop(0))
        while rest and kind_of(rest[0]) == B_VOP:
            joined.append(rest.pop(0))
        joined.append(placeholder(len(joined) % 25))
    return joined + [placeholder(len(joined) % 25)] * at_end


def write_avi(
    path: Path, packets: Sequence[bytes], *, tag: bytes = b"XVID", side: int = SIDE, keys: Sequence[bool] | None = None
) -> Path:
    """Write an AVI file with an index.

    Args:
        path: the file.
        packets: one chunk each; an empty one stands for a frame that was dropped.
        tag: four letters of the codec.
        side: height and width.
        keys: which chunks the index calls key frames; default: all that begin with a header or an I-VOP.
    """
    path.write_bytes(avi_bytes(packets, tag=tag, side=side, keys=keys))
    return path


def avi_bytes(
    packets: Sequence[bytes], *, tag: bytes = b"XVID", side: int = SIDE, keys: Sequence[bool] | None = None
) -> bytes:
    """Return the bytes of `write_avi`."""
    chunks, index, at = [], [], 4
    for number, data in enumerate(packets):
        key = keys[number] if keys else VOP in data and kind_of(data) == I_VOP
        chunks.append(_chunk(b"00dc", data))
        index.append(struct.pack("<4sIII", b"00dc", 16 if key else 0, at, len(data)))
        at += len(chunks[-1])
    largest = max(map(len, packets), default=0)
    avih = struct.pack("<14I", 40_000, 0, 0, 0x10, len(packets), 0, 1, largest, side, side, 0, 0, 0, 0)
    strh = struct.pack(
        "<4s4sIHHIIIIIIiI4H", b"vids", tag, 0, 0, 0, 0, 1, 25, 0, len(packets), largest, -1, 0, 0, 0, side, side
    )
    strf = struct.pack("<IiiHH4sIiiII", 40, side, side, 1, 24, tag, 3 * side * side, 0, 0, 0, 0)
    stream = _list(b"strl", _chunk(b"strh", strh) + _chunk(b"strf", strf))
    header = _list(b"hdrl", _chunk(b"avih", avih) + stream)
    body = header + _list(b"movi", b"".join(chunks)) + _chunk(b"idx1", b"".join(index))
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"AVI " + body


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def _list(name: bytes, data: bytes) -> bytes:
    return _chunk(b"LIST", name + data)
