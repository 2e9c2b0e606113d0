"""Turn frame ordinals, a box and a size into pixels: one interface, and one file per way of storing a video."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from datasets.readers.resize import KERNEL, Box
from datasets.readers.spec import Reader, ReaderSpec
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.lists.records import Records

__all__ = ["KERNEL", "READERS", "Box", "Reader", "ReaderSpec", "open_reader"]


def _frames(spec: ReaderSpec, records: Records) -> Reader:
    from datasets.readers.frames import FramesReader

    return FramesReader(spec, records)


def _memcached(spec: ReaderSpec, records: Records) -> Reader:
    from datasets.memcached.source import MemcachedReader

    return MemcachedReader(spec, records)


def _video(spec: ReaderSpec, records: Records) -> Reader:
    from datasets.readers.video import VideoReader

    return VideoReader(spec, records)


def _dali(spec: ReaderSpec, records: Records) -> Reader:
    from datasets.dali.reader import DaliReader

    return DaliReader(spec, records)


def _encoded(spec: ReaderSpec, records: Records) -> Reader:
    from datasets.dali.encoded import EncodedReader

    return EncodedReader(spec, records)


#: Reader name (`data.reader` in a config) -> constructor. Each imports its decoder only when it is chosen.
READERS: dict[str, Callable[[ReaderSpec, Records], Reader]] = {
    "frames": _frames,
    "memcached": _memcached,
    "video": _video,
    "dali": _dali,
    "encoded": _encoded,  # for the reader processes of `dali`; not an option of a config
}


def open_reader(spec: ReaderSpec, records: Records) -> Reader:
    """Open the reader that `spec.kind` names. Raise UserError if there is no such reader."""
    if spec.kind not in READERS:
        raise UserError(f"data.reader: there is no reader {spec.kind!r}; choose one of {', '.join(READERS)}")

    reader = READERS[spec.kind](spec, records)
    if spec.metadata is None:
        return reader

    from datasets.readers.metadata_cache import KnownMetadata, MetadataCache

    return KnownMetadata(reader, spec, records, MetadataCache(spec.metadata))
