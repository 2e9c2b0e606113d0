"""The syntax that the reader `dali` looks at, on streams that are cut off or random."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.dali import bitstream


def configuration(options: dict[str, str], width: int = 96, pix_fmt: str = "yuv420p") -> bytes:
    """The avcC record of an H.264 file."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, 96, pix_fmt
        image = np.zeros((96, width, 3), np.uint8)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)))
        output.mux(stream.encode(None))
    with av.open(io.BytesIO(file.getvalue())) as container:
        return bytes(container.streams.video[0].codec_context.extradata or b"")


@pytest.mark.parametrize("profile", ["baseline", "main", "high", "high10", "high422", "high444"])
@pytest.mark.parametrize("interlaced", [False, True])
def test_fields_are_recognised_in_every_profile(profile: str, interlaced: bool) -> None:
    if profile == "baseline" and interlaced:
        pytest.skip("has no fields")
    formats = {"high10": "yuv420p10le", "high422": "yuv422p", "high444": "yuv444p"}
    options = {"profile": profile}
    options |= {"x264-params": "interlaced=1"} if interlaced else {}
    data = configuration(options, pix_fmt=formats.get(profile, "yuv420p"))
    assert bitstream.h264_may_have_fields(data) is interlaced


def test_scaling_lists_are_passed_over() -> None:
    data = configuration({"profile": "high", "x264-params": "cqm=jvt"})
    assert bitstream.h264_may_have_fields(data) is False


def test_a_set_that_is_cut_off_is_not_trusted() -> None:
    data = configuration({"profile": "main"})
    size = int.from_bytes(data[6:8], "big")
    for kept in range(5):
        cut = data[:6] + kept.to_bytes(2, "big") + data[8 : 8 + kept]
        assert bitstream.h264_may_have_fields(cut)
    assert size > 5
    assert bitstream.h264_may_have_fields(None)
    assert bitstream.h264_may_have_fields(b"")
    assert bitstream.h264_may_have_fields(b"\x00\x00\x00\x01\x67")  # Annex B, as in a transport stream


@given(st.binary(max_size=64))
def test_random_bytes_never_raise(data: bytes) -> None:
    bitstream.h264_may_have_fields(b"\x01" + data)
    bitstream.h264_may_have_fields(data)
    bitstream.vp9_has_hidden_frames(data)
    assert bitstream.vp9_colour_tag(data) in {0, 1, 2, 5, 6, 7, 9}


def test_a_last_byte_like_a_marker_is_no_superframe_by_itself() -> None:
    shown = bytes([0b10000010])
    assert not bitstream.vp9_has_hidden_frames(shown + b"\x00" * 20 + b"\xc1")  # the index would begin with 0xc1 too
    marker = b"\xc1"
    assert bitstream.vp9_has_hidden_frames(shown + b"\x00" * 20 + marker + b"\x0a\x0b" + marker)
    assert bitstream.vp9_has_hidden_frames(bytes([0b10001000]))  # shows an earlier frame again
    assert bitstream.vp9_has_hidden_frames(bytes([0b10000000]) + b"\x00" * 8)  # is not shown
