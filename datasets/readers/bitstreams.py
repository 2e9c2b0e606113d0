"""Check packet headers, without decoding, for packets that are damaged or do not hold exactly one frame.

By the rules of its codec a packet of a file is one frame, with exceptions. MPEG-4 part 2 in AVI breaks the rule: a
"packed" file holds a P- and a B-picture in one packet and a placeholder of 1 to 8 bytes after it. H.264 may store the
two fields of a frame in two packets. VP8 and VP9 have packets that are never shown. The packet table (video_index.py)
uses this module to decide whether the number of packets is the number of frames. If it is not, the file is decoded once
to count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

#: Decoders that give one frame for each packet, unless `PacketCheck` finds an exception.
_ONE_EACH = frozenset(
    {
        "av1", "libdav1d", "libaom-av1", "h264", "hevc", "mpeg4", "vp8", "libvpx", "vp9", "libvpx-vp9", "mjpeg",
        "dnxhd", "dvvideo", "ffv1", "ffvhuff", "huffyuv", "png", "prores", "rawvideo", "utvideo", "h263", "msmpeg4",
        "msmpeg4v2",
    }
)  # fmt: skip
#: Decoders of the MPEG-4 family without their own check: a smaller packet may mean "no change" [bytes].
_SMALLEST = {"h263": 6, "msmpeg4": 6, "msmpeg4v2": 6}
_PLACEHOLDER = 8  # bytes of the longest placeholder
_P, _B = 1, 2  # vop_coding_type
_PACKED = re.compile(rb"DivX\d+(?:Build|b)\d+p")  # the name of the encoder; its last p means packed
_VOP, _START = b"\x00\x00\x01\xb6", b"\x00\x00\x01"  # start codes: of a VOP, and of any unit


class PacketCheck:
    """Check the packets of one stream, in file order.

    Args:
        codec: name of the decoder.
        extradata: its configuration record, if the container has one.
        container: names of the container format.

    Attributes:
        reads_all: True if `add` needs every packet.
        one_each: True if each packet so far gives one frame.
        countable: True if the headers determine `frames`.
    """

    def __init__(self, codec: str, extradata: bytes | None, container: set[str]) -> None:
        self.codec = codec
        self._extradata = extradata or b""
        self._vops = _Vops(self._extradata) if codec == "mpeg4" else None
        self._hides = {"vp8": _vp8_hides, "libvpx": _vp8_hides, "vp9": _vp9_hides, "libvpx-vp9": _vp9_hides}.get(codec)

        self._smallest = _SMALLEST.get(codec, 0)
        self.reads_all = bool(self._vops or self._hides or self._smallest)
        # Encoders for Video for Windows write placeholders into H.264 and shift frames.
        self.one_each = codec in _ONE_EACH and not (codec == "h264" and "avi" in container)
        self.countable = self.one_each

    def add(self, data: bytes) -> None:
        """Read the next packet."""
        if self._vops and self._vops.regular:
            self._vops.look(data)
            self.one_each = self._vops.one_each
            self.countable = self._vops.regular and not self._vops.may_repeat
        # One exception decides. The rest of the packets cannot change it.
        elif not self.countable:
            return
        elif self._hides:
            self.one_each = self.countable = not self._hides(data)
        else:
            self.one_each = self.countable = len(data) >= self._smallest

    def frames(self, packets: int) -> int:
        """Return the number of frames in `packets` packets, correct if `countable`."""
        return packets if self.one_each or not self._vops else self._vops.frames

    def allows_fields(self, first_key: bytes | None) -> bool:
        """Return True if a frame may be stored as two packets, one for each field.

        Args:
            first_key: bytes of the first key frame, for parameter sets that are not in the configuration record.
        """
        if self.codec != "h264":
            return False
        return not any(map(is_progressive, (self._extradata, first_key or b"")))

    def looks_whole(self, data: bytes) -> bool:
        """Return False if no encoder can have written a packet: zeroed, overwritten or cut off."""
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
    """The bits of a byte string from the highest to the lowest. Reading beyond the end raises ValueError."""

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
            # A damaged header could give zeros without end. H.264 needs 32 at most.
            if zeros > 32:
                raise ValueError("no Exp-Golomb number")
        return (1 << zeros) - 1 + self.take(zeros)

    def signed_golomb(self) -> int:
        """Return the next signed Exp-Golomb number (H.264 9.1.1)."""
        number = self.golomb()
        return (number + 1) // 2 if number % 2 else -(number // 2)


class _Vops:
    """Follow video object planes of MPEG-4 part 2 (ISO/IEC 14496-2 6.2.3, 6.2.5) and a decoder's response to them.

    A packed file holds a reference VOP and a B-VOP in one packet. The decoder keeps the B-VOP and decodes it in place
    of the next packet. That packet is a placeholder (a VOP that is not coded, or the one byte 0x7f), or a second B-VOP,
    which is then kept in turn. A placeholder elsewhere gives no frame. But the decoder takes its time for that of a
    reference, after which it may drop a B-VOP. If it ends a file whose frames are not reordered, the decoder repeats
    the last frame. A B-VOP that is kept when the file ends is lost.

    Everything else makes the stream irregular: more than two VOPs in a packet, a reference VOP where a placeholder is
    due, a B-VOP before two references, or B-VOPs in a stream whose header excludes reordered frames.

    Attributes:
        one_each: every packet so far has one coded VOP.
        regular: the decoder outputs `frames` frames, unless it repeats the last one.
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
        self._kept = False  # the decoder holds a B-VOP for the next packet
        self._references = 0
        self._clock_is_off = False  # a placeholder elsewhere has shifted the decoder's clock
        self._read_headers(extradata)

    def look(self, data: bytes) -> None:
        """Process one packet."""
        at = data.find(_VOP)
        self.may_repeat = False
        if at < 0 and len(data) > _PLACEHOLDER:  # damaged; a decode decides what it costs
            self.frames += 1
            return

        # Headers may precede any VOP, not only the first.
        if at > 0:
            self._read_headers(data[:at])

        try:
            self.regular &= self._kept_first(data, at) if self._kept else self._decode(data, at)
        except ValueError:
            self.regular = False
        self.one_each &= self.regular

    def _decode(self, data: bytes, at: int) -> bool:
        """Process a packet while no VOP is kept. Return False if the decoder's output is not known."""
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

        # Two VOPs in one packet: regular only as a reference and a B-VOP of a packed file.
        self.one_each = False
        self._kept = True
        second = self._header(data, following)
        only_two = data.find(_VOP, following + 4) < 0
        return self._packed and self._reorders and self._references > 1 and second == (_B, True) and only_two

    def _kept_first(self, data: bytes, at: int) -> bool:
        """Decode the kept VOP in place of a packet. Return False if the packet is not a placeholder."""
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
        """Return (vop_coding_type, vop_coded) of the VOP whose start code is at `at`."""
        if self._increment_bits is None:
            raise ValueError("no stream header")

        # The header fits into 64 bits; zeros replace bytes that are missing.
        bits = int.from_bytes(data[at + 4 : at + 12].ljust(8, b"\0"), "big")
        left = 61  # index of the bit after vop_coding_type
        while bits >> left & 1 and left > 32:  # modulo_time_base
            left -= 1

        # A marker bit, vop_time_increment, another marker bit.
        first, left = left - 1, left - 2 - self._increment_bits
        if not (bits >> first & 1 and bits >> left & 1):
            raise ValueError("a marker bit is missing")

        return bits >> 62, bool(bits >> left - 1 & 1)

    def _read_headers(self, data: bytes) -> None:
        """Read the clock and the reordering from a video object layer, and "packed" from the encoder's name."""
        self._packed |= _PACKED.search(data) is not None
        at = data.find(_START)
        while 0 <= at < len(data) - 4:
            if 0x20 <= data[at + 3] <= 0x2F:  # video_object_layer_start_code
                try:
                    self._increment_bits, self._reorders = _layer(Bits(data[at + 4 : at + 64]))
                except ValueError:
                    self._increment_bits = None
            at = data.find(_START, at + 3)


