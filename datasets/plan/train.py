"""Plan a training clip: `draw` the uniforms, then `resolve` them with the metadata of a video.

Everything here is pure: no pixels, no files, no torch. A training clip is a function of (seed, epoch, position), the
metadata of its video and a `TrainSpec`. The views of an evaluation (views.py) depend on the metadata and an
`EvalSpec` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from datasets.plan import crops, ops
from datasets.plan.crops import Box, Size
from datasets.plan.metadata import VideoMetadata, check_metadata
from datasets.plan.order import uniforms
from datasets.plan.sampling import Sampling, sampling_of, train_frames
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.plan.ops import Op
    from utils.config import Config

# Counter blocks of `order.uniforms`; each augmentation has one more (`Op.block`). Renumbering would change all draws.
TEMPORAL, _CROP = 1, 2


@dataclass(frozen=True)
class TrainSpec:
    """The settings that decide how training clips are drawn. Only the config schema has defaults.

    Args:
        sampling: frames of a clip.
        input_size: side of the clip in pixels.
        crop: a key of `TRAIN_CROPS`.
        scales: for multi_scale and multi_scale_random: crop sides as fractions of the short side.
        max_distort: for both: how many entries apart width and height may be in `scales`.
        more_fix_crop: for both: 13 crop positions instead of 5.
        area: for random_resized: range of the crop's area, as a fraction of the frame's.
        aspect: for random_resized: range of width / height.
        ops: augmentations by name, in the order in which they are applied.

    Raises:
        UserError: unknown `crop`.
    """

    sampling: Sampling
    input_size: int
    crop: str
    scales: tuple[float, ...]
    max_distort: int
    more_fix_crop: bool
    area: tuple[float, ...]
    aspect: tuple[float, ...]
    ops: Mapping[str, Op]

    def __post_init__(self) -> None:
        if self.crop not in TRAIN_CROPS:
            raise UserError(f"augmentation.crop: unknown crop {self.crop!r}; choose one of {', '.join(TRAIN_CROPS)}")

    def neutral(self, name: str) -> np.ndarray:
        """Return (F, ...) rows with which an augmentation changes nothing."""
        op = self.ops[name]
        return np.stack([op.neutral] * (self.sampling.frames_per_clip if op.per_frame else 1))


@dataclass(frozen=True, eq=False)
class Draws:
    """The uniforms of one clip. Their number does not depend on the video.

    Attributes:
        temporal: (S,), one for each segment.
        crop: `crops.RANDOM_RESIZED_UNIFORMS` numbers; each crop uses as many as it needs.
        ops: name -> (F, uniforms of the augmentation).
    """

    temporal: NDArray[np.float64]
    crop: list[float]
    ops: dict[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Plan:
    """One training clip: what to read and how to augment it.

    Attributes:
        sample: index of the record.
        frames: (T,) int64 ordinals, not necessarily distinct.
        box: (x1, y1, x2, y2) on the source frame, end excluded.
        size: (h, w) of the clip.
        ops: name -> (F, ...) rows in the format that the augmentation's file defines.
    """

    sample: int
    frames: NDArray[np.int64]
    box: Box
    size: Size
    ops: dict[str, np.ndarray]


def draw(seed: int, epoch: int, position: int, spec: TrainSpec, *, frames_of: int | None = None) -> Draws:
    """Return the uniforms of the clip at a global position. Their number does not depend on the video's length.

    Args:
        seed: the run's seed.
        epoch: that of the turn (`order.Turn`).
        position: global position, running through epochs.
        spec: its augmentations and sampling decide how many numbers are drawn.
        frames_of: the position whose frames the clip shows; None: `position`. All views of a video share them.
    """
    drawn = {}
    for name, op in spec.ops.items():
        rows = spec.sampling.frames_per_clip if op.per_frame else 1
        # (F * uniforms,) -> (F, uniforms)
        drawn[name] = uniforms(seed, epoch, position, op.block, rows * op.uniforms).reshape(rows, op.uniforms)

    return Draws(
        temporal=uniforms(
            seed, epoch, position if frames_of is None else frames_of, TEMPORAL, spec.sampling.num_segments
        ),
        # Always draw the largest number needed, so that changing the crop does not change any other draw.
        crop=uniforms(seed, epoch, position, _CROP, crops.RANDOM_RESIZED_UNIFORMS).tolist(),
        ops=drawn,
    )


def resolve(draws: Draws, metadata: VideoMetadata, spec: TrainSpec, sample: int) -> Plan:
    """Turn the draws of a position into the plan of one clip.

    Raises:
        MediaError: the video has no frames or no pixels.
    """
    check_metadata(metadata, sample)
    return Plan(
        sample=sample,
        frames=train_frames(spec.sampling, metadata.frames, metadata.fps, draws.temporal),
        box=TRAIN_CROPS[spec.crop](metadata.width, metadata.height, draws.crop, spec),
        size=(spec.input_size, spec.input_size),
        ops={name: op.resolve(draws.ops[name], spec.input_size) for name, op in spec.ops.items()},
    )


def train_spec(cfg: Config) -> TrainSpec:
    """Return the TrainSpec of a loaded configuration."""
    a = cfg.augmentation
    return TrainSpec(
        sampling=sampling_of(cfg),
        input_size=a.input_size,
        crop=a.crop,
        scales=a.scales,
        max_distort=a.max_distort,
        more_fix_crop=a.more_fix_crop,
        area=a.area,
        aspect=a.aspect,
        ops=ops.from_config(cfg),
    )


def _multi_scale(w: int, h: int, u: Sequence[float], spec: TrainSpec) -> Box:
    return crops.multi_scale(
        w,
        h,
        u,
        input_size=spec.input_size,
        scales=spec.scales,
        max_distort=spec.max_distort,
        more_fix_crop=spec.more_fix_crop,
    )


def _multi_scale_random(w: int, h: int, u: Sequence[float], spec: TrainSpec) -> Box:
    # PP-TSM crops 224 of 256 pixels; other sizes keep the proportion.
    return crops.multi_scale_random(
        w,
        h,
        u,
        crop=spec.input_size,
        side=round(spec.input_size * 256 / 224),
        scales=spec.scales,
        max_distort=spec.max_distort,
        more_fix_crop=spec.more_fix_crop,
    )


def _short_side_jitter(w: int, h: int, u: Sequence[float], spec: TrainSpec) -> Box:
    # PySlowFast jitters the short side in 256..320 for crops of 224; other sizes keep the proportion.
    sides = (round(spec.input_size * 256 / 224), round(spec.input_size * 320 / 224))
    return crops.short_side_jitter(w, h, u, crop=spec.input_size, sides=sides)


#: `augmentation.crop` -> box on the source frame. "centre" is the largest central square, for tests without randomness.
TRAIN_CROPS: dict[str, Callable[[int, int, Sequence[float], TrainSpec], Box]] = {
    "multi_scale": _multi_scale,
    "multi_scale_random": _multi_scale_random,
    "random_resized": lambda w, h, u, spec: crops.random_resized(w, h, u, area=spec.area, aspect=spec.aspect),
    "random": lambda w, h, u, spec: crops.random_crop(w, h, u, spec.input_size),
    "short_side_jitter": _short_side_jitter,
    "centre": lambda w, h, u, spec: crops.mmaction2_center(w, h, min(w, h)),
}
