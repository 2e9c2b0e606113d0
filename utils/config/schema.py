"""Every key of `config.yaml`: its name, type, default, meaning and unit. The only place where they stand.

What is special:

- The YAML names are the attribute names: `common.lr_scheduler.base_lr` is `cfg.lr_scheduler.base_lr`.
- `docs/config.md` and `exps/config.schema.json` are written from these models by
  `python main.py config --docs --schema`.
- A key marked `free` may change on resume: the run then still trains on the same samples with the same mathematics.
- Rules between keys stand in `rules.py`; `model.kwargs` is checked against the code of methods/ and networks/
  (`model_options.py`). Here is only what one key alone can get wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr
from pydantic.fields import FieldInfo


def key(meaning: str, *, default: Any = ..., free: bool = False, **limits: Any) -> Any:
    """One config key: required unless it has a default; `free` keys may change on resume."""
    return Field(default, description=meaning, json_schema_extra={"free": free}, **limits)


def section(meaning: str, *, default: Any = ...) -> Any:
    """A group of keys; `default` is its class where every key has a default."""
    if default is ...:
        return Field(description=meaning)
    return Field(default_factory=default, description=meaning)


def _off_is_none(value: Any) -> Any:
    return None if value is False or (value == 0 and isinstance(value, (int, float))) else value


def _off_is_zero(value: Any) -> Any:
    return 0.0 if value is False or value is None else value


def _switch_or_text(value: Any) -> Any:
    if not isinstance(value, bool) and not (isinstance(value, str) and value):
        raise ValueError("must be true, false or a path")
    return value


def _auto_or_base(value: Any) -> Any:
    if isinstance(value, bool) or value not in ("auto", 0, 1):
        raise ValueError("must be auto, 0 or 1")
    return value


def _frame_template(value: str) -> str:
    if value != "auto" and not re.fullmatch(r"[^{}]*\{(:0?\d+d?)?\}[^{}]*", value):
        raise ValueError("must be auto or a file name with one frame number, like {:06d}.jpg or img_{:05d}.jpg")
    return value


def _range(low: float, high: float) -> AfterValidator:
    """Each number of a sequence lies in [low, high]."""

    def check(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        wrong = [value for value in values or () if not low <= value <= high]
        if wrong:
            raise ValueError(f"each number must lie between {low:g} and {high:g}, {wrong[0]:g} does not")
        return values

    return AfterValidator(check)


def _ascending(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if values and values[0] > values[1]:
        raise ValueError(f"the first number is the lower end of the range: [{values[1]:g}, {values[0]:g}]")
    return values


def _jitter(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if values and (min(values) < 0 or values[3] > 0.5):
        raise ValueError("strengths must not be negative, and the hue (the fourth) must be at most 0.5")
    return values


def _erasing(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if values:
        probability, small, large, aspect = values
        if not (0 <= probability <= 1 and 0 < small <= large <= 1 and 0 < aspect <= 1):
            raise ValueError("[p, sl, sh, r1] needs 0 <= p <= 1, 0 < sl <= sh <= 1 and 0 < r1 <= 1")
    return values


def _positive(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if values and min(values) <= 0:
        raise ValueError(f"each number must be greater than 0, {min(values):g} is not")
    return values


def _increasing(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if values and any(a >= b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError("must increase from one number to the next")
    return values


Switchable = Literal[False] | None
Numbers = tuple[float, ...]
Two = Annotated[Numbers, Field(min_length=2, max_length=2)]
Three = Annotated[Numbers, Field(min_length=3, max_length=3)]
Four = Annotated[Numbers, Field(min_length=4, max_length=4)]
OffOrFour = Annotated[Four | None, BeforeValidator(_off_is_none, json_schema_input_type=Four | Switchable)]
OffOrPositive = Annotated[
    Annotated[float, Field(gt=0)] | None,
    BeforeValidator(_off_is_none, json_schema_input_type=Annotated[float, Field(ge=0)] | Switchable),
]
Steps = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Length = Annotated[float, Field(gt=0)]


class Strict(BaseModel):
    """No unknown keys, no silent conversion (`"3"` and `true` are not numbers), no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Model(Strict):
    """common.model."""

    type: str = key("recognition method: the name of a file in methods/")
    backbone: str = key("2D network: the name of a builder in networks/")
    num_segments: int = key("segments a video is cut into; one clip is taken from each", ge=1)
    num_class: int = key("number of classes; labels run from 0 to num_class - 1", ge=2)
    dropout: float = key(
        "probability of dropping a feature before the last layer; 0 = no dropout", default=0.5, ge=0, lt=1
    )
    pretrained: Annotated[bool | str, BeforeValidator(_switch_or_text, json_schema_input_type=bool | str)] = key(
        "starting weights: true = ImageNet file in pretrained/, false = random, or a weights file or experiment folder",
        default=False,
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="options of the method and the backbone, and bn_group_size, bn_sync_stats, bn_var_mode",
        json_schema_extra={"free": False},
    )


