"""Decode frames without a reader, as the lower bound that readers are compared with.

This is the shortest loop that gives the same frames, uncropped. For a video: open it, seek to the last key frame before
the first wanted frame, decode forward to the last one and convert the wanted ones to RGB. For a folder or a pack: read
and decode the files of the frames.
"""

from __future__ import annotations

import os

import simplejpeg

from datasets.lists.records import Records
from datasets.readers.frame_pack import SUFFIX, FramePack
from datasets.readers.frames import Layout, find_layout
from datasets.readers.frames import decode as decode_image

_LAYOUTS: dict[str, Layout] = {}  # by folder: listing a folder is not part of the decode


def decode(records: Records, sample: int, frames: list[int]) -> int:
    """Decode distinct frames of a record and return their number."""
    path, start = records.full_path(sample), int(records.starts[sample])  # a record may start inside its file
    ordinals = sorted({start + ordinal for ordinal in frames})

    if os.path.isdir(path):
        return _folder(path, ordinals)
    if path.endswith(SUFFIX):
        pack = FramePack(path)
        try:
            return sum(simplejpeg.decode_jpeg(data) is not None for data in pack.read(ordinals))
        finally:
            pack.close()
    return _video(path, ordinals)


def _folder(path: str, ordinals: list[int]) -> int:
    if path not in _LAYOUTS:
        layout = find_layout(os.listdir(path))
        assert layout is not None, "the reader has found frames here"
        _LAYOUTS[path] = layout

    layout = _LAYOUTS[path]
    for ordinal in ordinals:
        name = os.path.join(path, layout.template.format(layout.base + ordinal))
        with open(name, "rb") as file:
            decode_image(file.read(), name)
    return len(ordinals)


def _video(path: str, ordinals: list[int]) -> int:
    """Decode as any script with PyAV does: one seek, then forward; frames are taken by time, at the average rate."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the figures are per thread
        rate, base = stream.average_rate, stream.time_base
        if rate is None or base is None:
            return 0

        # `step` and `begin` are in units of the stream's time base.
        step = 1 / (rate * base)
        begin = stream.start_time or 0
        container.seek(int(begin + ordinals[0] * step), stream=stream, backward=True)

        left = list(ordinals)
        for frame in container.decode(stream):
            # half a frame early: time stamps are rounded
            while left and frame.pts is not None and frame.pts >= begin + (left[0] - 0.5) * step:
                frame.to_ndarray(format="rgb24")
                left.pop(0)
            if not left:
                break
    return len(ordinals)
