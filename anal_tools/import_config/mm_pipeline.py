"""Convert the pipelines of an MMAction2 config: frames, crops, augmentations, test views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from anal_tools.import_config.draft import Draft
from anal_tools.import_config.mm_model import normalisation
from anal_tools.import_config.source import ForeignDict
from utils.errors import UserError

# Steps that decode, pack or change the layout: nothing here could differ.
PLUMBING = (
    *("DecordInit", "DecordDecode", "PyAVInit", "PyAVDecode", "OpenCVInit", "OpenCVDecode", "DALIInit", "Rename"),
    *("RawFrameDecode", "FormatShape", "PackActionInputs", "Collect", "ToTensor", "Fuse", "ToDataContainer"),
)
SAMPLERS = ("SampleFrames", "DenseSampleFrames")
CROPS = ("MultiScaleCrop", "RandomResizedCrop", "RandomCrop", "CenterCrop", "ThreeCrop", "TenCrop")
ON_SOURCE = "the crop is cut directly from the source frame; shares of the frame stay the same"


def take_training(steps: Sequence[ForeignDict], draft: Draft, era: int, file: Path) -> None:
    """Fill sampling, crop and augmentations from the training pipeline of a file; `era` is 0 (0.x) or 1 (1.x)."""
    for step in steps:
        name = step.text("type")
        if name in PLUMBING:
            step.skip(*map(str, step.values))
        elif name in TRAINING:
            step.skip("type", "lazy", "interpolation")
            if name in SAMPLERS:
                _sampling(step, draft, era)
            else:
                TRAINING[name](step, draft)
        else:
            # A wrong recipe is worse than none
            step.fail("type", f"{name!r} is not supported here; remove it, or replace it by the closest augmentation")

    # Without such a step our defaults would add a crop and mirroring
    if "model.num_segments" not in draft.values:
        raise UserError(f"{file}: the training pipeline does not define the frames of a clip ({', '.join(SAMPLERS)})")
    if "augmentation.crop" not in draft.values:
        draft.ours_only("augmentation.crop", "centre", "their pipeline has no crop")
    if "data.flip" not in draft.values:
        draft.ours_only("data.flip", False, "their pipeline has no Flip")


def _sampling(step: ForeignDict, draft: Draft, era: int) -> None:
    # TPN is 3D if its base is
    is_3d = (
        draft.values["model.type"] in ("slowonly", "slowfast", "videomae")
        or draft.values.get("model.kwargs.base") == "slowonly"
    )

    length, interval, clips = step.count("clip_len", 1), step.count("frame_interval", 1), step.count("num_clips", 1)
    if is_3d and clips != 1:
        step.fail("num_clips", f"{clips} training clips of a video; a 3D network trains on one here")

    draft.exact("model.num_segments", clips, step, "num_clips")
    if step.text("type") == "DenseSampleFrames":
        if length != 1 or step.count("sample_range", 64) != 64:
            step.fail("sample_range", "dense clips are single frames of a range of 64 here")
        draft.exact("data.sampling", "tsm_dense", step, "type", "clip_len", "frame_interval", "sample_range")
        step.skip("num_sample_positions")
    else:
        # MMAction2 1.x and 0.x compute different offsets: two presets
        draft.exact("data.sampling", f"mmaction2_{era}x", step, "type")
        draft.exact("data.clip_len", length, step, "clip_len")
        draft.exact("data.frame_interval", interval, step, "frame_interval")

    step.skip("test_mode", "start_index")
    for key, usual in (
        ("temporal_jitter", False),
        ("keep_tail_frames", False),
        ("out_of_bound_opt", "loop"),
        ("target_fps", None),
    ):
        if step.raw(key) not in (None, usual):
            draft.left_out(step, key, note=f"clips are drawn as with {key}={usual!r}")


def _side(step: ForeignDict, key: str) -> int:
    """Return a side in pixels; a pair of sides must be a square."""
    value = step.raw(key)
    if isinstance(value, list | tuple):
        pair = step.numbers(key)
        if len(pair) != 2 or pair[0] != pair[1]:
            step.fail(key, "crops are squares here")
        return int(pair[0])
    return step.count(key)


def _resize(step: ForeignDict, draft: Draft) -> None:
    """Convert a resize: one before the crop changes no crop box; one after it is the size of the clip."""
    scale = step.numbers("scale")
    if step.flag("keep_ratio", True):
        # keep_ratio marks the one before the crop
        draft.built_in(step, "scale", "keep_ratio", note=ON_SOURCE)
        # A scale as (-1, 256) or (inf, 256): the finite side is the short one
        draft.values["augmentation.test_resize"] = int(
            max(1, min((side for side in scale if 0 < side < 1e6), default=256))
        )
    else:
        draft.exact("augmentation.input_size", _side(step, "scale"), step, "scale", "keep_ratio")


def _multi_scale(step: ForeignDict, draft: Draft) -> None:
    draft.exact("augmentation.crop", "multi_scale", step, "type")
    draft.exact("augmentation.input_size", _side(step, "input_size"), step, "input_size")
    draft.exact("augmentation.scales", step.numbers("scales", (1,)), step, "scales")
    draft.exact("augmentation.max_distort", step.count("max_wh_scale_gap", 1), step, "max_wh_scale_gap")
    # The crops of TSN lie at 5 or 13 fixed places
    if step.flag("random_crop", False):
        draft.left_out(step, "random_crop", note="crops have fixed positions here, 5 or 13")
    draft.exact("augmentation.more_fix_crop", step.count("num_fixed_crops", 5) == 13, step, "num_fixed_crops")
    step.skip("random_crop")


def _random_resized(step: ForeignDict, draft: Draft) -> None:
    draft.exact("augmentation.crop", "random_resized", step, "type")
    draft.exact("augmentation.area", step.numbers("area_range", (0.08, 1.0)), step, "area_range")
    # Rounded, so that 4/3 is short in the file
    aspect = [round(value, 10) for value in step.numbers("aspect_ratio_range", (3 / 4, 4 / 3))]
    draft.exact("augmentation.aspect", aspect, step, "aspect_ratio_range")


def _rescale(step: ForeignDict, draft: Draft) -> None:
    low, high = (*step.numbers("scale_range"), 0, 0)[:2]
    draft.values["augmentation.crop"] = "short_side_jitter"
    note = "with RandomCrop: the short side is 256 to 320 for crops of 224, in proportion for others"
    same = (low, high) == (256, 320)
    draft.built_in(step, "scale_range", note=note) if same else draft.left_out(step, "scale_range", note=note)


def _random(step: ForeignDict, draft: Draft) -> None:
    draft.exact("augmentation.input_size", _side(step, "size"), step, "size")
    if draft.values.get("augmentation.crop") != "short_side_jitter":
        note = "the square is that many pixels of the source frame, not of the resized one"
        draft.other("augmentation.crop", "random", step, "type", note=note, comment=note)


def _centre(step: ForeignDict, draft: Draft) -> None:
    draft.exact("augmentation.input_size", _side(step, "crop_size"), step, "crop_size")
    draft.other("augmentation.crop", "centre", step, "type", note="the largest central square of the frame")


def _flip(step: ForeignDict, draft: Draft) -> None:
    ratio = step.number("flip_ratio", 0.5)
    if step.text("direction", "horizontal") != "horizontal":
        step.fail("direction", "clips are mirrored from left to right here")
    step.skip("direction", "left_kp", "right_kp")  # key points are for skeletons

    if ratio in (0, 0.5):
        draft.exact("data.flip", ratio == 0.5, step, "flip_ratio")
    else:
        draft.other("data.flip", True, step, "flip_ratio", note="half of the clips are mirrored")

    labels = step.raw("flip_label_map")
    if labels:
        if not isinstance(labels, Mapping) or not all(isinstance(one, int) for pair in labels.items() for one in pair):
            step.wrong("flip_label_map", "a dict of class numbers")
        # The map holds both directions of each pair; ours each pair once
        pairs = sorted([left, right] for left, right in labels.items() if left < right)
        if any(labels.get(right) != left for left, right in labels.items()):
            step.fail("flip_label_map", "classes are exchanged in pairs here")
        draft.exact("data.flip_labels", pairs, step, "flip_label_map")


def _jitter(step: ForeignDict, draft: Draft) -> None:
    strengths = []
    for key, default in (("brightness", 0.5), ("contrast", 0.5), ("saturation", 0.5), ("hue", 0.1)):
        if isinstance(step.raw(key), list | tuple):
            step.fail(key, "a strength is one number here")
        strengths.append(step.number(key, default))

    note = "there one order of the four for the whole run and a contrast by grey of 8 bits; here an order per clip"
    draft.other(
        "augmentation.colorjitter", strengths, step, "type", "brightness", "contrast", "saturation", "hue", note=note
    )
    draft.left_out(
        step, "color_space_aug", "alpha_std", "eig_val", "eig_vec", note="the noise along principal colours is not here"
    )


def _erasing(step: ForeignDict, draft: Draft) -> None:
    aspect = step.numbers("aspect_range", (0.3, 10 / 3))
    values = [
        step.number("erase_prob", 0.5),
        step.number("min_area_ratio", 0.02),
        round(step.number("max_area_ratio", 1 / 3), 10),
        round(aspect[0], 10),
    ]

    keys = ("type", "erase_prob", "min_area_ratio", "max_area_ratio", "aspect_range")
    note = "there the logarithm of the aspect is uniform and the fill is fill_color; here as random_erasing_mode says"
    draft.other("augmentation.random_erasing", values, step, *keys, note=note)
    if step.text("mode", "const") == "rand":
        draft.other("augmentation.random_erasing_mode", "pixel", step, "mode", note="normal noise instead of uniform")
    step.skip("mode", "fill_color", "fill_std")


def _wrapped(step: ForeignDict, draft: Draft) -> None:
    if step.text("op") != "RandAugment":
        step.fail("op", f"{step.text('op')!r} is not supported here; use RandAugment")

    strength, count, share = step.number("magnitude", 9), step.count("num_layers", 2), step.number("prob", 0.5)
    # timm's text form of a policy; mstd and inc are those of pytorchvideo
    policy = f"rand-m{strength:g}-n{count}-p{share:g}-mstd0.5-inc1"
    note = "the operations and their strengths are timm's, there pytorchvideo's"
    draft.other("augmentation.randaugment", policy, step, "op", "magnitude", "num_layers", note=note)
    step.skip("prob")


# Type of a training step: function that converts it
TRAINING: Mapping[str, Callable[[ForeignDict, Draft], None]] = {
    # take_training converts samplers itself: they need `era`
    **dict.fromkeys(SAMPLERS, lambda step, draft: None),
    "Resize": _resize,
    "MultiScaleCrop": _multi_scale,
    "RandomResizedCrop": _random_resized,
    "RandomRescale": _rescale,
    "RandomCrop": _random,
    "CenterCrop": _centre,
    "Flip": _flip,
    "ColorJitter": _jitter,
    "RandomErasing": _erasing,
    "PytorchVideoWrapper": _wrapped,
    "Normalize": lambda step, draft: (normalisation(step, draft), step.skip("to_bgr", "to_rgb"))[0],
}


# ----------------------------------------------------------------------------------------------------------------- test


class Views:
    """What a pipeline of validation or test takes from a video: clips, crops and sizes."""

    def __init__(self, steps: Sequence[ForeignDict], draft: Draft) -> None:
        # Defaults of MMAction2 if a step is missing
        self.clips, self.segments, self.length, self.interval = 1, 1, 1, 1
        self.crops, self.crop, self.short = "centre", 0, 0
        for step in steps:
            name = step.text("type")
            if name in SAMPLERS:
                self.sampling(step, dense=name == "DenseSampleFrames")
            elif name == "Resize":
                # The finite sides: -1 and inf stand for "in proportion"
                sides = [side for side in step.numbers("scale") if 0 < side < 1e6]
                self.short = int(min(sides, default=0))
            elif name in ("CenterCrop", "ThreeCrop", "TenCrop"):
                self.crops = {"CenterCrop": "1", "ThreeCrop": "3", "TenCrop": "10"}[name]
                self.crop = _side(step, "crop_size")
            elif name in PLUMBING or name in ("Normalize", "Flip"):
                pass
            else:
                draft.left_out(step, "type", note="evaluation uses no augmentation here")

            step.skip(*map(str, step.values))

    def sampling(self, step: ForeignDict, *, dense: bool) -> None:
        """Read clips, segments, frames and interval of a sampler."""
        self.length, self.interval = step.count("clip_len", 1), step.count("frame_interval", 1)
        self.segments = step.count("num_clips", 1)

        if dense:
            self.clips = step.count("num_sample_positions", 10)
        elif step.flag("twice_sample", False):
            # twice_sample: each segment twice, at its middle and next to it
            self.clips = 2


def take_validation(steps: Sequence[ForeignDict], draft: Draft) -> Views | None:
    """Fill the sizes of validation; return its views, None without a pipeline."""
    if not steps:
        return None

    views = Views(steps, draft)
    # "val_pipeline[3]" without the index
    place = steps[0].name.rpartition("[")[0]
    draft.values["augmentation.test_resize"] = views.short or draft.values.get("augmentation.test_resize", 256)

    trained = draft.values.get("augmentation.input_size")
    if trained is None:
        # A config that only tests has no training crop
        draft.values["augmentation.input_size"] = views.crop or views.short
    elif views.crop and views.crop != trained:
        draft.note(place, f"validation crops {views.crop} pixels there; here input_size, {trained}")

    if views.clips > 1 or views.crops not in ("centre", "1"):
        draft.note(place, f"validation shows {views.clips} clip(s) x {views.crops} crop(s) there; one centre view here")

    return views


def take_test(steps: Sequence[ForeignDict], draft: Draft, average: str) -> None:
    """Set the options of `eval.sh` that repeat their test."""
    if not steps:
        return
    if "model.num_segments" not in draft.values:
        raise UserError(f"{steps[0].file}: no training pipeline defines the frames of a clip ({', '.join(SAMPLERS)})")

    views = Views(steps, draft)
    place = steps[0].name.rpartition("[")[0]
    # A 3D model: clips of several frames, where num_clips counts views and no segments
    is_3d = draft.values["data.clip_len"] != 1 if "data.clip_len" in draft.values else False
    segments, clips = int(str(draft.values["model.num_segments"])), views.clips
    if is_3d:
        clips *= views.segments

    crops = {"centre": "1"}.get(views.crops, views.crops)
    options = f"--scale {views.short} --crop-size {views.crop or views.short} --average {average}"

    if not is_3d and views.segments != segments:
        # The one protocol here with more segments than the model was trained on
        if (views.segments, crops) != (25, "10"):
            draft.note(
                place,
                f"their test takes {views.segments} segments of a model of {segments}; there is no such protocol here",
            )
            return
        draft.test = f"--protocol tsn-25x10 {options}"
    else:
        draft.test = f"--views {clips}x{crops} {options}"
    draft.test_row(place)
