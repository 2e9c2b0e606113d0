"""Examine one file of a list: the work of a scan's reader processes.

Metadata and decoding are those of the readers that training uses. A file that a scan calls readable can be used
for training, and one that it calls bad would have been a bad sample. Nothing is written.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from datasets.readers import READERS
from datasets.readers.ending import on_what_decodes
from datasets.readers.metadata_cache import Stamp, family_of, stamp_of
from datasets.readers.spec import Reader, ReaderSpec
from utils import files
from utils.errors import MediaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets.lists.records import Records
    from datasets.loading.messages import Look
    from datasets.plan.metadata import VideoMetadata

#: How much of a file is decoded; each level includes those before it.
LEVELS = ("header", "ends", "all")
_SMALL = (32, 32)  # frames are compared in this size, which every decoder and resize has to deliver completely
_LOW_CONTRAST = 2.0  # pictures with less contrast (standard deviation, 0..255) look alike without being the same
_BLOCK = 1 << 20  # bytes read at a time
_AT_ONCE = 64  # frame files whose bytes are held at a time
_PACK = ".fsh"
#: A rate is variable if a gap between frames differs from the median by more than this share and by two ticks.
_VFR_SHARE, _VFR_TICKS = 0.2, 2


class Examiner:
    """Answer a scan's requests about the records of one list.

    Args:
        spec: naming of frame folders; the path decides on the reader.
        records: the list, with frame counts of -1, so that readers count the frames themselves.
    """

    def __init__(self, spec: ReaderSpec, records: Records) -> None:
        self.spec = spec
        self.records = records
        self._readers: dict[str, Reader] = {}

    def answer(self, task: Look) -> files.Row:
        """Do one task.

        Returns:
            {"same": True} if the file is unchanged; {"digest"} of its bytes; else the result of `look`.
        """
        path, known = self.records.full_path(task.sample), task.known

        if task.what == "digest":
            return {"digest": _digest(path, task.names)}
        if known is not None and stamp_of(path, known.probe_file) == known:
            return {"same": True}
        return self.look(task.sample, task.what)

    def look(self, i: int, level: str) -> files.Row:
        """Return all metadata of record i as plain values; `bad` is the reason why it cannot be read, or "".

        Args:
            i: index of the record.
            level: one of `LEVELS`.
        """
        path, shown = self.records.full_path(i), self.records.path(i)
        # The stamp is taken first: if it differs at the end, it may be of two files.
        row: files.Row = {"bad": "", "notes": [], "stamp": stamp_of(path), "level": level}
        if row["stamp"] is None:
            return row | {"bad": _why_not_there(path), "again": True}

        family = family_of(path)
        row["kind"] = _kind(path, family)

        try:
            reader = self._reader(family)
            metadata = reader.probe(i)
            row |= {
                "frames": metadata.frames,
                "height": metadata.height,
                "width": metadata.width,
                "fps": metadata.fps,
            }
            if family == "video":
                index = reader.index(i)  # pyright: ignore[reportAttributeAccessIssue]
                row |= {"grade": index.grade.value, "turns": index.rotation, "decoder": index.codec}
                row |= {"missing": index.missing, "shorter": index.missing}
                row |= describe(path, shown, index.metadata.frames)
            elif row["kind"] == "folder":
                first = reader.first_file(i)  # pyright: ignore[reportAttributeAccessIssue]
                row |= _folder(path, os.path.basename(first), int(self.records.starts[i]) + metadata.frames)
            if level != "header":
                row |= self._decode(i, family, whole=level == "all")
        except MediaError as error:
            # The metadata found before the error stays in `row`: the metadata cache takes them.
            # The path of the error shows which frame of a folder it is about; a decoder's message may lack it.
            inside = "" if error.path in (shown, path) else f"{os.path.basename(error.path)}: "
            row["bad"] = inside + error.reason

        if stamp_of(path, (row["stamp"] or Stamp(0, 0)).probe_file) != row["stamp"]:
            return {"bad": "the file changed while it was examined", "again": True, "notes": []}
        return row

    def _reader(self, family: str) -> Reader:
        if family not in self._readers:
            self._readers[family] = READERS[family](self.spec, self.records)
        return self._readers[family]

    def _decode(self, i: int, family: str, *, whole: bool) -> files.Row:
        """Decode the first, middle and last frame, or all frames. Return a fingerprint of these three pictures.

        A video that ends early has "probed", the frames that `probe` promises, besides the "frames" that decode.
        """
        reader = self._reader(family)
        row, missing = on_what_decodes(reader, i, lambda reader: self._examine(reader, i, family, whole))
        if row["frames"] < (probed := reader.probe(i).frames):
            row |= {"probed": probed, "shorter": missing}
        return row

    def _examine(self, reader: Reader, i: int, family: str, whole: bool) -> files.Row:
        metadata: VideoMetadata = reader.probe(i)
        ends = sorted({0, metadata.frames // 2, metadata.frames - 1})

        pictures = np.empty((len(ends), *_SMALL, 3), np.uint8)
        if whole:
            # All frames go into the same row, so an hour of video takes no more memory than one frame. A video is read
            # in one go: if frames are found by counting, each piece would be decoded from the start. Frame folders
            # are read in pieces, since their reader holds the bytes of all requested files.
            step = metadata.frames if family == "video" else _AT_ONCE
            for first in range(0, metadata.frames, step):
                piece = np.arange(first, min(first + step, metadata.frames))
                # A stride of 0 for the axis of frames: (n, 32, 32, 3) in the memory of one picture.
                rows = np.lib.stride_tricks.as_strided(pictures, (len(piece), *_SMALL, 3), (0, *pictures.strides[1:]))
                reader.read(i, piece, None, _SMALL, rows)

        reader.read(i, np.array(ends), None, _SMALL, pictures)

        # Black or plain pictures are no evidence that two videos are the same.
        if float(pictures.std(axis=(1, 2)).max()) < _LOW_CONTRAST:
            return {"frames": metadata.frames, "pictures": ""}
        text = f"{metadata.frames} {metadata.width}x{metadata.height} ".encode() + pictures.tobytes()
        return {"frames": metadata.frames, "pictures": xxhash.xxh3_128_hexdigest(text)}


def _why_not_there(path: str) -> str:
    try:
        # The file may have appeared again since the reader failed.
        os.stat(path)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "it was not there a moment ago"


def _kind(path: str, family: str) -> str:
    if family == "video":
        return "video"
    return "folder" if os.path.isdir(path) else "pack" if path.lower().endswith(_PACK) else "image"


def describe(path: str, shown: str, frames: int) -> files.Row:
    """Return codec, format, rate and claims of a video file's header, and notes if they contradict the real frames.

    Args:
        path: the file on disk.
        shown: the path as the list writes it.
        frames: real number of frames.

    Raises:
        MediaError: the file cannot be opened.
    """
    from datasets.readers.video_index import open_container, packets, video_stream

    with open_container(path, shown) as container:
        stream = video_stream(container, shown)
        context = stream.codec_context

        stamps: list[int] = []
        keys = damaged = 0
        # Packets are only read, not decoded, so this is as fast as the disk.
        for packet in packets(container, stream):
            keys += packet.is_keyframe
            damaged += packet.is_corrupt
            if packet.pts is not None and not packet.is_discard:
                stamps.append(packet.pts)

        row: files.Row = {
            "format": container.format.name,
            "codec": context.name,
            "pixels": context.pix_fmt or "",
            "declared": int(stream.frames or 0),
            "audio": bool(container.streams.audio),
            "keys": keys,
            "vfr": is_variable(stamps),
        }

    notes = []
    if row["declared"] and row["declared"] != frames:
        notes.append(f"its header declares {row['declared']} frames, but there are {frames}")
    if damaged:
        notes.append(f"{damaged} of its packets are marked as damaged")
    return row | {"notes": notes}


def is_variable(stamps: list[int]) -> bool | None:
    """Return True if frames come at a variable rate; None if the stamps are too few, or not distinct.

    Args:
        stamps: presentation times of the frames in ticks, in any order.
    """
    times = np.unique(np.array(stamps, np.int64))
    if len(times) < 3 or len(times) < len(stamps):
        return None

    gaps = np.diff(times)
    # Time stamps are rounded to ticks: a gap of 33 or 34 ms is not a variable rate.
    usual = float(np.median(gaps))
    return bool(np.abs(gaps - usual).max() > max(_VFR_TICKS, _VFR_SHARE * usual))


def _folder(path: str, first: str, frames: int) -> files.Row:
    """Return the stamp of a frame folder with its first file, and note numbered files that lie behind a gap."""
    stem, suffix = os.path.splitext(first)
    prefix = stem.rstrip("0123456789")
    # All names that differ from the first file in the number only.
    same = [name for name in os.listdir(path) if name.startswith(prefix) and name.endswith(suffix)]
    numbered = sum(os.path.splitext(name)[0][len(prefix) :].isdigit() for name in same)

    notes = []
    if numbered > frames:
        notes.append(f"{numbered} numbered files, only {frames} without a gap")
    return {"stamp": stamp_of(path, first), "first": first, "files": numbered, "notes": notes}


def _digest(path: str, names: Sequence[str]) -> str:
    """Return the xxh3 hash of the bytes of a file, or of some files of a folder; "" if it cannot be read."""
    digest = xxhash.xxh3_128()

    try:
        for file in [os.path.join(path, name) for name in names] or [path]:
            with open(file, "rb") as f:
                while block := f.read(_BLOCK):
                    digest.update(block)
    except OSError:
        return ""

    return digest.hexdigest()
