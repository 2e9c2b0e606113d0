"""Read the headers of packets: does a packet hold exactly one frame, and does it look whole? Nothing is decoded.

A packet of a file is one frame only by the rules of its codec. MPEG-4 part 2 in AVI breaks them: a "packed" file holds
a P- and a B-picture in one packet and a placeholder of 1 to 8 bytes after it. H.264 may store the two fields of a frame
in two packets. VP8 and VP9 have packets that are never shown. The packet table (video_index.py) asks this module
whether the number of packets is the number of frames. Where it is not, the file is decoded once to count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

#: Decoders that give one frame for each packet, as long as `PacketCheck` finds nothing against it.
_ONE_EACH = frozenset(
    {
        "av1", "libdav1d", "libaom-av1", "h264", "hevc", "mpeg4", "vp8", "libvpx", "vp9", "libvpx-vp9", "mjpeg",
        "dnxhd", "dvvideo", "ffv1", "ffvhuff", "huffyuv", "png", "prores", "rawvideo", "utvideo", "h263", "msmpeg4",
        "msmpeg4v2",
    }
)  # fmt: skip
#: Decoders of the MPEG-4 family without a check of their own: a smaller packet may stand for "no change" [bytes].
_SMALLEST = {"h263": 6, "msmpeg4": 6, "msmpeg4v2": 6}
_PLACEHOLDER = 8  # bytes of the longest placeholder
_P, _B = 1, 2  # vop_coding_type
_PACKED = re.compile(rb"DivX\d+(?:Build|b)\d+p")
_VOP, _START = b"\x00\x00\x01\xb6", b"\x00\x00\x01"


class PacketCheck:
    """Headers of the packets of one stream, in file order.

    Args:
        codec: name of the decoder.
        extradata: its configuration record, where the container has one.
        container: names of the container format.

    Attributes:
        reads_all: whether `add` has to see every packet.
        one_each: whether each packet so far gives one frame.
        countable: whether `frames` is known from the headers.
    """

    def __init__(self, codec: str, extradata: bytes | None, container: set[str]) -> None:
        self.codec = codec
        self._extradata = extradata or b""
        self._vops = _Vops(self._extradata) if codec == "mpeg4" else None
        self._hides = {"vp8": _vp8_hides, "libvpx": _vp8_hides, "vp9": _vp9_hides, "libvpx-vp9": _vp9_hides}.get(codec)
        self._smallest = _SMALLEST.get(codec, 0)
        self.reads_all = bool(self._vops or self._hides or self._smallest)
        # Encoders for Video for Windows write placeholders into H.264, and shift frames.
        self.one_each = codec in _ONE_EACH and not (codec == "h264" and "avi" in container)
        self.countable = self.one_each

    def add(self, data: bytes) -> None:
        """Look at the next packet."""
        if self._vops and self._vops.regular:
            self._vops.look(data)
            self.one_each = self._vops.one_each
            self.countable = self._vops.regular and not self._vops.may_repeat
        elif not self.countable:
            return
        elif self._hides:
            self.one_each = self.countable = not self._hides(data)
        else:
            self.one_each = self.countable = len(data) >= self._smallest

    def frames(self, packets: int) -> int:
        """Return the number of frames in so many packets; right if `countable`."""
        return packets if self.one_each or not self._vops else self._vops.frames

    def allows_fields(self, first_key: bytes | None) -> bool:
        """Return whether a frame may be stored as two packets, one for each field.

        Args:
            first_key: bytes of the first key frame, for parameter sets that are not in the configuration record.
        """
        if self.codec != "h264":
            return False
        return not any(map(is_progressive, (self._extradata, first_key or b"")))

    def looks_whole(self, data: bytes) -> bool:
        """Return False where a packet cannot be what an encoder wrote: zeroed, overwritten, cut off."""
        if self.codec in ("h264", "hevc"):
            return _nals_fit(data, self.codec, _prefix_bytes(self.codec, self._extradata))
        if self._vops:
            return data.startswith(_START)
        check = {
            "vp8": _vp8_fits, "libvpx": _vp8_fits, "vp9": _vp9_fits, "libvpx-vp9": _vp9_fits, "av1": _obus_fit,
            "libdav1d": _obus_fit, "libaom-av1": _obus_fit, "mjpeg": _jpeg_fits,
        }.get(self.codec)  # fmt: skip
        return check is None or check(data)


class Bits:
    """Bits of a byte string from the highest to the lowest; reading beyond the end raises ValueError."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data) - at

    def take(self, count: int) -> int:
        """Return the next `count` bits as a number."""
        self._left -= count
        if self._left < 0:
            raise ValueError("the header ends early")
        return self._value >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        """Return the next unsigned Exp-Golomb number (H.264 9.1)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > 32:
                raise ValueError("no Exp-Golomb number")
        return (1 << zeros) - 1 + self.take(zeros)

    def signed_golomb(self) -> int:
        """Return the next signed Exp-Golomb number (H.264 9.1.1)."""
        number = self.golomb()
        return (number + 1) // 2 if number % 2 else -(number // 2)


class _Vops:
    """Video object planes of MPEG-4 part 2 (ISO/IEC 14496-2 6.2.3 and 6.2.5), and what a decoder makes of them.

    A packed file holds a reference VOP and a B-VOP in one packet. The decoder keeps the B-VOP and decodes it in place
    of the next packet. That is a placeholder (a VOP that is not coded, or the one byte 0x7f), or a second B-VOP, which
    is then kept in turn. Placeholders at other places give no frame. But the decoder takes their time for that of a
    reference, after which it may drop a B-VOP; and if one ends a file whose frames are not reordered, it repeats the
    last frame. A B-VOP that is kept when the file ends is lost.

    Everything else makes the stream irregular: more than two VOPs in a packet, a reference VOP where a placeholder is
    due, a B-VOP before two references, or B-VOPs in a stream whose header does not say that frames are reordered.

    Attributes:
        one_each: every packet so far has one coded VOP.
        regular: `frames` is what the decoder puts out, unless the last frame is repeated.
        may_repeat: the decoder may repeat the last frame if the file ends here.
        frames: number of VOPs that are decoded.
    """

    def __init__(self, extradata: bytes) -> None:
        self.one_each = self.regular = True
        self.may_repeat = False
        self.frames = 0
        self._increment_bits: int | None = None
        self._reorders = False
        self._packed = False
        self._kept = False  # the decoder has a B-VOP for the next packet
        self._references = 0
        self._clock_is_off = False
        self._read_headers(extradata)

    def look(self, data: bytes) -> None:
        """Look at one packet."""
        at = data.find(_VOP)
        self.may_repeat = False
        if at < 0 and len(data) > _PLACEHOLDER:  # damaged; decoding finds out what it costs
            self.frames += 1
            return
        if at > 0:
            self._read_headers(data[:at])
        try:
            self.regular &= self._kept_first(data, at) if self._kept else self._decode(data, at)
        except ValueError:
            self.regular = False
        self.one_each &= self.regular

    def _decode(self, data: bytes, at: int) -> bool:
        """Decode a packet while no VOP is kept; returns False if the outcome is not known."""
        if at < 0:
            self.one_each = False
            return self._packed and data == b"\x7f"
        kind, coded = self._header(data, at)
        following = data.find(_VOP, at + 4)
        if not coded:
            self.one_each = False
            self.may_repeat, self._clock_is_off = not self._reorders, True
            return following < 0
        if kind == _B:
            if self._references < 2 or not self._reorders or self._clock_is_off:
                return False
        elif kind and not self._references:
            return False
        self._references += kind != _B
        self.frames += 1
        if following < 0:
            return True
        self.one_each = False
        self._kept = True
        second = self._header(data, following)
        only_two = data.find(_VOP, following + 4) < 0
        return self._packed and self._reorders and self._references > 1 and second == (_B, True) and only_two

    def _kept_first(self, data: bytes, at: int) -> bool:
        """Decode the kept VOP in place of a packet; returns False if that is no placeholder."""
        self.one_each = False
        self._kept = False
        self.frames += 1
        if at < 0:
            return data == b"\x7f"
        holds = self._header(data, at)
        self._kept = holds == (_B, True)  # the second of two B-VOPs takes the place of the first
        alone = at == 0 and data.find(_VOP, 4) < 0
        return alone and (holds == (_P, False) or (self._kept and len(data) > _PLACEHOLDER))

    def _header(self, data: bytes, at: int) -> tuple[int, bool]:
        """(vop_coding_type, vop_coded) of the VOP whose start code is at `at`."""
        if self._increment_bits is None:
            raise ValueError("no stream header")
        bits = int.from_bytes(data[at + 4 : at + 12].ljust(8, b"\0"), "big")
        left = 61  # behind vop_coding_type
        while bits >> left & 1 and left > 32:  # modulo_time_base
            left -= 1
        first, left = left - 1, left - 2 - self._increment_bits
        if not (bits >> first & 1 and bits >> left & 1):
            raise ValueError("a marker bit is missing")
        return bits >> 62, bool(bits >> left - 1 & 1)

    def _read_headers(self, data: bytes) -> None:
        """Take the clock and the order of frames from a video object layer, and "packed" from the encoder's name."""
        self._packed |= _PACKED.search(data) is not None
        at = data.find(_START)
        while 0 <= at < len(data) - 4:
            if 0x20 <= data[at + 3] <= 0x2F:
                try:
                    self._increment_bits, self._reorders = _layer(Bits(data[at + 4 : at + 64]))
                except ValueError:
                    self._increment_bits = None
            at = data.find(_START, at + 3)