def _layer(bits: Bits) -> tuple[int, bool]:
    """Return (bits of vop_time_increment, True if frames are reordered) of a video object layer header."""
    bits.take(9)  # random_accessible_vol, video_object_type_indication

    version = 1
    if bits.take(1):  # is_object_layer_identifier
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

    shape = bits.take(2)  # video_object_layer_shape, 0 = rectangular
    if shape or version > 5:
        raise ValueError("not a rectangular picture")
    if not bits.take(1):
        raise ValueError("a marker bit is missing")

    # vop_time_increment_resolution: an increment is smaller than it.
    return max(1, (bits.take(16) - 1).bit_length()), reorders


def _vp8_hides(data: bytes) -> bool:
    """Return True if a VP8 frame is not shown (RFC 6386 section 9.1: bit 4 of the first byte is show_frame)."""
    return not data[0] & 0x10


def _vp9_hides(data: bytes) -> bool:
    """Return True if a VP9 frame is hidden (bitstream specification 6.2: show_existing_frame and show_frame are 0).

    A superframe (last byte 110xxxxx, annex B) bundles hidden frames with the frame that is shown.
    """
    if data[-1] & 0xE0 == 0xC0:
        return False

    bits, position = data[0], 4  # frame_marker 2 bits, profile 2 bits
    if bits & 0x30 == 0x30:  # profile 3 has an additional reserved bit
        position = 5
    show_existing = bits >> (7 - position) & 1
    show_frame = bits >> (5 - position) & 1
    return not (show_existing or show_frame)


def _vp8_fits(data: bytes) -> bool:
    # The version must be 0 to 3, and the first partition must fit (RFC 6386 section 9.1).
    if len(data) < 3 or data[0] >> 1 & 7 > 3:
        return False
    if int.from_bytes(data[:3], "little") >> 5 > len(data):
        return False
    # Bit 0 of the first byte is 0 for key frames, which have a start code.
    return bool(data[0] & 1) or data[3:6] == b"\x9d\x01\x2a"


def _vp9_fits(data: bytes) -> bool:
    # frame_marker
    return data[0] >> 6 == 2


