"""Ask NVIDIA's driver once, at the start, which codecs and frame sizes this GPU decodes.

The call is `cuvidGetDecoderCaps` of the Video Codec SDK (nvcuvid.h). The library comes with the driver. A container has
it if its driver capabilities include `video`.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from datasets.dali.encoded import LIMITS

_LIBRARY = "libnvcuvid.so.1"
_CODECS = {"h264": 4, "hevc": 8, "vp9": 10}  # cudaVideoCodec
_CHROMA_420 = 1  # cudaVideoChromaFormat


class _Caps(ctypes.Structure):
    """The struct CUVIDDECODECAPS; the driver reads the first three fields and fills the others."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved_1", ctypes.c_uint * 3),
        ("is_supported", ctypes.c_ubyte),
        ("engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("has_histogram", ctypes.c_ubyte),
        ("counter_bits", ctypes.c_ubyte),
        ("max_bins", ctypes.c_ushort),
        ("reserved_3", ctypes.c_uint * 10),
    )


@functools.cache
def limits(device: torch.device) -> dict[str, tuple[int, int]]:
    """Return codec -> smallest and largest side of a frame [pixels] that NVDEC decodes; empty without the library."""
    with torch.cuda.device(device):
        torch.cuda.init()
        torch.cuda.current_stream().synchronize()  # makes the context current, for which the driver answers
        try:
            return asked(ctypes.CDLL(_LIBRARY))
        except OSError:
            return {}


def asked(library: ctypes.CDLL) -> dict[str, tuple[int, int]]:
    """Return codec -> smallest and largest side, within DALI's limits, as an open driver library reports them."""
    limits = {}
    for codec, (smallest, largest) in LIMITS["mixed"].items():
        caps = _Caps(codec=_CODECS[codec], chroma=_CHROMA_420)
        if library.cuvidGetDecoderCaps(ctypes.byref(caps)) == 0 and caps.is_supported:
            low = max(smallest, caps.min_width, caps.min_height)
            limits[codec] = low, min(largest, caps.max_width, caps.max_height)

    return limits
