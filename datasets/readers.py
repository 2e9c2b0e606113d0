"""Readers: from frame ordinals, a box and a size to pixels. One interface, one file per way of storing a video."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from datasets.resize import KERNEL, Box
from utils.faults import UserError

if TYPE_CHECKING:
    from datasets.plan import Facts
    from datasets.records import Records

__all__ = ["KERNEL", "READERS", "Box", "Reader", "ReaderSpec", "open_reader"]


@dataclasses.dataclass(frozen=True)
class ReaderSpec:
    """Which reader, and how its files are named; plain values, so that it travels to worker processes as JSON.

    Attributes:
        kind: a key of `READERS`.
        template: name of a frame file as a format string, for example "img_{:05d}.jpg"; None = found by listing.
        frame_base: number of the first frame file, 0 or 1; None = found by listing.
        fps: frame rate of frame folders, which do not state one [frames/s].
        memcached: of the reader of that name: servers, timeout_ms, connect_timeout_ms, secret_file, namespace.
        facts: a scan's facts.bin, asked before a file is probed; None = none.
        decoder: of the reader `dali`: what the bytes are for, "cpu" or "mixed" (a GPU).
    """

    kind: str
    template: str | None = None
    frame_base: int | None = None
    fps: float = 30.0
    memcached: dict[str, Any] | None = None
    facts: str | None = None
    decoder: str = "cpu"

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ReaderSpec:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


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


def _frames(spec: ReaderSpec, records: Records) -> Reader:
    from datasets.frames import FramesReader

    return FramesReader(spec, records)


def _memcached(spec: ReaderSpec, records: Records) -> Reader:
    from datasets.memcached_source import MemcachedReader

    return MemcachedReader(spec, records)


def _video(spec: ReaderSpec, records: Records) -> Reader:
    from datasets.video import VideoReader

    return VideoReader(spec, records)


def _dali(spec: ReaderSpec, records: Records) -> Reader:
    from datasets.dali_reader import DaliReader

    return DaliReader(spec, records)


def _encoded(spec: ReaderSpec, records: Records) -> Reader:
    from datasets.encoded import EncodedReader

    return EncodedReader(spec, records)


#: Reader name (`data.reader` in a config) -> constructor; each imports its decoder only when it is chosen.
READERS: dict[str, Any] = {
    "frames": _frames,
    "memcached": _memcached,
    "video": _video,
    "dali": _dali,
    "encoded": _encoded,  # what the reader processes of `dali` do; no choice of a config
}


def open_reader(spec: ReaderSpec, records: Records) -> Reader:
    """Open the reader that `spec.kind` names; UserError if there is none of that name."""
    if spec.kind not in READERS:
        raise UserError(f"data.reader: there is no reader {spec.kind!r}; choose one of {', '.join(READERS)}")
    reader = READERS[spec.kind](spec, records)
    if spec.facts is None:
        return reader
    from datasets.facts_cache import FactsCache, KnownFacts

    return KnownFacts(reader, spec, records, FactsCache(spec.facts))