class BatchNorm(Strict):
    """The keys of common.model.kwargs that belong to neither a method nor a backbone."""

    bn_group_size: int = key(
        "neighbouring shards (first-start ranks) that share batch-norm statistics; 1 = none", default=1, ge=1
    )
    bn_sync_stats: bool = key("average the running statistics over all shards after every step", default=False)
    bn_var_mode: Literal["L2"] = key(
        "norm of the variance; the L1 variant of seed 004's library is not available", default="L2"
    )


class Augmentation(Strict):
    """common.augmentation."""

    input_size: int = key("height and width of a training clip and of an evaluation crop, pixels", default=224, ge=8)
    test_resize: int = key("short side of a video before the evaluation crop, pixels", default=256, ge=8)
    crop: Literal["multi_scale", "random_resized", "random", "centre"] = key(
        "how the training crop is drawn", default="multi_scale"
    )
    scales: Annotated[Numbers, Field(min_length=1), _range(0.01, 1)] = key(
        "multi_scale: crop sides as shares of the short side", default=(1.0, 0.875, 0.75, 0.66)
    )
    max_distort: int = key("multi_scale: how many entries of scales width and height may lie apart", default=1, ge=0)
    more_fix_crop: bool = key("multi_scale: 13 crop positions instead of 5", default=True)
    area: Annotated[Two, _range(1e-4, 1), AfterValidator(_ascending)] = key(
        "random_resized: range of the crop's share of the frame's area", default=(0.08, 1.0)
    )
    aspect: Annotated[Two, _range(0.01, 100), AfterValidator(_ascending)] = key(
        "random_resized: range of width / height", default=(0.75, 1.3333333333)
    )
    colorjitter: Annotated[OffOrFour, AfterValidator(_jitter)] = key(
        "[brightness, contrast, saturation, hue] strengths, or false", default=None
    )
    colorjitter_per_frame: bool = key("draw the colour jitter for each frame, not once per clip", default=False)
    random_erasing: Annotated[OffOrFour, AfterValidator(_erasing)] = key(
        "[p, sl, sh, r1]: probability, least and largest share of the area, least aspect; or false", default=None
    )
    random_erasing_per_frame: bool = key("draw the erased box for each frame, not once per clip", default=False)
    mix_up: OffOrPositive = key("alpha of the Beta distribution that mixes neighbouring clips, or false", default=None)
    mean: Annotated[Three, _range(0, 1)] = key("RGB mean subtracted from pixels in 0..1", default=(0.485, 0.456, 0.406))
    std: Annotated[Three, AfterValidator(_positive)] = key(
        "RGB standard deviation divided by", default=(0.229, 0.224, 0.225)
    )


class LrScheduler(Strict):
    """common.lr_scheduler."""

    type: Literal["COSINE", "STEP"] = key("shape of the learning rate after the warm-up")
    base_lr: float = key(
        "learning rate at iteration 0, where the warm-up starts (the peak if there is no warm-up)", gt=0
    )
    warmup_steps: Steps | None = key("iterations of linear warm-up from base_lr to warmup_lr; 0 = none", default=None)
    warmup_epochs: Annotated[float, Field(ge=0)] | None = key(
        "warm-up in epochs, instead of warmup_steps", default=None
    )
    warmup_lr: Length | None = key("peak learning rate, reached at the end of the warm-up", default=None)
    min_lr: float = key("COSINE: learning rate at max_iter", default=0.0, ge=0)
    max_iter: Count | None = key("length of the run in iterations (global batches)", default=None)
    max_epoch: Length | None = key("length of the run in epochs, instead of max_iter", default=None)
    lr_steps: Annotated[tuple[Count, ...], AfterValidator(_increasing)] | None = key(
        "STEP: iterations at which the rate changes", default=None
    )
    lr_epochs: Annotated[tuple[Length, ...], AfterValidator(_increasing)] | None = key(
        "STEP: the same in epochs, instead of lr_steps", default=None
    )
    lr_mults: Annotated[Numbers, AfterValidator(_positive)] | None = key(
        "STEP: factor at each of lr_steps, on the rate of the moment", default=None
    )