def _jpeg_fits(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _obus_fit(data: bytes) -> bool:
    """Return True if open bitstream units (AV1 5.3) have sizes that end where the packet ends."""
    at = 0
    while at < len(data):
        head = data[at]
        if head & 0x81:  # forbidden and reserved bit
            return False

        at += 2 if head & 4 else 1
        if not head & 2:  # no size: the last unit fills the packet
            return True

        # leb128: 7 bits per byte, the lowest first.
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
    """Return the bytes of the length in front of each NAL unit, or 0 if start codes separate the units."""
    # lengthSizeMinusOne of avcC and hvcC (ISO/IEC 14496-15).
    at = {"h264": 4, "hevc": 21}[codec]
    return (extradata[at] & 3) + 1 if len(extradata) > at and extradata[0] == 1 else 0


def _nals_fit(data: bytes, codec: str, prefix: int) -> bool:
    """Return True if NAL units (H.264 7.3.1, H.265 7.3.1) fill the packet and one of them holds a picture."""
    if not prefix:
        return _START in data[:64]

    at, picture = 0, False
    while at + prefix < len(data):
        size, head = int.from_bytes(data[at : at + prefix], "big"), data[at + prefix]
        if not size or head & 0x80:  # forbidden_zero_bit
            return False
        # nal_unit_type of a picture: 1 to 5 in H.264, below 32 in H.265.
        picture |= 1 <= head & 31 <= 5 if codec == "h264" else head >> 1 < 32
        at += prefix + size

    return picture and at == len(data)


def is_progressive(data: bytes) -> bool:
    """Return True if there are H.264 parameter sets, and all of them allow whole frames only (frame_mbs_only_flag)."""
    flags = []
    for unit in _sequence_sets(data):
        try:
            flags.append(_frames_only(unit))
        except ValueError:
            return False
    return bool(flags) and all(flags)


def _sequence_sets(data: bytes) -> Iterator[bytes]:
    """Yield the H.264 sequence parameter sets of a configuration record, or of a packet of either framing."""
    if data[:1] == b"\x01" and len(data) > 7:  # ISO/IEC 14496-15 5.3.3.1
        at = 6
        for _ in range(data[5] & 31):
            size = int.from_bytes(data[at : at + 2], "big")
            yield data[at + 2 : at + 2 + size]
            at += 2 + size
        return

    if data.startswith((_START, b"\x00" + _START)):  # a byte stream: start codes
        for unit in data.split(_START):
            if unit[:1] and unit[0] & 0x9F == 7:  # nal_unit_type 7, forbidden_zero_bit 0
                yield unit
        return

    # Units with a length of 4 bytes in front.
    at = 0
    while at + 4 < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4] & 0x9F == 7:
            yield data[at + 4 : at + 4 + size]
        at += 4 + size


_WITH_CHROMA = {100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135}  # profiles with chroma_format_idc


def _frames_only(unit: bytes) -> bool:
    """Return frame_mbs_only_flag of a sequence parameter set (H.264 7.3.2.1.1)."""
    # Without emulation prevention bytes; 8 skips the NAL unit header. 256 bytes are more than the flag needs.
    bits = Bits(unit.replace(b"\x00\x00\x03", b"\x00\x00")[:256], 8)
    profile = bits.take(8)
    bits.take(16)  # constraint flags, level_idc
    bits.golomb()  # seq_parameter_set_id

    if profile in _WITH_CHROMA:
        chroma = bits.golomb()
        if chroma == 3:
            bits.take(1)  # separate_colour_plane_flag
        bits.golomb()  # bit_depth_luma_minus8
        bits.golomb()  # bit_depth_chroma_minus8
        bits.take(1)  # qpprime_y_zero_transform_bypass_flag
        if bits.take(1):  # seq_scaling_matrix_present_flag
            for number in range(8 if chroma != 3 else 12):
                if bits.take(1):
                    _skip_scaling_list(bits, 16 if number < 6 else 64)

    bits.golomb()  # log2_max_frame_num_minus4
    order = bits.golomb()  # pic_order_cnt_type
    if order == 0:
        bits.golomb()  # log2_max_pic_order_cnt_lsb_minus4
    elif order == 1:
        bits.take(1)  # delta_pic_order_always_zero_flag
        bits.signed_golomb()  # offset_for_non_ref_pic
        bits.signed_golomb()  # offset_for_top_to_bottom_field
        for _ in range(min(bits.golomb(), 256)):
            bits.signed_golomb()

    bits.golomb()  # max_num_ref_frames
    bits.take(1)  # gaps_in_frame_num_value_allowed_flag
    bits.golomb()  # pic_width_in_mbs_minus1
    bits.golomb()  # pic_height_in_map_units_minus1
    return bool(bits.take(1))


def _skip_scaling_list(bits: Bits, count: int) -> None:
    # H.264 7.3.2.1.1.1: a next scale of 0 ends the list; the rest repeats the last value.
    last = following = 8
    for _ in range(count):
        if following:
            following = (last + bits.signed_golomb()) % 256
        last = following or last
