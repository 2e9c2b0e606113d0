"""Read every frame of one video in order, from a video file, a folder of images or a pack."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from datasets.plan.metadata import VideoMetadata
from datasets.readers.ending import EndsEarly, is_tolerable
from datasets.readers.frame_source import FilesSource
from datasets.readers.frames import decode, find_layout, image_size
from utils.errors import MediaError

if TYPE_CHECKING:
    import av


@dataclasses.dataclass(frozen=True)
class Picture:
    """One frame of a source.

    Attributes:
        frame: the decoded frame, not yet upright; None if only `stored` is known.
        stored: the bytes of the image file, if the frame comes from one.
        name: the frame's name for messages.
    """

    frame: av.VideoFrame | None
    stored: bytes | None
    name: str


class FolderSource:
    """The images of a folder or a pack.

    Args:
        path: the folder or pack on disk.
        shown: the path as the list writes it.
    """

    turns = 0  # stored images are shown as they are, so they need no rotation
    missing = 0

    def __init__(self, path: str, shown: str) -> None:
        self._files, self._path, self._shown = FilesSource(), path, shown
        described = self._files.describe(path)
        # A pack describes itself; a folder is described by the names of its files.
        if described is not None:
            count = described.frames
            self._names = [described.template.format(described.base + k) for k in range(count)]
            self.metadata = VideoMetadata(count, described.height, described.width, described.fps)
            return

        layout = find_layout(self._files.names(path))
        if layout is None:
            raise MediaError(shown, "the folder holds no numbered images")

        self._names = [layout.template.format(layout.base + k) for k in range(layout.count)]
        # One image is enough: the reader scales those that differ to the size of the first.
        height, width = image_size(self._files.read_many(path, self._names[:1])[0], self._shown)
        self.metadata = VideoMetadata(layout.count, height, width, 0.0)

    def end_at(self, frames: int, missing: int) -> None:
        """Leave out the last frames: keep `frames`, and record that `missing` do not decode."""
        self.metadata, self.missing = dataclasses.replace(self.metadata, frames=frames), missing

    def pictures(self) -> Iterator[Picture]:
        """Yield all frames as the bytes of their files; `decoded` gives their pixels."""
        for name in self._names:
            yield Picture(None, self._files.read_many(self._path, [name])[0], os.path.join(self._shown, name))


class VideoSource:
    """The frames of a video file, exactly as many as its packet table promises (video_index.py).

    Args:
        path: the file on disk.
        shown: the path as the list writes it.
        missing_share: largest share of the frames that may be missing at the end.

    Raises:
        MediaError: the file cannot be indexed.
    """

    def __init__(self, path: str, shown: str, missing_share: float) -> None:
        from datasets.readers.video_index import build_index

        index = build_index(path, shown, missing_share=missing_share)
        self._path, self._shown, self._missing_share = path, shown, missing_share
        self.metadata, self.turns, self.missing = index.metadata, index.rotation, index.missing

    def end_at(self, frames: int, missing: int) -> None:
        """Leave out the last frames: keep `frames`, and record that `missing` do not decode."""
        self.metadata, self.missing = dataclasses.replace(self.metadata, frames=frames), missing

    def pictures(self) -> Iterator[Picture]:
        """Yield all frames, decoded from the start on one thread.

        Raises:
            EndsEarly: only the last frames do not decode.
            MediaError: more frames are missing, or the decoder returns more frames than the packets promise.
        """
        from datasets.readers.video_index import Decoding, open_container, video_stream

        expected, count = self.metadata.frames, 0
        with open_container(self._path, self._shown) as container:
            decoding = Decoding(container, video_stream(container, self._shown), self._missing_share)
            for frame in decoding:
                if count < expected:  # count the others too, but a copy must not hold them
                    yield Picture(frame, None, self._shown)
                count += 1

        # Extra frames are accepted only if the file is known to be damaged.
        if count == expected or (count > expected and (decoding.trouble or self.missing)):
            return

        reason = f"{count} of its {expected} frames decode" + (f" ({decoding.trouble})" if decoding.trouble else "")
        missing = expected - count
        if missing > 0 and is_tolerable(missing, expected, self._missing_share):
            raise EndsEarly(self._shown, reason, count, missing)
        raise MediaError(self._shown, reason)


DumpSource = FolderSource | VideoSource


def open_source(path: str, shown: str, missing_share: float) -> DumpSource:
    """Open the source at a path. Raise MediaError if there is nothing that can be read."""
    if FilesSource().is_folder(path):
        return FolderSource(path, shown)
    return VideoSource(path, shown, missing_share)


def decoded(picture: Picture) -> av.VideoFrame:
    """Return the pixels of a frame of either kind of source. EXIF orientation is not applied, as in the reader."""
    import av

    if picture.frame is not None:
        return picture.frame
    assert picture.stored is not None
    return av.VideoFrame.from_ndarray(decode(picture.stored, picture.name), format="rgb24")


def rate(metadata: VideoMetadata) -> Fraction:
    """Return the frame rate of a copy; 30 frames/s if the source names none."""
    # 1001 keeps the rates of NTSC exact, such as 30000/1001.
    return Fraction(metadata.fps or 30.0).limit_denominator(1001)