class Data(Strict):
    """common.data."""

    reader: Literal["frames", "video"] = key(
        "frames = folders of JPEG files, video = video files", default="frames", free=True
    )
    template: Annotated[str, AfterValidator(_frame_template)] = key(
        "file name of a frame; auto = found by looking", default="auto"
    )
    frame_base: Annotated[int | str, BeforeValidator(_auto_or_base, json_schema_input_type=Literal["auto", 0, 1])] = (
        key("number of the first frame file, 0 or 1; auto = found by looking", default="auto")
    )
    class_names: str | None = key(
        "file with the class names; default: classInd.txt beside the training list", default=None, free=True
    )
    sampling: Literal["tsn", "tsm_dense", "mm0", "mm1", "pysf", "pp", "seed004"] = key(
        "whose rule picks the frames of a clip (docs/decisions.md lists them)", default="seed004"
    )
    clip_len: int = key("frames taken from each segment", default=1, ge=1)
    frame_interval: int = key("distance of these frames, in frames of the video", default=1, ge=1)
    on_bad: Literal["error", "skip", "substitute"] = key(
        "a video that cannot be read: stop, skip it (loss weight 0), or take another one", default="skip"
    )
    bad_budget: float = key(
        "share of an epoch's samples that may be bad before the run stops", default=0.001, ge=0, le=1, free=True
    )
    flip: bool = key("mirror half of the training clips; off where left and right matter", default=True)
    deadline_seconds: float = key(
        "seconds a worker may spend on one video before it counts as bad", default=60.0, gt=0, free=True
    )
    prefetch: int = key("micro-batches read ahead per rank", default=2, ge=1, free=True)


class Config(Strict):
    """common: one experiment."""

    model: Model = section("the network")
    augmentation: Augmentation = section("what happens to the pixels", default=Augmentation)
    val_dense: bool = key("validate on 10 crops (4 corners, centre, mirrored) instead of 1 centre crop", default=False)
    workers: int = key("reading processes per rank; 0 = read in the rank, no deadlines", default=2, ge=0, free=True)
    batch_size: int = key("clips per shard: per rank at the first start; global batch = batch_size x ranks", ge=1)
    shards: Count | None = key(
        "shards of a global batch; default: the number of ranks at the first start", default=None
    )
    lr_scheduler: LrScheduler = section("learning rate and length of the run")
    label_smooth: Annotated[
        float, Field(ge=0, lt=1), BeforeValidator(_off_is_zero, json_schema_input_type=float | Switchable)
    ] = key("share of the target spread over all num_class classes; 0 or false = off", default=0.0)
    no_wd: bool = key("no weight decay on biases and batch-norm parameters", default=False)
    policy: bool = key("TSN's parameter groups with their own learning-rate and decay multipliers", default=False)
    momentum: float = key("momentum of SGD", default=0.9, ge=0, lt=1)
    weight_decay: float = key("weight decay of SGD", default=1e-4, ge=0)
    nesterov: bool = key("Nesterov's form of the momentum", default=False)
    val_freq: Count | None = key("iterations between validations; each also saves", default=None, free=True)
    val_freq_epochs: Length | None = key("the same in epochs, instead of val_freq", default=None, free=True)
    print_freq: int = key(
        "iterations between log lines, and the window of the logged averages", default=10, ge=1, free=True
    )
    train_root: str = key("folder in front of the paths of train_source", min_length=1, free=True)
    train_source: str = key("list of training videos, `path num_frames label` per line", min_length=1, free=True)
    val_root: str = key("folder in front of the paths of val_source", min_length=1, free=True)
    val_source: str = key("list of validation videos", min_length=1, free=True)
    data: Data = section("how videos are found, sampled and read", default=Data)
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = key(
        "number format; bf16 and fp16 keep float32 weights (autocast), fp64 is for tests", default="fp32"
    )
    clip_grad: OffOrPositive = key(
        "largest norm of the gradient, larger ones are scaled down; false = off", default=None
    )
    compile: bool = key("torch.compile the model", default=False, free=True)
    seed: int = key(
        "start of all random numbers: order, augmentation, initial weights, dropout", default=0, ge=0, lt=2**63
    )
    deterministic: bool = key("only algorithms that give the same bits every time", default=False, free=True)
    save_minutes: float = key("minutes between checkpoints, besides those of val_freq", default=10.0, gt=0, free=True)
    watchdog_minutes: float = key(
        "minutes without progress until the run says where it hangs and stops", default=10.0, gt=0, free=True
    )

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def origin(self, key: str) -> str:
        """Where the value of a dotted key (without `common.`) comes from: `file:line`, `--set`, default or computed."""
        return self._origins.get(key, "default")


# Two ways to say one thing: at most one of each pair may be given, exactly one where the flag is True.
PAIRS = (
    ("lr_scheduler.max_iter", "lr_scheduler.max_epoch", True),
    ("val_freq", "val_freq_epochs", True),
    ("lr_scheduler.warmup_steps", "lr_scheduler.warmup_epochs", False),
    ("lr_scheduler.lr_steps", "lr_scheduler.lr_epochs", False),
)


def leaves(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key that holds a value, in the order in which they stand above."""
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def sections(model: type[BaseModel] = Config) -> dict[str, type[BaseModel]]:
    """The keys that hold a group of keys; the root has the empty name."""
    inner = {name: info.annotation for name, info in model.model_fields.items()}
    nested = {name: kind for name, kind in inner.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}
    return {"": model, **nested}


def is_free(key: str) -> bool:
    """True if changing this dotted key on resume does not change the meaning of the run."""
    return key in FREE


def _free_keys() -> frozenset[str]:
    return frozenset(
        name
        for name, info in leaves()
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("free")
    )


FREE = _free_keys()
