"""Plan an evaluation: which clips and crops of a video it uses, and `resolve_eval`. Pure, torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.plan import crops
from datasets.plan.crops import Box, Size
from datasets.plan.metadata import VideoMetadata, check_metadata
from datasets.plan.sampling import Sampling, check_clips, sampling_of, test_frames
from utils.errors import UserError


@dataclass(frozen=True)
class CropRule:
    """The places of the crops of one clip.

    Attributes:
        boxes: (w, h, crop) -> boxes on a frame of w x h pixels.
        places: a name for each crop.
        mirrored: every crop is shown twice, unchanged and mirrored.
        whole_side: the crop must be as large as the short side (as MMAction2's ThreeCrop requires).
    """

    boxes: Callable[[int, int, int], Sequence[Box]]
    places: tuple[str, ...]
    mirrored: bool = False
    whole_side: bool = False

    def __len__(self) -> int:
        return len(self.places) * (2 if self.mirrored else 1)

    def views(self, w: int, h: int, crop: int) -> list[tuple[str, Box, bool]]:
        """Return (place, box, flip) of each view of a clip."""
        flips = (False, True) if self.mirrored else (False,)
        named = zip(self.places, self.boxes(w, h, crop), strict=True)
        return [(place, box, flip) for place, box in named for flip in flips]


_FIVE = ("left top", "right top", "left bottom", "right bottom", "centre")
_LEFT_CENTRE_RIGHT = ("left or top", "centre", "right or bottom")


def _three(w: int, h: int, crop: int) -> list[Box]:
    """Return the ends of the long side and, between them, the crop of `centre`, so that `three` contains it."""
    first, _, last = crops.pyslowfast_uniform(w, h, crop)
    return [first, crops.mmaction2_center(w, h, crop), last]


#: Views in space of each clip. Plain names are this project's. The others keep a tool's order and rounding: PySlowFast
#: (pyslowfast), MMAction2 (mmaction2), the TSM repository (tsm), V-JEPA 2. `ten` is the same in TSN, TSM, MMAction2 and
#: PaddleVideo.
EVAL_CROPS: dict[str, CropRule] = {
    "centre": CropRule(lambda w, h, crop: [crops.mmaction2_center(w, h, crop)], ("centre",)),
    "centre_pyslowfast": CropRule(lambda w, h, crop: crops.pyslowfast_uniform(w, h, crop)[1:2], ("centre",)),
    "centre_tsm": CropRule(lambda w, h, crop: [crops.paddle_center(w, h, crop)], ("centre",)),
    "three": CropRule(_three, _LEFT_CENTRE_RIGHT),
    "three_pyslowfast": CropRule(crops.pyslowfast_uniform, _LEFT_CENTRE_RIGHT),
    "three_mmaction2": CropRule(crops.mmaction2_three, ("left or top", "right or bottom", "centre"), whole_side=True),
    "three_tsm": CropRule(crops.tsm_fullres, ("left", "right", "centre")),
    "three_vjepa2": CropRule(crops.vjepa2_uniform, _LEFT_CENTRE_RIGHT),
    "ten": CropRule(crops.five_places, _FIVE, mirrored=True),
}

#: How each tool rounds the long side when the short side is scaled: (w, h, short) -> (w, h).
ROUNDINGS: dict[str, Callable[[int, int, int], Size]] = {
    "mmaction2": crops.mmaction2_rescale,
    "pyslowfast": crops.pyslowfast_short_side,
    "tsm": crops.tsm_group_scale,
}


@dataclass(frozen=True)
class EvalSpec:
    """The views that an evaluation takes of each video.

    Args:
        sampling: frames of a clip.
        num_clips: clips in time.
        crops: a key of `EVAL_CROPS`: views in space of each clip.
        scale: short side of the whole frame in pixels.
        crop_size: side of a crop in pixels.
        rounding: a key of `ROUNDINGS`, for the long side.

    Raises:
        UserError: a crop larger than the scaled frame, unknown `crops`, or clips that the preset does not define.
    """

    sampling: Sampling
    num_clips: int = 1
    crops: str = "centre"
    scale: int = 256
    crop_size: int = 224
    rounding: str = "mmaction2"

    def __post_init__(self) -> None:
        if self.crops not in EVAL_CROPS:
            raise UserError(f"crops: unknown views {self.crops!r}; choose one of {', '.join(EVAL_CROPS)}")
        if self.rounding not in ROUNDINGS:
            raise UserError(f"rounding: {self.rounding!r} is not one of {', '.join(ROUNDINGS)}")

        if self.crop_size > self.scale:
            raise UserError(
                f"an evaluation crop of {self.crop_size} pixels does not fit into frames with a short side of "
                f"{self.scale}: make augmentation.input_size smaller or augmentation.test_resize larger"
            )
        if EVAL_CROPS[self.crops].whole_side and self.crop_size != self.scale:
            raise UserError(
                f"crops: {self.crops} needs crops as large as the short side; {self.crop_size} is not {self.scale}"
            )

        check_clips(self.sampling, self.num_clips)

    @property
    def crops_per_clip(self) -> int:
        """S, views in space of each clip."""
        return len(EVAL_CROPS[self.crops])

    @property
    def views(self) -> int:
        """V, views of each video."""
        return self.num_clips * self.crops_per_clip


@dataclass(frozen=True, eq=False)
class VideoPlan:
    """All views of one video. Its distinct frames are read once, whole, at test scale; views are cropped from them.

    Views are ordered clip by clip, and within a clip as in `EVAL_CROPS`.

    Attributes:
        sample: index of the record.
        frames: (F,) int64 ordinals, sorted and distinct. For a damaged frame, the ordinal of the frame shown instead.
        size: (h, w) to which whole frames are scaled.
        clip_rows: (V, T) int64: rows of `frames` that make each view.
        boxes: (V, 4) int64: x1, y1, x2, y2 on the scaled frame.
        flips: (V,) bool: mirror the crop.
    """

    sample: int
    frames: NDArray[np.int64]
    size: Size
    clip_rows: NDArray[np.int64]
    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]


def boxes_by_example(spec: EvalSpec, sizes: Sequence[Size] = ((320, 240), (240, 320), (640, 360))) -> dict[str, object]:
    """Return the crops on frames of some sizes, as plain values for a JSON file, for programs that crop elsewhere.

    Returns:
        "WxH" -> `scaled` (w, h) and `crops`, each with `box` (x1, y1, x2, y2) on the scaled frame and `flip`.
    """
    examples: dict[str, object] = {}
    for width, height in sizes:
        w, h = ROUNDINGS[spec.rounding](width, height, spec.scale)
        views = EVAL_CROPS[spec.crops].views(w, h, spec.crop_size)
        crops = [{"place": place, "box": list(box), "flip": flip} for place, box, flip in views]
        examples[f"{width}x{height}"] = {"scaled": [w, h], "crops": crops}

    return examples


def resolve_eval(metadata: VideoMetadata, spec: EvalSpec, sample: int) -> VideoPlan:
    """Return the views of one video. They are not random.

    Raises:
        MediaError: the video has no frames or no pixels.
    """
    check_metadata(metadata, sample)

    clips = test_frames(spec.sampling, metadata.frames, metadata.fps, spec.num_clips)  # (clips, T)
    frames, rows = np.unique(clips, return_inverse=True)

    # The same crops for every clip, on the scaled frame.
    w, h = ROUNDINGS[spec.rounding](metadata.width, metadata.height, spec.scale)
    views = EVAL_CROPS[spec.crops].views(w, h, spec.crop_size)
    return VideoPlan(
        sample=sample,
        frames=frames,
        size=(h, w),
        clip_rows=np.repeat(rows.reshape(clips.shape), len(views), axis=0),  # (clips, T) -> (V, T)
        boxes=np.tile(np.array([box for _, box, _ in views], np.int64), (spec.num_clips, 1)),  # (S, 4) -> (V, 4)
        flips=np.tile(np.array([flip for _, _, flip in views], np.bool_), spec.num_clips),  # (S,) -> (V,)
    )


def view_table(spec: EvalSpec, boxes: NDArray[np.int64] | None) -> list[dict[str, Any]]:
    """Return each view as a row: clip, crop, place, flip, and its box on the scaled frame of one video, (V, 4)."""
    rule = EVAL_CROPS[spec.crops]
    # One place per view: mirrored rules list each place twice, unchanged and mirrored.
    places = [place for place in rule.places for _ in range(len(rule) // len(rule.places))]

    table = []
    for view in range(spec.views):
        clip, crop = divmod(view, len(rule))
        box = None if boxes is None else boxes[view].tolist()
        flip = rule.mirrored and crop % 2 == 1
        table.append({"clip": clip, "crop": crop, "place": places[crop], "box": box, "flip": flip})

    return table


def eval_spec(cfg: Any, views: str | None = None, num_clips: int = 1) -> EvalSpec:
    """Return the EvalSpec of a loaded configuration. `views` None means ten crops with `val_dense`, else the centre."""
    if views is None:
        views = "ten" if cfg.val_dense else "centre"

    a = cfg.augmentation
    return EvalSpec(sampling_of(cfg), num_clips, views, a.test_resize, a.input_size)