def _layer(bits: Bits) -> tuple[int, bool]:
    """(bits of vop_time_increment, whether frames are reordered) of a video object layer header."""
    bits.take(9)  # random_accessible_vol, video_object_type_indication
    version = 1
    if bits.take(1):
        version = bits.take(4)
        bits.take(3)
    if bits.take(4) == 15:  # aspect ratio
        bits.take(16)
    reorders = False
    if bits.take(1):  # vol_control_parameters
        bits.take(2)
        reorders = not bits.take(1)  # low_delay
        if bits.take(1):
            bits.take(79)  # vbv parameters
    shape = bits.take(2)
    if shape or version > 5:
        raise ValueError("not a rectangular picture")
    if not bits.take(1):
        raise ValueError("a marker bit is missing")
    return max(1, (bits.take(16) - 1).bit_length()), reorders


def _vp8_hides(data: bytes) -> bool:
    """VP8 frame header (RFC 6386 section 9.1): bit 4 of the first byte is show_frame."""
    return not data[0] & 0x10


def _vp9_hides(data: bytes) -> bool:
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


def _vp8_fits(data: bytes) -> bool:
    if len(data) < 3 or data[0] >> 1 & 7 > 3:
        return False
    if int.from_bytes(data[:3], "little") >> 5 > len(data):
        return False
    return bool(data[0] & 1) or data[3:6] == b"\x9d\x01\x2a"


