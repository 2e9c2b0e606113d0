"""Treat a video whose last frames do not decode as a shorter video, and plan it on the frames that decode.

The number of frames comes from headers if that is safe, because a decode costs as much as a clip. So a reader may
find out during a read that the last frames are missing. It raises `EndsEarly`, and `on_what_decodes` repeats the work,
plan included, with the frames that decode. The outcome depends on the file and the plan only. It does not depend on
earlier reads, on other processes, or on a metadata cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from utils.errors import MediaError

if TYPE_CHECKING:
    from datasets.plan.metadata import VideoMetadata
    from datasets.readers.spec import Reader

_Result = TypeVar("_Result")


class EndsEarly(MediaError):
    """Only the last frames of a video do not decode, and no more than `data.missing_share` allows.

    Args:
        path, reason: as in `MediaError`.
        frames: frames of the record that decode, at least 1.
        missing: frames at its end that do not decode.
    """

    def __init__(self, path: str, reason: str, frames: int, missing: int) -> None:
        super().__init__(path, reason)
        self.frames = frames
        self.missing = missing


class UpTo:
    """A reader whose record has `frames` frames. It passes everything else to the reader inside."""

    def __init__(self, reader: Reader, frames: int) -> None:
        self._reader, self.read, self.close = reader, reader.read, reader.close
        self._frames = frames

    def probe(self, i: int) -> VideoMetadata:
        """See `Reader.probe`."""
        metadata = self._reader.probe(i)
        return dataclasses.replace(metadata, frames=min(metadata.frames, self._frames))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def is_tolerable(missing: int, expected: int, share: float) -> bool:
    """Return True if a video that lacks its last frames is a shorter video, False if it is a bad one.

    Args:
        missing: frames at its end that do not decode.
        expected: frames that its packets hold.
        share: `data.missing_share`.
    """
    return 0 <= missing < expected and missing <= share * expected


def on_what_decodes(reader: Reader, i: int, work: Callable[[Reader], _Result]) -> tuple[_Result, int]:
    """Do some work with record i on the frames that decode: plan it and read it.

    Args:
        reader: of the record.
        i: its index.
        work: takes a reader, probes it, and reads. It runs twice if the video ends early.

    Returns:
        (what `work` returned, number of frames at the end of the video that do not decode).

    Raises:
        MediaError: the video cannot be read.
    """
    try:
        result = work(reader)
    except EndsEarly as end:
        return work(UpTo(reader, end.frames)), end.missing
    missing = getattr(reader, "missing", None)
    return result, missing(i) if missing else 0
