"""Read from a stream's bytes what its container does not show: hidden frames, fields, the colour matrix. Torch-free.

A decoder that counts decoded pictures numbers the shown frames wrongly after a frame that is never shown, and after two
fields that make one frame. The functions here find such streams from their syntax:

* VP9 (bitstream specification, version 0.6): superframes in annex B, the uncompressed header in section 6.2.
* H.264 (ITU-T H.264): the sequence parameter set in section 7.3.2.1.1; matrix coefficients in table E-5.
"""

from __future__ import annotations

import numpy as np

from datasets.readers.bitstreams import is_progressive

#: Name -> weights of red and blue in luma.
MATRICES = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "smpte240m": (0.212, 0.087),
    "bt2020": (0.2627, 0.0593),
}
#: Matrix coefficients of ITU-T H.264 table E-5 (H.273 has the same) -> name; all others are decoded as BT.601.
MATRIX_OF_TAG = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020", 10: "bt2020"}
#: Tags whose planes are not luma and colour differences: RGB, YCgCo, ICtCp and others.
WITHOUT_MATRIX = frozenset({0, 8, 11, 12, 13, 14, 15, 16, 17})
# The order of color_space in the VP9 header (section 7.2.2), as tags of H.273.
_UNKNOWN = 2
_VP9_TAGS = (_UNKNOWN, 5, 1, 6, 7, 9, _UNKNOWN, 0)
_VP9_SYNC = b"\x49\x83\x42"


def correction(name: str) -> np.ndarray:
    """Return the (3, 3) matrix from RGB that was decoded as BT.601 to the RGB of the matrix `name`."""
    return _from_differences(*MATRICES[name]) @ np.linalg.inv(_from_differences(*MATRICES["bt601"]))


def _from_differences(red: float, blue: float) -> np.ndarray:
    """Return the (3, 3) matrix from (luma, blue difference, red difference) to (R, G, B)."""
    green = 1 - red - blue
    return np.array(
        [
            [1.0, 0.0, 2 * (1 - red)],
            [1.0, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1.0, 2 * (1 - blue), 0.0],
        ]
    )


def vp9_has_hidden_frames(packet: bytes) -> bool:
    """Return True if a packet holds several frames or a hidden frame, or shows an earlier frame again."""
    if not packet:
        return True

    # The last byte of a superframe is a marker that also begins its index: 0b110, size bytes - 1, frames - 1.
    last = packet[-1]
    if last & 0xE0 == 0xC0:
        frames, width = (last & 7) + 1, (last >> 3 & 3) + 1
        size = 2 + frames * width
        if frames > 1 and len(packet) >= size and packet[-size] == last:
            return True

    shows_existing, is_shown = packet[0] >> 3 & 1, packet[0] >> 1 & 1  # of profile 0, the only one with 8 bits 4:2:0
    return bool(shows_existing) or not is_shown


def vp9_colour_tag(key_frame: bytes) -> int:
    """Return the matrix coefficients (H.273) that the header of a VP9 key frame names; 2 (unknown) if none."""
    if len(key_frame) < 5 or key_frame[1:4] != _VP9_SYNC:
        return _UNKNOWN
    return _VP9_TAGS[key_frame[4] >> 5]


def h264_may_have_fields(configuration: bytes | None) -> bool:
    """Return True unless every sequence parameter set of an avcC record promises whole frames."""
    return not configuration or configuration[0] != 1 or not is_progressive(configuration)
