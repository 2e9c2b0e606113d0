"""Score a video over time: the views of an evaluation on a window that slides over the video."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from datasets.plan.metadata import VideoMetadata
from datasets.plan.views import EvalSpec, VideoPlan, resolve_eval
from datasets.readers import Reader

if TYPE_CHECKING:
    import torch

FRAMES_HELD = 256  # distinct frames that are read at once, at test scale


@dataclasses.dataclass(frozen=True)
class Window:
    """Part of a video.

    Attributes:
        first: ordinal of its first frame.
        frames: number of its frames.
        start, end: the time span of its prediction, in seconds: neighbours meet half-way between their centres.
    """

    first: int
    frames: int
    start: float
    end: float


def windows(metadata: VideoMetadata, length: float, stride: float) -> list[Window]:
    """Return windows of `length` seconds, `stride` seconds apart; one last window ends with the video.

    A video that is shorter than a window is one window. Times count frames at the average rate of the video.

    Raises:
        ValueError: length or stride is not positive.
    """
    if length <= 0 or stride <= 0:
        raise ValueError(f"windows of {length} s every {stride} s")

    size = min(max(1, round(length * metadata.fps)), metadata.frames)
    step = max(1, round(stride * metadata.fps))
    starts = list(range(0, metadata.frames - size + 1, step))
    if starts[-1] + size < metadata.frames:
        starts.append(metadata.frames - size)

    # Each moment belongs to the window whose centre is nearest.
    centres = [first + size / 2 for first in starts]
    borders = [0.0, *((a + b) / 2 for a, b in zip(centres, centres[1:], strict=False)), float(metadata.frames)]
    return [
        Window(first, size, borders[k] / metadata.fps, borders[k + 1] / metadata.fps) for k, first in enumerate(starts)
    ]


def window_logits(
    reader: Reader,
    record: int,
    parts: Sequence[Window],
    *,
    spec: EvalSpec,
    score: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[np.ndarray]:
    """Yield the logits (V, K) of each window, by the plan, the reader and the views of an evaluation.

    Args:
        reader: a reader that has the video.
        record: index of the video in the reader.
        parts: from `windows`.
        spec: the views of each window.
        score: uint8 views (V, T, h, w, C) -> logits (V, K).

    Raises:
        MediaError: a frame does not decode.
    """
    import torch

    from utils import transforms

    metadata = reader.probe(record)
    for group in _groups([_plan(metadata, part, spec, record) for part in parts]):
        # windows overlap: each frame is decoded once for a group
        ordinals = np.unique(np.concatenate([plan.frames for plan in group]))
        # (F, h, w, C)
        frames = np.empty((len(ordinals), *group[0].size, 3), np.uint8)
        reader.read(record, ordinals, None, group[0].size, frames)

        for plan in group:
            rows = np.searchsorted(ordinals, plan.frames)[plan.clip_rows]  # (V, T)
            views = transforms.crop_views(torch.from_numpy(frames), rows, plan.boxes, plan.flips)
            yield score(views).float().cpu().numpy()


def _plan(metadata: VideoMetadata, part: Window, spec: EvalSpec, record: int) -> VideoPlan:
    """Return the views of one window, with ordinals of the whole video."""
    # a plan for a video as long as the window, then moved to its place
    plan = resolve_eval(dataclasses.replace(metadata, frames=part.frames), spec, record)
    return dataclasses.replace(plan, frames=plan.frames + part.first)


def _groups(plans: Sequence[VideoPlan]) -> Iterator[list[VideoPlan]]:
    """Yield groups of neighbouring windows whose frames are read in one go."""
    group: list[VideoPlan] = []
    held = 0
    for plan in plans:
        # a window with more frames than that is a group by itself
        if group and held + len(plan.frames) > FRAMES_HELD:
            yield group
            group, held = [], 0
        group.append(plan)
        held += len(plan.frames)

    if group:
        yield group
