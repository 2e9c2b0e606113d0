"""Read frames of a video file by ordinal, decoded with PyAV on one thread: the reader `video`.

Ordinal i is the i-th frame that the decoder outputs in presentation order. Edit lists hide frames, and rotation is
applied. The grade of the file's index decides how frames are found (video_index.py):

- TIMED: jump to the last key frame at or before a requested frame if that saves decoding, decode on from there, and
  select frames by pts. Frames that are neither requested nor referenced are not decoded. If a requested stamp does not
  come out, the file is decoded from the start and counted. If the number of frames differs from the index, MediaError.
- COUNTED, SCANNED: decode from the start and count.

A frame that does not decode is a MediaError with the number of frames that did. A decoding error never shifts the
ordinals of other frames. If only a few frames at the end are missing, the MediaError is `EndsEarly` (ending.py). A
truncated file has the frames whose packets are present, unless its own table (MP4, MOV) shows that more than
`data.missing_share` of them are lost. After a change of resolution inside a file, frames are scaled to the size of the
first one (resize.place). The result of a read depends on the file and the ordinals only, never on earlier reads.

Opening a file and reading its packets costs as much as decoding some frames, and each clip is probed and then read. So
the last indexed file stays open with its packets in memory (unless they are large), and is not read twice.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.readers.ending import EndsEarly, is_tolerable
from datasets.readers.resize import Box, place
from datasets.readers.video_index import (
    Decoding,
    Grade,
    Index,
    Kept,
    index_file,
    open_container,
    packets,
    video_stream,
)
from utils.errors import MediaError

if TYPE_CHECKING:
    import av
    from av.video.reformatter import VideoReformatter

    from datasets.lists.records import Records
    from datasets.plan.metadata import VideoMetadata
    from datasets.readers.spec import ReaderSpec

_OPEN_INDEXES = 8  # indexes that are kept, per process
#: Largest file whose packets are kept for the read that follows its probe [bytes].
_KEPT_BYTES = 16 << 20
#: Packets or bytes between two places of a file above which a seek is cheaper than reading on.
_SEEK_PACKETS = 250
_SEEK_BYTES = 1 << 20
#: Decoders that can leave out unreferenced frames without changing any other frame or its stamp (tested).
_SKIPS_UNREFERENCED = {"h264", "hevc", "mpeg4", "mpeg2video"}


class VideoReader:
    """Read frames of video files. Keep the indexes of the last few files, and the last indexed file open."""

    def __init__(self, spec: ReaderSpec, records: Records) -> None:
        self.spec = spec
        self.records = records
        self._indexes: collections.OrderedDict[str, Index] = collections.OrderedDict()
        self._kept: tuple[str, Kept] | None = None

    def close(self) -> None:
        """Drop the indexes and close the open file."""
        self._indexes.clear()
        self._drop()

    def _drop(self) -> None:
        if self._kept:
            self._kept[1].container.close()
        self._kept = None

    def probe(self, i: int) -> VideoMetadata:
        """Return the metadata of record i; see `Reader.probe`. With offsets in the list a record is part of a file."""
        metadata = self.index(i).metadata

        start = int(self.records.starts[i])
        if metadata.frames <= start:
            raise MediaError(self.records.path(i), f"the list starts at frame {start}, but there are {metadata.frames}")
        return dataclasses.replace(metadata, frames=self.records.length_of(i, metadata.frames - start))

    def missing(self, i: int) -> int:
        """Return the number of frames at the end of record i that do not decode and are not in `probe`."""
        return self.index(i).missing

    def read(self, i: int, frames: np.ndarray, box: Box | None, size: tuple[int, int], out: np.ndarray) -> None:
        """Read frames of record i into `out` (F, h, w, 3); see `Reader.read`.

        Raises:
            EndsEarly: the video ends a few frames before the count of `probe`.
        """
        if out.shape != (len(frames), *size, 3):
            raise ValueError(f"out has shape {out.shape}, expected {(len(frames), *size, 3)}")

        shown, index = self.records.path(i), self.index(i)
        ordinals = np.asarray(frames, np.int64) + int(self.records.starts[i])
        metadata = index.metadata
        if ordinals.min() < 0 or ordinals.max() >= metadata.frames:
            raise MediaError(shown, f"frame {ordinals.max()} was requested; there are {metadata.frames}")

        rows: dict[int, list[int]] = {}  # ordinal -> rows of `out` that show it
        for row, ordinal in enumerate(ordinals.tolist()):
            rows.setdefault(ordinal, []).append(row)

        pending, scaler = set(rows), Scaler()
        for ordinal, frame in self._decode(i, index, sorted(rows)):
            # A frame may come twice: by time stamp, and again by counting.
            if ordinal not in pending:
                continue
            pending.discard(ordinal)
            first, *others = rows[ordinal]
            place(scaler.rgb(frame, shown, index.rotation), box, (metadata.height, metadata.width), out[first])
            for row in others:
                out[row] = out[first]

        if pending:
            raise MediaError(shown, f"frame {min(pending)} of {metadata.frames} does not decode")

    def use_index(self, i: int, index: Index) -> None:
        """Use an index that was made before. The caller guarantees that the file has not changed."""
        path = self.records.full_path(i)
        self._indexes.setdefault(path, index)
        self._indexes.move_to_end(path)
        if len(self._indexes) > _OPEN_INDEXES:
            self._indexes.popitem(last=False)

    def index(self, i: int) -> Index:
        """Return the packet table of record i. Raise MediaError on bad media."""
        path = self.records.full_path(i)
        if path not in self._indexes:
            # Close the previous file before another one opens: a process holds one open file.
            self._drop()
            self._indexes[path], kept = index_file(
                path, self.records.path(i), keep=_KEPT_BYTES, missing_share=self.spec.missing_share
            )
            self._kept = (path, kept) if kept else None
            if len(self._indexes) > _OPEN_INDEXES:
                self._indexes.popitem(last=False)

        self._indexes.move_to_end(path)
        return self._indexes[path]

    def _decode(self, i: int, index: Index, ordinals: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (ordinal, frame) for the requested ordinals, each at least once unless it does not decode."""
        path, shown = self.records.full_path(i), self.records.path(i)
        left = ordinals

        if index.grade is Grade.TIMED:
            kept = self._kept[1] if self._kept and self._kept[0] == path else None
            with _Demuxer(path, shown, index, kept) as demuxer:
                decoded = set()
                for ordinal, frame in demuxer.read(ordinals):
                    decoded.add(ordinal)
                    yield ordinal, frame
            left = [ordinal for ordinal in ordinals if ordinal not in decoded]

        if left:
            # A requested stamp did not come out: only counting from the start identifies the frames. Count to the end,
            # because a different number of frames means that the ordinals above were wrong.
            if index.grade is Grade.TIMED:
                self._check_total(i, index)
            yield from self._count(i, left, index.metadata.frames)

    def _count(self, i: int, ordinals: list[int], expected: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decode from the start and yield the requested ordinals by counting."""
        path, shown = self.records.full_path(i), self.records.path(i)
        ahead, decoded = set(ordinals), 0

        with open_container(path, shown) as container:
            decoding = Decoding(container, video_stream(container, shown), self.spec.missing_share)
            for ordinal, frame in enumerate(decoding):
                decoded = ordinal + 1
                if ordinal in ahead:
                    ahead.discard(ordinal)
                    yield ordinal, frame
                    if not ahead:
                        return

        raise self._too_few(i, decoded, expected, decoding.trouble)

    def _check_total(self, i: int, index: Index) -> None:
        """Raise MediaError unless a full decode gives the number of frames of a TIMED index."""
        path, shown = self.records.full_path(i), self.records.path(i)
        with open_container(path, shown) as container:
            decoding = Decoding(container, video_stream(container, shown), self.spec.missing_share)
            stamps = [frame.pts for frame in decoding]

        if len(stamps) != index.metadata.frames:
            # Only the end is missing if the stamps so far are those of the first frames.
            begins = index.pts[index.positions[: len(stamps)]].tolist() == stamps
            raise self._too_few(i, len(stamps), index.metadata.frames, decoding.trouble, only_last=begins)

    def _too_few(self, i: int, decoded: int, expected: int, trouble: str, *, only_last: bool = True) -> MediaError:
        """Return the error for a video of which fewer frames decode than its packets promise."""
        shown, start = self.records.path(i), int(self.records.starts[i])
        reason = f"only {decoded} of its {expected} frames decode" + (f" ({trouble})" if trouble else "")

        missing = expected - decoded
        if only_last and decoded > start and missing > 0 and is_tolerable(missing, expected, self.spec.missing_share):
            return EndsEarly(shown, reason, decoded - start, missing)
        return MediaError(shown, reason)


class Scaler:
    """Convert frames of any pixel format with swscale. A context keeps its colour space, so each kind needs one."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._reformatter: VideoReformatter | None = None

    def to(self, frame: av.VideoFrame, name: str, **options: Any) -> av.VideoFrame:
        """Return one frame in a different size or format. Raise MediaError if its format cannot be converted."""
        from av.error import FFmpegError
        from av.video.reformatter import VideoReformatter

        key = (frame.format.name, frame.width, frame.height, frame.colorspace, frame.color_range)
        key += (frame.color_primaries, frame.color_trc, *options.items())
        if self._reformatter is None or key != self._key:
            self._key, self._reformatter = key, VideoReformatter()

        try:
            return self._reformatter.reformat(frame, **options)
        except (FFmpegError, ValueError) as error:
            reason = f"its pixel format {frame.format.name} cannot be converted ({error})"
            raise MediaError(name, reason) from error

    def rgb(self, frame: av.VideoFrame, name: str, quarter_turns: int = 0) -> np.ndarray:
        """Return the upright (H, W, 3) uint8 RGB pixels of a decoded frame."""
        image = self.to(frame, name, format="rgb24").to_ndarray()
        return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


class _Demuxer:
    """One open file of grade TIMED, with its packets in memory, or read from the file in order."""

    def __init__(self, path: str, shown: str, index: Index, kept: Kept | None = None) -> None:
        self.path, self.shown, self.index, self.kept = path, shown, index, kept
        if kept:
            self.container, self.stream = kept.container, kept.stream
        else:
            self.container = open_container(path, shown)
            self._rewind()

    def __enter__(self) -> _Demuxer:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.kept:
            self.container.close()

    def _rewind(self) -> None:
        self.stream = video_stream(self.container, self.shown)
        self.packets = packets(self.container, self.stream)
        self.next = 0  # position of the packet that `packets` yields next

    def read(self, ordinals: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (ordinal, frame) for sorted ordinals, in the order in which they are decoded."""
        index = self.index
        ordinal_of = {int(index.pts[index.positions[ordinal]]): ordinal for ordinal in ordinals}

        for start, stop in self._runs(ordinals):
            for frame in self._run(start, stop, ordinal_of):
                if frame.pts in ordinal_of:
                    yield ordinal_of[frame.pts], frame

    def _runs(self, ordinals: list[int]) -> list[tuple[int, int]]:
        """Return the ranges of packets to decode, each from a key frame. A gap between ranges skips packets."""
        index = self.index
        keys = np.flatnonzero(index.keys)
        runs: list[tuple[int, int]] = []

        for position in index.positions[ordinals].tolist():
            before = keys[: np.searchsorted(keys, position, side="right")]
            # A picture that is shown before its key frame (open GOP) needs the previous key frame.
            before = before[index.pts[before] <= index.pts[position]]

            start = int(before[-1]) if len(before) else 0
            if runs and start < runs[-1][1]:
                runs[-1] = (runs[-1][0], max(runs[-1][1], position + 1))
            else:
                runs.append((start, position + 1))

        return runs

    def _run(self, start: int, stop: int, ordinal_of: dict[int, int]) -> Iterator[av.VideoFrame]:
        """Decode packets start..stop-1 with a reset decoder, and drain it."""
        from av.error import FFmpegError

        decoder, skips = self.stream.codec_context, None
        may_skip = self.index.codec in _SKIPS_UNREFERENCED

        try:
            for packet in self._from(start, stop):
                # Frames that are neither requested nor referenced need no decoding.
                if may_skip and skips != (packet.pts not in ordinal_of):
                    skips = packet.pts not in ordinal_of
                    decoder.skip_frame = "NONREF" if skips else "DEFAULT"
                yield from decoder.decode(packet)
            yield from decoder.decode(None)
        except FFmpegError:
            return  # `_decode` notices the missing frames, and reports them after counting
        finally:
            decoder.flush_buffers()

    def _from(self, start: int, stop: int) -> Iterator[av.Packet]:
        """Yield packets start..stop-1, or fewer if the file has changed since it was indexed."""
        index = self.index
        if self.kept:
            yield from self.kept.packets[start:stop]
            return

        self._go_to(start)
        while self.next < stop:
            packet = next(self.packets, None)
            if packet is None or (packet.pts, packet.size) != (index.pts[self.next], index.sizes[self.next]):
                return
            self.next += 1
            yield packet

    def _go_to(self, position: int) -> None:
        """Make `position` the next packet: by a seek if that saves much reading, else by reading on."""
        index = self.index
        gap = position - self.next
        if gap < 0 or gap > _SEEK_PACKETS or index.sizes[self.next : position].sum() > _SEEK_BYTES:
            self._seek(position)
        while self.next < position and next(self.packets, None) is not None:
            self.next += 1

    def _seek(self, position: int) -> None:
        """Seek to a key frame or before it. If the first packet after the seek is not in the index, reopen the file."""
        from av.error import FFmpegError

        index = self.index

        try:
            self.container.seek(int(index.dts[position]), stream=self.stream, backward=True)
            self.packets = packets(self.container, self.stream)
            first = next(self.packets, None)
        except FFmpegError:
            first = None
        # A demuxer may land anywhere. Only a packet with a unique stamp and the right size gives the position.
        landed = np.flatnonzero(index.pts == first.pts) if first is not None and first.pts is not None else []

        if first is not None and len(landed) == 1 and landed[0] <= position and index.sizes[landed[0]] == first.size:
            self.next = int(landed[0])
            self.packets = _chain(first, self.packets)
        else:
            self.container.close()
            self.container = open_container(self.path, self.shown)
            self._rewind()


def _chain(first: av.Packet, rest: Iterator[av.Packet]) -> Iterator[av.Packet]:
    yield first
    yield from rest
