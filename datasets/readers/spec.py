"""Which reader, and what every reader does."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from datasets.plan.facts import Facts
    from datasets.readers.resize import Box


@dataclasses.dataclass(frozen=True)
class ReaderSpec:
    """Which reader, and how its files are named; plain values, so that it travels to reader processes.

    Attributes:
        kind: a key of `datasets.readers.READERS`.
        missing_share: largest share of the frames of a video that may be missing at its end; beyond it the video is
            bad.
        template: name of a frame file as a format string, for example "img_{:05d}.jpg"; None = found by listing.
        frame_base: number of the first frame file, 0 or 1; None = found by listing.
        fps: frame rate of frame folders, which do not state one [frames/s].
        memcached: of the reader of that name: servers, timeout_ms, connect_timeout_ms, secret_file, namespace.
        facts: a scan's facts.bin, asked before a file is probed; None = none.
        decoder: of the reader `dali`: what the bytes are for, "cpu" or "mixed" (a GPU).
        limits: of the reader `dali`: codec -> smallest and largest side that this GPU decodes [pixels]; None = those of
            DALI.
    """

    kind: str
    _: dataclasses.KW_ONLY
    missing_share: float
    template: str | None = None
    frame_base: int | None = None
    fps: float = 30.0
    memcached: dict[str, Any] | None = None
    facts: str | None = None
    decoder: str = "cpu"
    limits: dict[str, tuple[int, int]] | None = None


class Reader(Protocol):
    """What every reader does. Answers depend on the record and the arguments only, never on what was read before."""

    def probe(self, i: int) -> Facts:
        """Facts of record i (frames, height, width after rotation, fps); MediaError on bad media."""
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
        """Give back files and memory."""
        ...
