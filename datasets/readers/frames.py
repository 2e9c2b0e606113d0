"""Read frames: a video is a folder of numbered image files, a pack (frame_pack.py), or one image file.

Names: "img_{:05d}.jpg", "{:06d}.jpg", "{:05d}.jpg", "image_{:05d}.jpg", "frame{:06d}.jpg" or any other pattern with one
number; base 0 or 1. Without a `template` the folder of the first record is listed once, and both are taken from it. A
folder with other names is listed itself, so the result never depends on earlier reads.

Pixels are returned as stored, without applying an EXIF orientation (tools that extract frames write upright pixels).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg

from datasets.plan.metadata import VideoMetadata
from datasets.readers.frame_pack import Description
from datasets.readers.frame_source import FilesSource, FrameSource
from datasets.readers.resize import Box, place
from utils.errors import MediaError, UserError

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.readers.spec import ReaderSpec

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
#: Prefixes of RGB frames in common tools, most common first. They win over others (flow_x_, ...) of the same length.
USUAL_PREFIXES = ("img_", "", "image_", "frame", "frame_")
_NUMBERED = re.compile(r"(?P<prefix>.*?)(?P<number>\d+)(?P<suffix>\D*)")
_LAYOUTS_KEPT = 256  # a listing of a large folder is expensive on a network file system
_REREADS_KEPT = 4  # records whose metadata is kept between plan and read


@dataclasses.dataclass(frozen=True)
class Layout:
    """The naming of the frame files in one folder.

    Attributes:
        template: format string with one number.
        base: number of the first file.
        count: number of consecutive files from `base` on.
    """

    template: str
    base: int
    count: int


def find_layout(names: list[str]) -> Layout | None:
    """Return the numbering in a list of file names: the pattern with most files. A usual prefix decides a tie.

    A sequence that starts at a different number than 0 or 1 keeps its first number as base. A gap ends the count.
    """
    # (prefix, suffix) -> number -> its digits, as written
    families: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match and os.path.splitext(name)[1].lower() in IMAGES:
            numbers = families.setdefault((match["prefix"], match["suffix"]), {})
            numbers[int(match["number"])] = match["number"]

    if not families:
        return None

    def rank(item: tuple[tuple[str, str], dict[int, str]]) -> tuple[int, int, tuple[str, str]]:
        prefix = item[0][0]
        usual = USUAL_PREFIXES.index(prefix) if prefix in USUAL_PREFIXES else len(USUAL_PREFIXES)
        return -len(item[1]), usual, item[0]

    (prefix, suffix), numbers = min(families.items(), key=rank)
    base = min(numbers)
    digits = min(len(text) for text in numbers.values())
    number = f"{{:0{digits}d}}" if digits > 1 else "{:d}"

    count = 1
    while base + count in numbers:
        count += 1
    braces = str.maketrans({"{": "{{", "}": "}}"})
    return Layout(prefix.translate(braces) + number + suffix.translate(braces), base, count)


def decode(data: bytes, path: str, room: np.ndarray | None = None) -> np.ndarray:
    """Decode one image file to (H, W, 3) uint8 RGB. Raise MediaError if it is damaged.

    Args:
        data: the bytes of the file.
        path: its name, for the message.
        room: memory for the pixels, used if it is large enough. Allocating memory for every frame costs more.
    """
    if data[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=room)
        except ValueError as error:
            text = str(error).lower()
            if room is not None and "buffer" in text:  # the image is larger than `room`
                return decode(data, path)
            if "extraneous bytes" in text:  # harmless padding between markers, all pixels are there
                return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)
            # OpenCV handles CMYK and other rare colour models. A damaged file is refused, never shown half grey.
            if "colorspace" not in text and "color conversion" not in text:
                raise MediaError(path, f"the JPEG is damaged ({error})") from error

    image = None
    if data:
        try:
            # No EXIF rotation for any format, so that JPEG and PNG of the same pixels give the same picture.
            flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error as error:
            raise MediaError(path, f"the image does not decode ({error.err})") from error

    if image is None:
        raise MediaError(path, "the file is empty" if not data else "it is not an image that can be decoded")

    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def image_size(data: bytes, path: str) -> tuple[int, int]:
    """Return (H, W) of an image file; for JPEG from the header alone."""
    if data[:2] == b"\xff\xd8":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            return int(height), int(width)
        except ValueError:
            pass  # a header that simplejpeg does not read; OpenCV may
    return decode(data, path).shape[:2]


def _names_frames(template: str) -> bool:
    """Return True if a template gives each frame a different name. Otherwise counting files would never end."""
    try:
        return template.format(0) != template.format(1)
    except (ValueError, LookupError, AttributeError):
        return False


class FramesReader:
    """Read frames from folders of numbered images. Single images count as videos of one frame.

    A frame count in the list is used if its first and last file exist. Without a count the folder is listed.
    """

    def __init__(self, spec: ReaderSpec, records: Records, source: FrameSource | None = None) -> None:
        if spec.template is not None and not _names_frames(spec.template):
            raise UserError(f"template: {spec.template} is not a file name with one number, such as img_{{:05d}}.jpg")

        self.spec = spec
        self.records = records
        self.source: FrameSource = source or FilesSource()
        self._listed = functools.lru_cache(maxsize=_LAYOUTS_KEPT)(self._list)
        # The plan needs the metadata of a record, and the read that follows needs it again.
        self._metadata = functools.lru_cache(maxsize=_REREADS_KEPT)(self._probe)
        self._scratch = np.empty(0, np.uint8)
        self._family: Layout | None = None  # naming of the first record's folder
        self._family_known = False

    def close(self) -> None:
        """Do nothing: no file is open between reads."""

    def probe(self, i: int) -> VideoMetadata:
        """Return the metadata of record i; see `Reader.probe`."""
        return self._metadata(i)[0]

    def read(self, i: int, frames: np.ndarray, box: Box | None, size: tuple[int, int], out: np.ndarray) -> None:
        """Read frames of record i into `out` (F, h, w, 3); see `Reader.read`."""
        if out.shape != (len(frames), *size, 3):
            raise ValueError(f"out has shape {out.shape}, expected {(len(frames), *size, 3)}")

        metadata, layout = self._metadata(i)
        rows: dict[int, list[int]] = {}  # ordinal -> rows of `out` that show it
        for row, ordinal in enumerate(int(frame) for frame in frames):
            if not 0 <= ordinal < metadata.frames:
                raise MediaError(self.records.path(i), f"frame {ordinal} was requested; there are {metadata.frames}")
            rows.setdefault(ordinal, []).append(row)

        # Read all files in one request, and decode each frame once even if several rows show it.
        for ordinal, data in zip(rows, self._bytes(i, layout, rows), strict=True):
            first, *others = rows[ordinal]
            image = decode(data, self._file(i, layout, ordinal), self._room(metadata.height * metadata.width * 3))
            place(image, box, (metadata.height, metadata.width), out[first])
            for row in others:
                out[row] = out[first]

    def first_file(self, i: int) -> str:
        """Return the path of the first frame of record i, or of the image or pack itself."""
        return self._file(i, self._metadata(i)[1], 0)

    def _room(self, size: int) -> np.ndarray:
        """Return memory for one decoded frame, reused from frame to frame."""
        if self._scratch.size < size:
            self._scratch = np.empty(size, np.uint8)
        return self._scratch

    def files(self, i: int, ordinals: list[int]) -> list[bytes]:
        """Return the stored image files of frames of record i. Raise MediaError if one cannot be read."""
        return self._bytes(i, self._metadata(i)[1], ordinals)

    def _probe(self, i: int) -> tuple[VideoMetadata, Layout | None]:
        path = self.records.full_path(i)
        if self.source.is_folder(path):
            # A pack states its metadata, so no image is read.
            pack = self.source.describe(path)
            if pack is not None:
                layout: Layout | None = self._part_of(i, pack)
                fps = pack.fps or self.spec.fps
                return VideoMetadata(frames=layout.count, height=pack.height, width=pack.width, fps=fps), layout

            layout = self._layout(i, path)
            frames = layout.count
        elif self.source.exists(path):
            layout, frames = None, 1
        else:
            raise MediaError(self.records.path(i), "there is no such folder or image")

        # A folder does not state the size of its frames, so read it from the first image.
        first = self._file(i, layout, 0)
        height, width = image_size(self._bytes(i, layout, [0])[0], first)
        return VideoMetadata(frames=frames, height=height, width=width, fps=self.spec.fps), layout

    def _file(self, i: int, layout: Layout | None, ordinal: int) -> str:
        folder = self.records.full_path(i)
        return folder if layout is None else os.path.join(folder, layout.template.format(layout.base + ordinal))

    def _bytes(self, i: int, layout: Layout | None, ordinals: Iterable[int]) -> list[bytes]:
        """Return the files of some frames of one record, read in one request."""
        path = self.records.full_path(i)
        try:
            if layout is None:
                return [self.source.read(path) for _ in ordinals]
            names = [layout.template.format(layout.base + ordinal) for ordinal in ordinals]
            return self.source.read_many(path, names)
        except MediaError as error:
            raise MediaError(error.path, error.reason + self._nearest(error.path)) from error

    def _part_of(self, i: int, pack: Description) -> Layout:
        """Return the frames of record i in a pack. Its header has the names; a configured template is for folders."""
        start, declared = int(self.records.starts[i]), int(self.records.frames[i])
        frames = declared if declared > 0 else pack.frames - start
        if not 0 < start + frames <= pack.frames or frames < 1:
            asked = f"{frames} frames, starting at {start}," if declared > 0 else f"frames starting at {start}"
            raise MediaError(self.records.path(i), f"{asked} were requested; the pack has {pack.frames}")
        return Layout(pack.template, pack.base + start, frames)

    def _layout(self, i: int, folder: str) -> Layout:
        """Return template, base (including the record's start) and number of frames of one folder."""
        start, declared = int(self.records.starts[i]), int(self.records.frames[i])
        # Usual case: the folder is named like the others of its list, and two look-ups of files prove it.
        hint = self._hint()
        if declared > 0 and hint is not None and self._agrees(folder, hint, start, declared):
            return Layout(hint.template, hint.base + start, declared)

        # Otherwise as configured, else from a listing of this folder.
        template, base = self.spec.template, self.spec.frame_base
        if template is not None:
            if base is None:
                base = 0 if self.source.exists(os.path.join(folder, template.format(0))) else 1
            last = base - 1 if declared > 0 else self._last_of_run(folder, template, base)
        else:
            listed = self._listed(folder)
            if listed is None:
                raise MediaError(self.records.path(i), "the folder holds no numbered images" + self._some(folder))
            template, last = listed.template, listed.base + listed.count - 1
            base = listed.base if base is None else base

        first = base + start
        layout = Layout(template, first, declared if declared > 0 else last + 1 - first)
        self._check_ends(i, folder, layout)
        return layout

    def _hint(self) -> Layout | None:
        """Return the naming of this list's folders: as configured, else as in the first record's folder."""
        if self.spec.template is not None and self.spec.frame_base is not None:
            return Layout(self.spec.template, self.spec.frame_base, 0)

        if not self._family_known:
            self._family_known = True
            if self.spec.template is None and self.spec.frame_base is None and len(self.records):
                with contextlib.suppress(MediaError):  # its own read reports it
                    self._family = self._listed(self.records.full_path(0))
        return self._family

    def _agrees(self, folder: str, hint: Layout, start: int, frames: int) -> bool:
        def there(number: int) -> bool:
            return number >= 0 and self.source.exists(os.path.join(folder, hint.template.format(number)))

        ends = there(hint.base + start) and there(hint.base + start + frames - 1)
        # Unless the base is configured, an earlier file shows that this folder counts from a different number.
        return ends and (self.spec.frame_base is not None or not there(hint.base - 1))

    def _check_ends(self, i: int, folder: str, layout: Layout) -> None:
        if layout.count < 1:
            raise MediaError(self.records.path(i), "the folder holds no frames" + self._some(folder))
        for number in (layout.base, layout.base + layout.count - 1):
            path = os.path.join(folder, layout.template.format(number))
            if not self.source.exists(path):
                name = os.path.basename(path)
                reason = f"frame file {name} is missing ({layout.count} frames from number {layout.base} expected)"
                raise MediaError(self.records.path(i), reason + self._nearest(path))

    def _list(self, folder: str) -> Layout | None:
        return find_layout(self.source.names(folder))

    def _last_of_run(self, folder: str, template: str, base: int) -> int:
        names, number = set(self.source.names(folder)), base
        while template.format(number) in names:
            number += 1
        return number - 1

    def _nearest(self, path: str) -> str:
        """Return a note about the existing file whose name is most like the missing one, for the error message."""
        folder, name = os.path.split(path)
        if self.source.exists(path) or not self.source.is_folder(folder):
            return ""

        names = sorted(self.source.names(folder))
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        return f"; the nearest file there is {close[0]}" if close else "; the folder is empty"

    def _some(self, folder: str) -> str:
        names = sorted(self.source.names(folder))
        return f" (it holds {len(names)} files, such as {names[0]})" if names else " (it is empty)"
