"""Define the metadata of a video that a plan needs."""

from __future__ import annotations

from dataclasses import dataclass

from utils.errors import MediaError


@dataclass(frozen=True)
class VideoMetadata:
    """The metadata of a video: number of frames, height and width in pixels after rotation, frames per second."""

    frames: int
    height: int
    width: int
    fps: float


def check_metadata(metadata: VideoMetadata, sample: int) -> None:
    """Raise MediaError if a video has no frames or no pixels."""
    if metadata.frames < 1 or metadata.height < 1 or metadata.width < 1:
        reason = f"nothing to read: {metadata.frames} frames of {metadata.width}x{metadata.height} pixels"
        raise MediaError(f"sample {sample}", reason)
