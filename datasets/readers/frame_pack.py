"""Store the frames of one video in one file, `NAME.fsh`: one open and a few reads instead of a file per frame.

Layout, all numbers little-endian::

    magic      8 bytes, "ZOEFSH1" and a line feed
    frames     the encoded images one after another
    table      offsets uint64 (N + 1), then xxh3_64 of each frame (seed = its ordinal) uint64 (N)
    header     JSON: template, base, frames, height, width, fps, source, settings
    trailer    length of the header uint32, N uint32, xxh3_64 of table and header uint64, the magic again

The table is at the end, so that a video of any length is written with little memory. A file that was cut off anywhere
has no trailer and is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import stat
import string
import struct
from collections.abc import Sequence

import numpy as np
import xxhash

from utils import files
from utils.errors import MediaError

SUFFIX = ".fsh"
#: Names of frames: one number in decimal, no folders.
TEMPLATE = re.compile(r"(?:[^{}/]|\{\{|\}\})*\{:(?:0\d)?d\}(?:[^{}/]|\{\{|\}\})*")
_MAGIC = b"ZOEFSH1\n"
_TRAILER = struct.Struct("<IIQ8s")
#: Read from the end of a file at once: table and header of about 900 frames.
_TAIL_BYTES = 1 << 14
_MOST_HEADER_BYTES = 1 << 20  # a damaged trailer must not make a reader allocate gigabytes


@dataclasses.dataclass(frozen=True)
class Description:
    """The metadata that the header of a pack states.

    Attributes:
        template, base: names of its frames: `template.format(base + ordinal)`.
        frames: number of frames, N.
        height, width: size of the frames [pixels].
        fps: frame rate of the source video [frames/s]; 0 = unknown.
    """

    template: str
    base: int
    frames: int
    height: int
    width: int
    fps: float


class PackWriter:
    """Write one pack. Its name does not exist before `close`.

    Args:
        path: final path, ends with `SUFFIX`.
        template, base: names of the frames, as in a folder.
        height, width: size of every frame [pixels].
        fps: frame rate of the video, 0 = unknown.
        info: plain values to keep in the header (source, settings).
    """

    def __init__(
        self,
        path: str,
        *,
        template: str,
        base: int,
        height: int,
        width: int,
        fps: float = 0.0,
        info: files.Row | None = None,
    ) -> None:
        self.path = path
        self._header = {"template": template, "base": base, "height": height, "width": width, "fps": fps}
        self._header |= info or {}
        self._tmp = f"{path}.tmp-{os.getpid()}"
        self._file = open(self._tmp, "wb")  # noqa: SIM115  closed by close() or abandon()
        self._file.write(_MAGIC)
        self._offsets = [len(_MAGIC)]
        self._sums: list[int] = []

    def add(self, data: bytes) -> None:
        """Append the next frame."""
        self._file.write(data)
        self._sums.append(xxhash.xxh3_64_intdigest(data, len(self._sums)))
        self._offsets.append(self._offsets[-1] + len(data))

    def close(self) -> None:
        """Finish the file, flush it to disk and rename it to its final name."""
        header = json.dumps(self._header | {"frames": len(self._sums)}).encode()
        tail = np.array([*self._offsets, *self._sums], "<u8").tobytes() + header
        trailer = _TRAILER.pack(len(header), len(self._sums), xxhash.xxh3_64_intdigest(tail), _MAGIC)

        self._file.write(tail + trailer)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._tmp, self.path)

    def abandon(self) -> None:
        """Remove the unfinished file."""
        self._file.close()
        if os.path.exists(self._tmp):
            os.unlink(self._tmp)


class FramePack:
    """An open pack. It reads by position only, so forked processes may share it.

    Args:
        path: the file.

    Raises:
        MediaError: it is not a whole pack.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a FIFO returns at once. It is refused later, as it is not a regular file.
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise MediaError(path, error.strerror or str(error)) from error

        try:
            self._read_tail()
        except MediaError:
            self.close()
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            self.close()
            raise MediaError(path, f"the header of the pack is damaged ({error})") from error

    def _read_tail(self) -> None:
        info = os.fstat(self._file)
        if not stat.S_ISREG(info.st_mode):
            raise MediaError(self.path, "it is not a regular file")
        size = info.st_size

        tail = os.pread(self._file, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        if len(tail) < _TRAILER.size or not tail.endswith(_MAGIC):
            raise MediaError(self.path, "it is not a whole pack: its end is missing; dump this video again")

        length, count, digest, _ = _TRAILER.unpack_from(tail, len(tail) - _TRAILER.size)
        needed = 8 * (2 * count + 1) + length
        if length > _MOST_HEADER_BYTES or needed + _TRAILER.size + len(_MAGIC) > size:
            raise MediaError(self.path, "the trailer of the pack is damaged; dump this video again")
        if needed + _TRAILER.size > len(tail):
            tail = self._at(size - needed - _TRAILER.size, needed + _TRAILER.size)

        table = memoryview(tail)[len(tail) - _TRAILER.size - needed : len(tail) - _TRAILER.size]
        if xxhash.xxh3_64_intdigest(table) != digest:
            raise MediaError(self.path, "the table of the pack is damaged; dump this video again")

        self._offsets: list[int] = np.frombuffer(table, "<u8", count + 1).tolist()
        self._sums = np.frombuffer(table, "<u8", count, 8 * (count + 1))

        # The checksum proves that the table is as written. It does not prove that the writer was correct.
        table_at = size - needed - _TRAILER.size
        if self._offsets[0] < len(_MAGIC) or self._offsets[-1] > table_at or self._offsets != sorted(self._offsets):
            raise MediaError(
                self.path, "the table of the pack points to bytes that are not frames; dump this video again"
            )

        header = json.loads(bytes(table[8 * (2 * count + 1) :]))
        self.frames = count
        self.info: files.Row = header
        self.description = Description(
            template=str(header["template"]),
            base=int(header["base"]),
            frames=count,
            height=int(header["height"]),
            width=int(header["width"]),
            fps=float(header["fps"]),
        )

        about = self.description
        if min(about.height, about.width) < 1 or not (math.isfinite(about.fps) and about.fps >= 0):
            reason = f"its header says {about.width}x{about.height} at {about.fps:g} frames/s; dump this video again"
            raise MediaError(self.path, reason)
        self._prefix, self._suffix = _split(about.template)

    def close(self) -> None:
        """Close the file. Data that was read stays valid."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def names(self) -> list[str]:
        """Return the names of all frames, in order."""
        template, base = self.description.template, self.description.base
        return [template.format(base + ordinal) for ordinal in range(self.frames)]

    def ordinal(self, name: str) -> int | None:
        """Return the ordinal of a name, or None if there is no such frame."""
        digits = name[len(self._prefix) : len(name) - len(self._suffix)]
        if not (digits.isascii() and digits.isdigit()):
            return None

        number = int(digits)
        ordinal = number - self.description.base
        # Format it again: "img_0001.jpg" is not a name of the template "img_{:05d}.jpg".
        known = 0 <= ordinal < self.frames and self.description.template.format(number) == name
        return ordinal if known else None

    def read(self, ordinals: Sequence[int]) -> list[bytes]:
        """Return the encoded images of some frames.

        Raises:
            MediaError: a frame is damaged or missing on the disk.
            IndexError: an ordinal is out of range.
        """
        return [self._frame(ordinal) for ordinal in ordinals]

    def _frame(self, ordinal: int) -> bytes:
        if not 0 <= ordinal < self.frames:
            raise IndexError(f"frame {ordinal} of a pack of {self.frames}")
        start = self._offsets[ordinal]
        data = self._at(start, self._offsets[ordinal + 1] - start)
        if xxhash.xxh3_64_intdigest(data, ordinal) != self._sums[ordinal]:
            name = self.description.template.format(self.description.base + ordinal)
            raise MediaError(os.path.join(self.path, name), "the bytes on the disk are damaged (checksum)")
        return data

    def _at(self, start: int, size: int) -> bytes:
        try:
            data = os.pread(self._file, size, start)
            # A read may return less than requested, on network file systems in particular.
            while len(data) < size and (more := os.pread(self._file, size - len(data), start + len(data))):
                data += more
        except OSError as error:
            raise MediaError(self.path, error.strerror or str(error)) from error
        return data


def _split(template: str) -> tuple[str, str]:
    """Return the text before and after the number in every name of a template."""
    if not TEMPLATE.fullmatch(template):
        raise ValueError(f"the template of frame names {template!r} is not of the form img_{{:05d}}.jpg")

    parts, seen = ["", ""], False
    for literal, number, _, _ in string.Formatter().parse(template):
        parts[seen] += literal
        seen = seen or number is not None
    return parts[0], parts[1]
