"""What a plan must know of a video."""

from __future__ import annotations

from dataclasses import dataclass

from utils.faults import MediaError


@dataclass(frozen=True)
class Facts:
    """What a plan must know of a video: frames, height and width in pixels after rotation, frames per second."""

    frames: int
    height: int
    width: int
    fps: float


def check_facts(facts: Facts, sample: int) -> None:
    """Refuse a video that has nothing to read (MediaError)."""
    if facts.frames < 1 or facts.height < 1 or facts.width < 1:
        reason = f"nothing to read: {facts.frames} frames of {facts.width}x{facts.height} pixels"
        raise MediaError(f"sample {sample}", reason)
