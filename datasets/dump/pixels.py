"""From a decoded frame to the pixels and bytes that a dump stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import simplejpeg

from datasets.dump.settings import Settings
from datasets.dump.source import Picture, decoded
from utils.faults import MediaError

if TYPE_CHECKING:
    import av
    from av.video.reformatter import VideoReformatter

    from datasets.plan.facts import Facts

_PNG_LEVEL = 3


class Coder:
    """Encodes frames as JPEG or PNG.

    A video's frames are scaled and converted by swscale (bicubic) and go to the encoder as planes; nothing passes
    through RGB. A stored JPEG that needs no scaling is kept byte for byte.

    Args:
        settings: quality and so on.
        turns: counter-clockwise quarter turns that make a frame upright.
        facts: size of the upright video; frames that differ from it are brought to it first, as the reader does.
    """

    def __init__(self, settings: Settings, turns: int, facts: Facts) -> None:
        self.settings, self.turns = settings, turns
        self.full = (facts.height, facts.width)
        self.size = settings.size(*self.full)
        self._scaler = Scaler()

    def code(self, picture: Picture) -> bytes:
        """The bytes of one image."""
        if picture.stored is not None and self._is_right(picture.stored):
            return picture.stored
        frame = decoded(picture)
        if self.settings.lossless:
            done, data = cv2.imencode(
                ".png", self.rgb(frame, picture.name)[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL]
            )
            if not done:
                raise MediaError(picture.name, "a frame of it cannot be written as PNG")
            return data.tobytes()
        planes = self._scaler.jpeg_planes(frame, self.stored_size(), picture.name)
        if self.turns:
            planes = [np.ascontiguousarray(np.rot90(plane, self.turns)) for plane in planes]
        return simplejpeg.encode_jpeg_yuv_planes(*planes, quality=self.settings.quality)

    def stored_size(self) -> tuple[int, int]:
        """(h, w) of the result before it is made upright."""
        height, width = self.size
        return (width, height) if self.turns % 2 else (height, width)

    def _is_right(self, data: bytes) -> bool:
        if self.settings.lossless or data[:2] != b"\xff\xd8":
            return False
        try:
            return tuple(simplejpeg.decode_jpeg_header(data)[:2]) == self.size
        except ValueError:
            return False

    def rgb(self, frame: av.VideoFrame, name: str) -> np.ndarray:
        """(h, w, 3) upright RGB: the pixels that the reader `video` gives, scaled by area where they are scaled."""
        image = np.rot90(self._scaler.rgb(frame, name), self.turns)
        if image.shape[:2] != self.full:
            image = cv2.resize(np.ascontiguousarray(image), self.full[::-1], interpolation=cv2.INTER_LINEAR)
        if self.size != self.full:
            image = cv2.resize(np.ascontiguousarray(image), self.size[::-1], interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(image)


class Scaler:
    """swscale for the frames of one file; on one thread, since every worker process is one core."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._reformatter: VideoReformatter | None = None

    def to(self, frame: av.VideoFrame, name: str, **wanted: Any) -> av.VideoFrame:
        """One frame in another size or format; MediaError where its format cannot be converted."""
        from av.error import FFmpegError
        from av.video.reformatter import VideoReformatter

        # A context of swscale keeps the colour space it was made for.
        key = (frame.format.name, frame.width, frame.height, frame.colorspace, frame.color_range, *wanted.items())
        if self._reformatter is None or key != self._key:
            self._key, self._reformatter = key, VideoReformatter()
        try:
            return self._reformatter.reformat(frame, threads=1, **wanted)
        except (FFmpegError, ValueError) as error:
            reason = f"its pixel format {frame.format.name} cannot be converted ({error})"
            raise MediaError(name, reason) from error

    def rgb(self, frame: av.VideoFrame, name: str) -> np.ndarray:
        """(H, W, 3) RGB, not turned; exactly the conversion of the reader `video`."""
        return self.to(frame, name, format="rgb24").to_ndarray()

    def jpeg_planes(self, frame: av.VideoFrame, size: tuple[int, int], name: str) -> list[np.ndarray]:
        """Y, U, V as JPEG has them: full range, BT.601, chroma halved."""
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        full = self.to(
            frame,
            name,
            width=size[1],
            height=size[0],
            format="yuvj420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.BICUBIC,
        )
        return [
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]  # type: ignore[arg-type]
            for plane in full.planes
        ]
