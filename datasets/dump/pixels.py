"""Turn a decoded frame into the pixels and bytes that a dump stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg

from datasets.dump.settings import DumpSettings
from datasets.dump.source import Picture, decoded
from datasets.readers.video import Scaler
from utils.errors import MediaError

if TYPE_CHECKING:
    import av

    from datasets.plan.metadata import VideoMetadata

_PNG_LEVEL = 3  # of 9: higher levels take much longer for slightly smaller files


class Coder:
    """Encode frames as JPEG or PNG.

    swscale scales and converts the frames of a video (bicubic). They reach the encoder as planes, without passing
    through RGB. A stored JPEG that needs no scaling is kept byte for byte.

    Args:
        settings: quality and other settings of the dump.
        turns: counter-clockwise quarter turns that make a frame upright.
        metadata: size of the upright video; frames of a different size are scaled to it first, as the reader does.
    """

    def __init__(self, settings: DumpSettings, turns: int, metadata: VideoMetadata) -> None:
        self.settings, self.turns = settings, turns
        self.full = (metadata.height, metadata.width)
        self.size = settings.size(*self.full)
        self._scaler = Scaler()

    def code(self, picture: Picture) -> bytes:
        """Return the bytes of one image file."""
        if picture.stored is not None and self._is_right(picture.stored):
            return picture.stored  # encoding it again would only lose quality

        frame = decoded(picture)
        if self.settings.lossless:
            done, data = cv2.imencode(
                # cv2 takes BGR.
                ".png",
                self.rgb(frame, picture.name)[..., ::-1],
                [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL],
            )
            if not done:
                raise MediaError(picture.name, "a frame of it cannot be written as PNG")
            return data.tobytes()

        planes = jpeg_planes(self._scaler, frame, self.stored_size(), picture.name)
        if self.turns:
            planes = [np.ascontiguousarray(np.rot90(plane, self.turns)) for plane in planes]
        return simplejpeg.encode_jpeg_yuv_planes(*planes, quality=self.settings.quality)

    def stored_size(self) -> tuple[int, int]:
        """Return the (h, w) of the result before it is turned upright."""
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
        """Return (h, w, 3) upright RGB: the pixels of the reader `video`, scaled by area if they are scaled."""
        image = self._scaler.rgb(frame, name, self.turns)
        if image.shape[:2] != self.full:
            image = cv2.resize(np.ascontiguousarray(image), self.full[::-1], interpolation=cv2.INTER_LINEAR)
        if self.size != self.full:
            image = cv2.resize(np.ascontiguousarray(image), self.size[::-1], interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(image)


def jpeg_planes(scaler: Scaler, frame: av.VideoFrame, size: tuple[int, int], name: str) -> list[np.ndarray]:
    """Return the planes Y, U, V as JPEG has them: full range, BT.601, chroma halved."""
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    full = scaler.to(
        frame,
        name,
        width=size[1],
        height=size[0],
        format="yuvj420p",
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.JPEG,
        interpolation=Interpolation.BICUBIC,
        threads=1,
    )

    # A line in memory may be longer than the picture is wide: cut the padding off.
    return [
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]  # pyright: ignore[reportArgumentType, reportCallIssue]
        for plane in full.planes
    ]
