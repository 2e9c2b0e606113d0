"""Define the facts about a video that a plan needs."""

from __future__ import annotations

from dataclasses import dataclass

from utils.errors import MediaError


@dataclass(frozen=True)
class Facts:
    """The facts about a video: number of frames, height and width in pixels after rotation, frames per second."""

    frames: int
    height: int
    width: int
    fps: float


def check_facts(facts: Facts, sample: int) -> None:
    """Raise MediaError if a video has no frames or no pixels."""
    if facts.frames < 1 or facts.height < 1 or facts.width < 1:
        reason = f"nothing to read: {facts.frames} frames of {facts.width}x{facts.height} pixels"
        raise MediaError(f"sample {sample}", reason)
