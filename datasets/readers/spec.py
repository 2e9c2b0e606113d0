"""Define the choice of a reader, and the interface of all readers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from datasets.plan.metadata import VideoMetadata
    from datasets.readers.resize import Box


@dataclasses.dataclass(frozen=True)
class ReaderSpec:
    """Which reader to use, and how its files are named. Plain values, so that it can be sent to reader processes.

    Attributes:
        kind: a key of `datasets.readers.READERS`.
        missing_share: largest share of a video's frames that may be missing at its end. Above it the video is bad.
        template: name of a frame file as a format string, for example "img_{:05d}.jpg"; None = found by listing.
        frame_base: number of the first frame file, 0 or 1; None = found by listing.
        fps: frame rate of frame folders, whose files do not state one [frames/s].
        memcached: for that reader: servers, timeout_ms, connect_timeout_ms, secret_file, namespace.
        metadata: the metadata.bin of a scan, used instead of probing a file; None = not used.
        decoder: for the reader `dali`: the decoder of the bytes, "cpu" or "mixed" (a GPU).
        limits: for the reader `dali`: codec -> smallest and largest side that this GPU decodes [pixels]; None = those
            of DALI.
    """

    kind: str
    _: dataclasses.KW_ONLY
    missing_share: float
    template: str | None = None
    frame_base: int | None = None
    fps: float = 30.0
    memcached: dict[str, Any] | None = None
    metadata: str | None = None
    decoder: str = "cpu"
    limits: dict[str, tuple[int, int]] | None = None


class Reader(Protocol):
    """The interface of all readers. Results depend on the record and the arguments only, never on earlier reads."""

    def probe(self, i: int) -> VideoMetadata:
        """Return metadata of record i (frames, height, width after rotation, fps). Raise MediaError for bad ones."""
        ...

    def read(self, i: int, frames: np.ndarray, box: Box | None, size: tuple[int, int], out: np.ndarray) -> None:
        """Read frames of record i into `out`.

        Args:
            i: index of the record.
            frames: (F,) integer ordinals in presentation order, 0-based; any order, repeats allowed.
            box: (x1, y1, x2, y2) in pixels of the upright frame, or None for the whole frame.
            size: (h, w) of the result.
            out: (F, h, w, 3) uint8 RGB, written in place.

        Raises:
            MediaError: a frame does not exist or does not decode.
        """
        ...

    def close(self) -> None:
        """Close files and release memory."""
        ...
