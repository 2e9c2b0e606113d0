"""From integers to what a clip is made of: `draw` the uniforms, `resolve` them with the facts of a video.

Everything here is pure: no pixels, no files, no torch. A training clip is a function of (seed, epoch, position), its
video's facts and a `TrainSpec`; the views of an evaluation (views.py) of the facts and an `EvalSpec`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.plan import crops
from datasets.plan.crops import Box, Size
from datasets.plan.facts import Facts, check_facts
from datasets.plan.order import uniforms
from datasets.plan.sampling import Sampling, sampling_of, spec_fields, train_frames, uniforms_needed
from utils.faults import UserError

# Counter blocks: switching one augmentation on leaves the draws of the others as they are. Never renumber.
_TEMPORAL, _CROP, _FLIP, _JITTER, _ERASE = 1, 2, 3, 4, 5

_CROP_UNIFORMS = crops.RANDOM_RESIZED_UNIFORMS
_ERASE_TRIES = 100
_ERASE_UNIFORMS = 1 + 2 * _ERASE_TRIES + 2  # whether, areas and aspects, y, x


@dataclass(frozen=True)
class TrainSpec:
    """How training clips are drawn; plain values, so that it travels as JSON.

    Args:
        sampling: frames of a clip.
        input_size: side of the clip in pixels.
        crop: a key of `TRAIN_CROPS`.
        scales: multi_scale, multi_scale_random: crop sides as shares of the short side.
        max_distort: both: how many entries of `scales` width and height may lie apart.
        more_fix_crop: both: 13 places instead of 5.
        area: random_resized: range of the share of the frame's area.
        aspect: random_resized: range of width / height.
        flip: mirror half of the clips.
        jitter: (brightness, contrast, saturation, hue) of ColorJitter, or None.
        jitter_per_frame: one jitter per frame instead of one per clip.
        erasing: (p, sl, sh, r1) of RandomErasing, or None.
        erasing_per_frame: one erased box per frame instead of one per clip.

    Raises:
        UserError: unknown `crop`.
    """

    sampling: Sampling
    input_size: int = 224
    crop: str = "multi_scale"
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    max_distort: int = 1
    more_fix_crop: bool = True
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    jitter: tuple[float, float, float, float] | None = None
    jitter_per_frame: bool = False
    erasing: tuple[float, float, float, float] | None = None
    erasing_per_frame: bool = False

    def __post_init__(self) -> None:
        if self.crop not in TRAIN_CROPS:
            raise UserError(f"augmentation.crop: unknown crop {self.crop!r}; there are {', '.join(TRAIN_CROPS)}")

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainSpec:
        """The inverse of `to_json`."""
        return cls(**spec_fields(text))


@dataclass(frozen=True, eq=False)
class Draws:
    """Uniforms of one clip, as many whatever its video is: F = 1 row, or T rows where drawn per frame."""

    temporal: NDArray[np.float64]  # (uniforms_needed,)
    crop: list[float]  # 22
    flip: float
    jitter: NDArray[np.float64] | None  # (F, 8)
    erase: NDArray[np.float64] | None  # (F, 203)


@dataclass(frozen=True, eq=False)
class Plan:
    """One training clip: what to read and how to augment it.

    Attributes:
        sample: index of the record.
        frames: (T,) int64 ordinals, not necessarily distinct.
        box: (x1, y1, x2, y2) on the source frame, end excluded.
        size: (h, w) of the clip.
        flip: mirror it.
        jitter: (F, 8) float64 or None: factors of brightness, contrast, saturation, then the shift of hue, then the
            four operations (0..3 in that numbering) in the order in which to apply them.
        erase: (F, 4) int64 or None: y, x, h, w in the clip after the flip; h = 0 where nothing is erased.
    """

    sample: int
    frames: NDArray[np.int64]
    box: Box
    size: Size
    flip: bool
    jitter: NDArray[np.float64] | None
    erase: NDArray[np.int64] | None


def draw(seed: int, epoch: int, position: int, spec: TrainSpec) -> Draws:
    """The uniforms of the clip at a global position; no more and no less for a long or a short video.

    Args:
        seed: the run's seed.
        epoch: `order.epoch_of(position, n)`.
        position: global position, running through epochs.
        spec: says which augmentations are on.
    """
    jitter = erase = None
    if spec.jitter is not None:
        rows = spec.sampling.frames_per_clip if spec.jitter_per_frame else 1
        jitter = uniforms(seed, epoch, position, _JITTER, rows * 8).reshape(rows, 8)
    if spec.erasing is not None:
        rows = spec.sampling.frames_per_clip if spec.erasing_per_frame else 1
        erase = uniforms(seed, epoch, position, _ERASE, rows * _ERASE_UNIFORMS).reshape(rows, _ERASE_UNIFORMS)
    return Draws(
        temporal=uniforms(seed, epoch, position, _TEMPORAL, uniforms_needed(spec.sampling)),
        crop=uniforms(seed, epoch, position, _CROP, _CROP_UNIFORMS).tolist(),
        flip=float(uniforms(seed, epoch, position, _FLIP, 1)[0]),
        jitter=jitter,
        erase=erase,
    )


def resolve(draws: Draws, facts: Facts, spec: TrainSpec, sample: int) -> Plan:
    """Turn the draws of a position into the plan of a clip of this video.

    Raises:
        MediaError: the video has no frames or no pixels.
    """
    check_facts(facts, sample)
    jitter = erase = None
    if spec.jitter is not None and draws.jitter is not None:
        jitter = _jitter(draws.jitter, spec.jitter)
    if spec.erasing is not None and draws.erase is not None:
        erase = _erase(draws.erase, spec.erasing, spec.input_size)
    return Plan(
        sample=sample,
        frames=train_frames(spec.sampling, facts.frames, facts.fps, draws.temporal),
        box=TRAIN_CROPS[spec.crop](facts.width, facts.height, draws.crop, spec),
        size=(spec.input_size, spec.input_size),
        flip=spec.flip and draws.flip < 0.5,
        jitter=jitter,
        erase=erase,
    )


def train_spec(cfg: Any) -> TrainSpec:
    """The TrainSpec of a loaded configuration."""
    a = cfg.augmentation
    return TrainSpec(
        sampling=sampling_of(cfg),
        input_size=a.input_size,
        crop=a.crop,
        scales=tuple(a.scales),
        max_distort=a.max_distort,
        more_fix_crop=a.more_fix_crop,
        area=tuple(a.area),
        aspect=tuple(a.aspect),
        flip=cfg.data.flip,
        jitter=None if a.colorjitter is None else tuple(a.colorjitter),
        jitter_per_frame=a.colorjitter_per_frame,
        erasing=None if a.random_erasing is None else tuple(a.random_erasing),
        erasing_per_frame=a.random_erasing_per_frame,
    )


def _jitter(u: NDArray[np.float64], jitter: Sequence[float]) -> NDArray[np.float64]:
    """(F, 8) uniforms -> (F, 8) parameters of ColorJitter as torchvision draws them."""
    b, c, s, hue = jitter
    low = np.array([max(0.0, 1 - b), max(0.0, 1 - c), max(0.0, 1 - s), -hue])
    high = np.array([1 + b, 1 + c, 1 + s, hue])
    rows = np.empty_like(u)
    rows[:, :4] = low + u[:, :4] * (high - low)
    rows[:, 4:] = np.argsort(u[:, 4:], axis=1, kind="stable")
    return rows


def _erase(u: NDArray[np.float64], erasing: Sequence[float], side: int) -> NDArray[np.int64]:
    """(F, 203) uniforms -> (F, 4) boxes y, x, h, w of RandomErasing (Zhong et al., AAAI 2020, algorithm 1)."""
    p, least, most, aspect = erasing
    boxes = np.zeros((len(u), 4), np.int64)
    for row in np.flatnonzero(u[:, 0] < p):
        numbers = u[row]
        for i in range(1, 1 + 2 * _ERASE_TRIES, 2):
            pixels = (least + float(numbers[i]) * (most - least)) * side * side
            ratio = aspect + float(numbers[i + 1]) * (1 / aspect - aspect)  # h / w: uniform, as published
            h, w = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < h < side and 0 < w < side:
                y, x = int(numbers[-2] * (side - h + 1)), int(numbers[-1] * (side - w + 1))
                boxes[row] = (min(y, side - h), min(x, side - w), h, w)
                break
    return boxes


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
    # PP-TSM takes 224 of 256 pixels; other sizes keep the proportion.
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


#: `augmentation.crop` -> box on the source frame; "centre" is the largest central square, for tests without chance.
TRAIN_CROPS: dict[str, Callable[[int, int, Sequence[float], TrainSpec], Box]] = {
    "multi_scale": _multi_scale,
    "multi_scale_random": _multi_scale_random,
    "random_resized": lambda w, h, u, spec: crops.random_resized(w, h, u, area=spec.area, aspect=spec.aspect),
    "random": lambda w, h, u, spec: crops.random_crop(w, h, u, spec.input_size),
    "short_side_jitter": _short_side_jitter,
    "centre": lambda w, h, u, spec: crops.mma_center(w, h, min(w, h)),
}