def _vp9_fits(data: bytes) -> bool:
    return data[0] >> 6 == 2


def _jpeg_fits(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _obus_fit(data: bytes) -> bool:
    """Open bitstream units (AV1 5.3) with sizes that end where the packet ends."""
    at = 0
    while at < len(data):
        head = data[at]
        if head & 0x81:  # forbidden and reserved bit
            return False
        at += 2 if head & 4 else 1
        if not head & 2:  # no size: the last unit
            return True
        size = shift = 0
        while at < len(data):
            size |= (data[at] & 0x7F) << shift
            shift += 7
            at += 1
            if not data[at - 1] & 0x80:
                break
        at += size
    return at == len(data)


def _prefix_bytes(codec: str, extradata: bytes) -> int:
    """Bytes of the length in front of each NAL unit; 0 where start codes separate them."""
    at = {"h264": 4, "hevc": 21}[codec]
    return (extradata[at] & 3) + 1 if len(extradata) > at and extradata[0] == 1 else 0


def _nals_fit(data: bytes, codec: str, prefix: int) -> bool:
    """NAL units (H.264 7.3.1, H.265 7.3.1) that fill the packet and hold a picture."""
    if not prefix:
        return _START in data[:64]
    at, picture = 0, False
    while at + prefix < len(data):
        size, head = int.from_bytes(data[at : at + prefix], "big"), data[at + prefix]
        if not size or head & 0x80:
            return False
        picture |= 1 <= head & 31 <= 5 if codec == "h264" else head >> 1 < 32
        at += prefix + size
    return picture and at == len(data)


def is_progressive(data: bytes) -> bool:
    """Return whether H.264 parameter sets are there and allow whole frames only (frame_mbs_only_flag)."""
    flags = []
    for unit in _sequence_sets(data):
        try:
            flags.append(_frames_only(unit))
        except ValueError:
            return False
    return bool(flags) and all(flags)


def _sequence_sets(data: bytes) -> Iterator[bytes]:
    """H.264 sequence parameter sets in a configuration record, a length-prefixed or a byte-stream packet."""
    if data[:1] == b"\x01" and len(data) > 7:  # ISO/IEC 14496-15 5.3.3.1
        at = 6
        for _ in range(data[5] & 31):
            size = int.from_bytes(data[at : at + 2], "big")
            yield data[at + 2 : at + 2 + size]
            at += 2 + size
        return
    if data.startswith((_START, b"\x00" + _START)):
        for unit in data.split(_START):
            if unit[:1] and unit[0] & 0x9F == 7:
                yield unit
        return
    at = 0
    while at + 4 < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4] & 0x9F == 7:
            yield data[at + 4 : at + 4 + size]
        at += 4 + size


_WITH_CHROMA = {100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135}


def _frames_only(unit: bytes) -> bool:
    """frame_mbs_only_flag of a sequence parameter set (H.264 7.3.2.1.1)."""
    bits = Bits(unit.replace(b"\x00\x00\x03", b"\x00\x00")[:256], 8)
    profile = bits.take(8)
    bits.take(16)
    bits.golomb()
    if profile in _WITH_CHROMA:
        chroma = bits.golomb()
        if chroma == 3:
            bits.take(1)
        bits.golomb()
        bits.golomb()
        bits.take(1)
        if bits.take(1):
            for number in range(8 if chroma != 3 else 12):
                if bits.take(1):
                    _skip_scaling_list(bits, 16 if number < 6 else 64)
    bits.golomb()  # log2_max_frame_num_minus4
    order = bits.golomb()
    if order == 0:
        bits.golomb()
    elif order == 1:
        bits.take(1)
        bits.signed_golomb()
        bits.signed_golomb()
        for _ in range(min(bits.golomb(), 256)):
            bits.signed_golomb()
    bits.golomb()
    bits.take(1)
    bits.golomb()
    bits.golomb()
    return bool(bits.take(1))


def _skip_scaling_list(bits: Bits, count: int) -> None:
    last = following = 8
    for _ in range(count):
        if following:
            following = (last + bits.signed_golomb()) % 256
        last = following or last
