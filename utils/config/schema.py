"""Every key of `config.yaml`: its name, type, default, meaning and unit. Only this file defines them.

- The YAML names are the attribute names: `common.lr_scheduler.base_lr` is `cfg.lr_scheduler.base_lr`.
- `docs/config.md` and `exps/config.schema.json` are written from these models by
  `python main.py config --docs --schema`.
- A key marked `free` may change on resume: the run then still trains on the same samples with the same mathematics.
- Rules between keys are in `rules.py`; `model.kwargs` is checked against the code of methods/ and networks/
  (`model_options.py`). This file checks each key alone; `kinds.py` holds the types.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeGuard, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PrivateAttr
from pydantic.fields import FieldInfo

from utils.config.kinds import (
    ClassPair,
    Count,
    Length,
    LongText,
    Numbers,
    OffOrDecay,
    OffOrFour,
    OffOrPolicy,
    OffOrPositive,
    PathText,
    ShortText,
    Steps,
    Strict,
    Switchable,
    Three,
    Two,
    ascending,
    auto_or_base,
    class_pairs,
    erasing,
    frame_template,
    increasing,
    jitter,
    key,
    off_is_zero,
    pattern,
    section,
    server_list,
    switch_or_bn,
    switch_or_text,
    within,
)

# docs/config.md and the JSON schema print the texts of `key`; the JSON schema prints the class docstrings too.
# Reasons for upper limits; a message quotes them. Limits are generous: no published recipe comes near them.
FRAMES = "no machine has memory for a clip of so many frames"
PIXELS = "no video is larger"
GPUS = "there is one per GPU, and no machine has so many"
DIVERGES = "training diverges long before"
ITERATIONS = "at a thousand iterations per second that would take days"
EPOCHS = "no run sees its videos so often"
SLOW_SERVER = "a reader would wait an hour for a frame that the disk has"
YEARS_WORD = "no run lasts that long"
RATE = 1e30  # a rate times a gradient of this size overflows a 32-bit number (3e38)
HOUR_MS = 3_600_000
YEARS = 10_000_000  # minutes
SHORT = Field(max_length=1000)  # of a list


class Model(Strict):
    """common.model."""

    type: ShortText = key("recognition method: the name of a file in methods/")
    backbone: ShortText = key("2D network: the name of a builder in networks/")
    num_segments: int = key("segments a video is cut into; one clip is taken from each", ge=1, le=10_000, why=FRAMES)
    num_class: int = key(
        "number of classes; labels run from 0 to num_class - 1",
        ge=2,
        le=1_000_000,
        why="the last layer would have billions of weights",
    )
    dropout: float = key(
        "probability of dropping a feature before the last layer; 0 = no dropout", default=0.5, ge=0, lt=1
    )
    pretrained: Annotated[bool | PathText, BeforeValidator(switch_or_text, json_schema_input_type=bool | str)] = key(
        "starting weights: true = ImageNet file in pretrained/, false = random, or a weights file or experiment folder",
        default=False,
    )
    # Open here: `_Draft._model_options` in loader.py checks the options
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="options of the method and the backbone, and bn_group_size, bn_sync_stats, bn_var_mode",
        json_schema_extra={"free": False},
    )


class BatchNorm(Strict):
    """The keys of common.model.kwargs that belong to neither a method nor a backbone."""

    bn_group_size: int = key(
        "neighbouring shards (first-start ranks) that share batch-norm statistics; 1 = none",
        default=1,
        ge=1,
        le=100_000,
        why=GPUS,
    )
    bn_sync_stats: bool = key("average the running statistics over all shards after every step", default=False)
    bn_var_mode: Literal["L2"] = key(
        "norm of the variance; the L1 variant belonged to a library that is not available", default="L2"
    )


class Augmentation(Strict):
    """common.augmentation."""

    input_size: int = key(
        "height and width of a training clip and of an evaluation crop, pixels",
        default=224,
        ge=8,
        le=8192,
        why=PIXELS,
    )
    test_resize: int = key(
        "short side of a video before the evaluation crop, pixels", default=256, ge=8, le=8192, why=PIXELS
    )
    crop: Literal["multi_scale", "multi_scale_random", "random_resized", "random", "short_side_jitter", "centre"] = key(
        "how the training crop is drawn; multi_scale_random = a random crop of a multi-scale crop (PP-TSM)",
        default="multi_scale",
    )
    # Of multi_scale
    scales: Annotated[Numbers, Field(min_length=1, max_length=64), within(0.01, 1)] = key(
        "multi_scale: crop sides as shares of the short side", default=(1.0, 0.875, 0.75, 0.66)
    )
    max_distort: int = key(
        "multi_scale: how many entries apart width and height may be in scales",
        default=1,
        ge=0,
        le=64,
        why="scales has at most 64 entries",
    )
    more_fix_crop: bool = key("multi_scale: 13 crop positions instead of 5", default=True)
    # Of random_resized
    area: Annotated[Two, within(1e-4, 1), AfterValidator(ascending)] = key(
        "random_resized: range of the crop's share of the frame's area", default=(0.08, 1.0)
    )
    aspect: Annotated[Two, within(0.01, 100), AfterValidator(ascending)] = key(
        "random_resized: range of width / height", default=(0.75, 1.3333333333)
    )
    colorjitter: Annotated[OffOrFour, AfterValidator(jitter)] = key(
        "[brightness, contrast, saturation, hue] strengths, or false", default=None
    )
    colorjitter_per_frame: bool = key("draw the colour jitter for each frame, not once per clip", default=False)
    randaugment: OffOrPolicy = key(
        "RandAugment with timm's policy, for example rand-m7-n4-mstd0.5-inc1; or false", default=None
    )
    randaugment_per_frame: bool = key("draw RandAugment's operations for each frame, not once per clip", default=False)
    random_erasing: Annotated[OffOrFour, AfterValidator(erasing)] = key(
        "[p, sl, sh, r1]: probability, smallest and largest share of the area, smallest aspect; or false", default=None
    )
    random_erasing_per_frame: bool = key("draw the erased box for each frame, not once per clip", default=False)
    random_erasing_mode: Literal["colour", "pixel"] = key(
        "colour = one grey, aspect uniform (Zhong 2020); pixel = normal noise in each pixel, logarithm of the aspect "
        "uniform (timm, VideoMAE)",
        default="colour",
    )
    # Mixing of neighbouring clips
    mix_up: Annotated[OffOrPositive, within(1e-3, 1000)] = key(
        "alpha of the Beta distribution that mixes neighbouring clips, or false", default=None
    )
    cutmix: Annotated[OffOrPositive, within(1e-3, 1000)] = key(
        "alpha of the Beta distribution of CutMix, which exchanges a box of neighbouring clips; or false", default=None
    )
    mix_up_switch: float = key(
        "probability that a step uses cutmix, if mix_up is on too, instead of mix_up", default=0.5, ge=0, le=1
    )
    mean: Annotated[Three, within(0, 1)] = key("RGB mean subtracted from pixels in 0..1", default=(0.485, 0.456, 0.406))
    std: Annotated[Three, within(1e-6, 1000)] = key("RGB divisor after the mean", default=(0.229, 0.224, 0.225))


class LrScheduler(Strict):
    """common.lr_scheduler."""

    type: Literal["COSINE", "STEP"] = key("shape of the learning rate after the warm-up")
    base_lr: float = key(
        "learning rate at iteration 0, where the warm-up starts (the peak if there is no warm-up)",
        gt=0,
        le=RATE,
        why=DIVERGES,
    )
    # Lengths come in pairs, in iterations and in epochs: PAIRS below
    warmup_steps: Steps | None = key("iterations of warm-up; 0 = none", default=None, why=ITERATIONS)
    warmup_epochs: Annotated[float, Field(ge=0, le=1e6)] | None = key(
        "warm-up in epochs, instead of warmup_steps", default=None, why=EPOCHS
    )
    warmup_lr: Annotated[float, Field(gt=0, le=RATE)] | None = key(
        "peak learning rate, at which the cosine or the steps begin", default=None, why=DIVERGES
    )
    warmup_type: Literal["to_peak", "to_schedule", "factor_linear", "factor_constant", "factor_exp"] = key(
        "form of the warm-up: a line to warmup_lr, a line to the schedule's own value there (PySlowFast, PaddleVideo), "
        "or the schedule times a factor that starts at base_lr / warmup_lr (mmaction2 0.x)",
        default="to_peak",
    )
    step_by: Literal["iteration", "epoch"] = key(
        "when the cosine or the steps move; epoch: only when an epoch begins (for the warm-up: warmup_by)",
        default="iteration",
    )
    warmup_by: Literal["iteration", "epoch"] = key(
        "when the warm-up moves; epoch: only when an epoch begins (mmaction2 1.x)", default="iteration"
    )
    min_lr: float = key("COSINE: learning rate at max_iter", default=0.0, ge=0, le=RATE, why=DIVERGES)
    cosine_begin_epoch: Annotated[float, Field(ge=0, le=1e6)] | None = key(
        "COSINE: epoch at which the cosine begins, if it is neither the end of the warm-up nor 0 as warmup_type "
        "implies (mmaction2 1.x)",
        default=None,
        why=EPOCHS,
    )
    max_iter: Count | None = key("length of the run in iterations (global batches)", default=None, why=ITERATIONS)
    max_epoch: Length | None = key("length of the run in epochs, instead of max_iter", default=None, why=EPOCHS)
    lr_steps: Annotated[tuple[Count, ...], SHORT, AfterValidator(increasing)] | None = key(
        "STEP: iterations at which the rate changes", default=None, why=ITERATIONS
    )
    lr_epochs: Annotated[tuple[Length, ...], SHORT, AfterValidator(increasing)] | None = key(
        "STEP: the same in epochs, instead of lr_steps", default=None, why=EPOCHS
    )
    lr_mults: Annotated[Numbers, SHORT, within(1e-6, 1e6)] | None = key(
        "STEP: factor at each of lr_steps, on the current rate", default=None
    )


class Optimizer(Strict):
    """common.optimizer."""

    type: Literal["sgd", "adamw"] = key(
        "rule of the optimiser step; adamw never decays biases, norms, positions and other 1-D parameters",
        default="sgd",
    )
    betas: Annotated[Two, within(0, 0.999999999)] = key(
        "adamw: decays of the averages of the gradient and of its square", default=(0.9, 0.999)
    )
    eps: float = key(
        "adamw: added to the root of the second average",
        default=1e-8,
        gt=0,
        le=1,
        why="the rate would no longer adapt",
    )
    layer_decay: OffOrDecay = key(
        "factor of the learning rate from each block of a transformer to the one below it; or false", default=None
    )


class Memcached(Strict):
    """common.data.memcached."""

    servers: Annotated[tuple[ShortText, ...] | PathText, AfterValidator(server_list)] = key(
        "auto = started by the launcher, one per node; or a list of host:port and unix:/path; or a file of them",
        default="auto",
        free=True,
    )
    timeout_ms: float = key(
        "longest time of one call, ms; then the disk is read",
        default=250.0,
        gt=0,
        le=HOUR_MS,
        why=SLOW_SERVER,
        free=True,
    )
    connect_timeout_ms: float = key(
        "the part of it that connecting may take, ms", default=100.0, gt=0, le=HOUR_MS, why=SLOW_SERVER, free=True
    )
    secret_file: PathText | None = key(
        "file with user:password, as memcached -Y takes it; frames then carry a keyed checksum; auto servers have "
        "their own",
        default=None,
        free=True,
    )
    namespace: ShortText = key(
        "part of every key; change it when frames were overwritten in place", default="", free=True
    )
    megabytes: Annotated[int, Field(ge=1, le=100_000_000)] = key(
        "auto: memory for frames on each node, MB", default=4096, why="no node has 100 TB of memory", free=True
    )


class Data(Strict):
    """common.data."""

    reader: Literal["frames", "memcached", "video", "dali"] = key(
        "frames = folders of JPEG files, memcached = the same through servers that keep them in memory, "
        "video = video files, dali = either, decoded on the GPU",
        default="frames",
        free=True,
    )
    memcached: Memcached = section("servers of the reader memcached", default=Memcached)
    template: Annotated[str, AfterValidator(frame_template)] = key(
        "file name of a frame; auto = detected", default="auto"
    )
    frame_base: Annotated[int | str, BeforeValidator(auto_or_base, json_schema_input_type=Literal["auto", 0, 1])] = key(
        "number of the first frame file, 0 or 1; auto = detected", default="auto"
    )
    metadata: PathText | None = key(
        "metadata.bin of `main.py scan`: files described there are not probed again; entries of files that have "
        "changed are not used",
        default=None,
        free=True,
    )
    class_names: PathText | None = key(
        "file with the class names; default: classInd.txt next to the training list", default=None, free=True
    )
    # Sampling and order
    sampling: Literal[
        "tsn",
        "tsm_dense",
        "mmaction2_0x",
        "mmaction2_1x",
        "pyslowfast",
        "pp",
        "pp_tsm",
        "videomae",
        "vjepa2",
        "one_per_segment",
    ] = key("whose rule picks the frames of a clip: docs/sampling.md has a table", default="one_per_segment")
    list_layout: Literal["auto", "path_labels", "path_frames_labels"] = key(
        "what a line of a list contains; auto = detected, one label per line; the others allow several labels, "
        "after the path or after the number of frames",
        default="auto",
    )
    order: Literal["shuffled", "class_balanced"] = key(
        "order of the training videos; class_balanced = each class equally often, regardless of its number of videos",
        default="shuffled",
    )
    num_sample: int = key(
        "repeated augmentation: clips of each video in a batch, from the same frames, with new crops and augmentations",
        default=1,
        ge=1,
        le=64,
        why="a batch would show one video only",
    )
    clip_len: int = key("frames taken from each segment", default=1, ge=1, le=10_000, why=FRAMES)
    frame_interval: int = key(
        "distance between these frames, in frames of the video",
        default=1,
        ge=1,
        le=100_000,
        why="that is an hour of video between two frames",
    )
    # Videos that cannot be read
    on_bad: Literal["error", "skip", "substitute"] = key(
        "a video that cannot be read: stop, skip it (loss weight 0), or replace it with another one", default="skip"
    )
    bad_budget: float = key(
        "share of an epoch's samples that may be bad before the run stops", default=0.001, ge=0, le=1, free=True
    )
    missing_share: float = key(
        "largest share of frames missing at the end of a video for which it counts as shorter, not as bad",
        default=0.05,
        ge=0,
        lt=1,
    )
    # Cross-validation
    folds: Annotated[int, Field(ge=2, le=1000)] | Literal["lists", "groups"] | None = key(
        "cross-validation (docs/folds.md): lists = foldNN_train.txt and foldNN_val.txt next to train_source; groups = "
        "leave one group out; a number = that many folds of all videos of both lists",
        default=None,
        why="each is a training run",
        free=True,
    )
    fold_group: Annotated[ShortText, AfterValidator(pattern)] | None = key(
        "pattern; videos whose paths match it with the same text (its first group, if it has one) are in one fold",
        default=None,
        free=True,
    )
    flip: bool = key("mirror half of the training clips; switch it off if left and right matter", default=True)
    flip_labels: Annotated[tuple[ClassPair, ...], AfterValidator(class_pairs)] | None = key(
        "[[left, right], ...]: pairs of classes, by number or name, that a mirrored clip exchanges", default=None
    )
    deadline_seconds: float = key(
        "seconds a worker may spend on one video before it counts as bad",
        default=60.0,
        gt=0,
        le=86_400,
        why="that is a day",
        free=True,
    )
    prefetch: int = key(
        "micro-batches read ahead per rank", default=2, ge=1, le=10_000, why="each takes memory of its own", free=True
    )


class Published(Strict):
    """common.published: what others have reported for the recipe. Shown by `python main.py list`; no run reads it."""

    top1: Annotated[float, Field(ge=0, le=100)] | None = key(
        "top-1 accuracy that others published for this recipe, per cent", default=None, free=True
    )
    top5: Annotated[float, Field(ge=0, le=100)] | None = key("their top-5 accuracy", default=None, free=True)
    protocol: LongText | None = key(
        "views of each video and list of videos behind their accuracy", default=None, free=True
    )
    source: LongText | None = key(
        "where they published it: project and file, or paper and table", default=None, free=True
    )
    gpus: Count | None = key("GPUs that they trained on", default=None, why=GPUS, free=True)


class PreciseBn(Strict):
    """common.precise_bn."""

    batches: int = key(
        "global batches of training clips over which batch-norm statistics are averaged before a validation; 0 = off",
        default=0,
        ge=0,
        le=1_000_000,
        why="every validation would take as long as a training run",
        free=True,
    )
    every_iters: Count | None = key(
        "only at validations that fall on a multiple of this many iterations, and at the last one",
        default=None,
        why=ITERATIONS,
        free=True,
    )
    every_epochs: Length | None = key("the same in epochs, instead of every_iters", default=None, why=EPOCHS, free=True)


class Distill(Strict):
    """common.distill."""

    teacher: PathText | None = key(
        "experiment folder, checkpoint or weights file of the second network; none = no distillation",
        default=None,
    )
    kind: Literal["kd", "dml"] = key(
        "kd = learn from a frozen teacher (Hinton 2015); dml = both learn from each other (Zhang 2018)", default="kd"
    )
    temperature: Annotated[float, Field(ge=1e-3, le=1000)] = key(
        "kd: divides the logits of both networks before the softmax",
        default=4.0,
        why="both softmax outputs would be one-hot, or all equal",
    )
    weight: Annotated[float, Field(gt=0, le=1000)] | None = key(
        "share of the teacher in the loss for kd (default 0.5), factor of the mutual term for dml (default 1)",
        default=None,
        why="the labels would not matter any more",
    )


DISTILL_WEIGHT = {"kd": 0.5, "dml": 1.0}  # kd: our choice; dml: PaddleVideo's


class Config(Strict):
    """common: one experiment."""

    model: Model = section("the network")
    augmentation: Augmentation = section("what happens to the pixels", default=Augmentation)
    # Batches and readers
    val_dense: bool = key("validate on 10 crops (4 corners, centre, mirrored) instead of 1 centre crop", default=False)
    workers: int = key(
        "reading processes per rank; 0 = read in the rank, no deadlines",
        default=2,
        ge=0,
        le=1024,
        why="each is a process; as many as there are cores per rank is enough",
        free=True,
    )
    batch_size: int = key(
        "clips per shard: per rank at the first start; global batch = batch_size x ranks",
        ge=1,
        le=100_000,
        why="one GPU holds all of them at once",
    )
    shards: Annotated[int, Field(ge=1, le=100_000)] | None = key(
        "shards of a global batch; default: the number of ranks at the first start", default=None, why=GPUS
    )
    # The optimisation
    lr_scheduler: LrScheduler = section("learning rate and length of the run")
    reference_batch: Count | None = key(
        "global batch for which the recipe's learning rates were chosen; a different one is reported at the start",
        default=None,
        why="no recipe has a batch of a billion clips",
        free=True,
    )
    loss: Literal["ce", "bce"] = key(
        "ce = softmax and cross entropy, one label; bce = sigmoid and binary cross entropy, any number of labels",
        default="ce",
    )
    label_smooth: Annotated[
        float, Field(ge=0, lt=1), BeforeValidator(off_is_zero, json_schema_input_type=float | Switchable)
    ] = key("share of the target spread over all num_class classes; 0 or false = off", default=0.0)
    no_wd: Annotated[bool | str, BeforeValidator(switch_or_bn, json_schema_input_type=bool | Literal["bn"])] = key(
        "no weight decay on biases and batch-norm parameters; bn = on batch-norm parameters only", default=False
    )
    policy: bool = key("TSN's parameter groups with their own learning-rate and decay multipliers", default=False)
    optimizer: Optimizer = section("how the weights are changed", default=Optimizer)
    momentum: float = key("momentum of SGD", default=0.9, ge=0, lt=1)
    weight_decay: float = key(
        "weight decay; AdamW's is decoupled from the gradient",
        default=1e-4,
        ge=0,
        le=100,
        why="it pulls every weight to 0 faster than any loss",
    )
    nesterov: bool = key("Nesterov's form of the momentum", default=False)
    ema: OffOrDecay = key(
        "decay of a moving average of the weights, which validation and evaluation use; or false", default=None
    )
    precise_bn: PreciseBn = section("batch-norm statistics recomputed for validation", default=PreciseBn)
    distill: Distill = section("a second network to learn from", default=Distill)
    # Validation, progress, data
    val_freq: Count | None = key(
        "iterations between validations; each also saves", default=None, why=ITERATIONS, free=True
    )
    val_freq_epochs: Length | None = key("the same in epochs, instead of val_freq", default=None, why=EPOCHS, free=True)
    print_freq: int = key(
        "iterations between log lines, and the window of the logged averages",
        default=10,
        ge=1,
        le=1_000_000,
        why="the numbers of the whole window are kept in memory",
        free=True,
    )
    train_root: PathText = key("folder in front of the paths of train_source", free=True)
    train_source: PathText = key("list of training videos, `path num_frames label` per line", free=True)
    val_root: PathText = key("folder in front of the paths of val_source", free=True)
    val_source: PathText = key("list of validation videos", free=True)
    data: Data = section("how videos are found, sampled and read", default=Data)
    # Numbers and reproducibility
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = key(
        "number format; bf16 and fp16 keep float32 weights (autocast), fp64 is for tests", default="fp32"
    )
    clip_grad: Annotated[OffOrPositive, within(1e-12, 1e12)] = key(
        "largest norm of the gradient; larger ones are scaled down; false = off", default=None
    )
    compile: bool | Literal["reduce-overhead", "max-autotune"] = key(
        "torch.compile the model; reduce-overhead = with CUDA graphs, for many small kernels", default=False, free=True
    )
    seed: int = key(
        "start of all random numbers: order, augmentation, initial weights, dropout", default=0, ge=0, lt=2**63
    )
    deterministic: bool = key("only algorithms that give the same bits every time", default=False, free=True)
    loggers: tuple[Literal["wandb", "mlflow"], ...] = key(
        "remote loggers that get the curves in addition to TensorBoard and events/scalars.jsonl: wandb, mlflow",
        default=(),
        free=True,
    )
    save_minutes: float = key(
        "minutes between checkpoints, in addition to those of val_freq",
        default=10.0,
        gt=0,
        le=YEARS,
        why=YEARS_WORD,
        free=True,
    )
    watchdog_minutes: float = key(
        "minutes without progress after which the run reports where it hangs and stops",
        default=10.0,
        gt=0,
        le=YEARS,
        why=YEARS_WORD,
        free=True,
    )

    published: Published = section("what others have reported for this recipe", default=Published)

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)  # filled in by the loader; not part of the config

    def origin(self, key: str) -> str:
        """Return the origin of a dotted key (without `common.`): `file:line`, `--set`, default or computed."""
        return self._origins.get(key, "default")


# Two keys for one thing: at most one of each pair may be given, exactly one if the flag is True.
PAIRS = (
    ("lr_scheduler.max_iter", "lr_scheduler.max_epoch", True),
    ("val_freq", "val_freq_epochs", True),
    ("lr_scheduler.warmup_steps", "lr_scheduler.warmup_epochs", False),
    ("lr_scheduler.lr_steps", "lr_scheduler.lr_epochs", False),
    ("precise_bn.every_iters", "precise_bn.every_epochs", False),
)


def is_section(kind: object) -> TypeGuard[type[BaseModel]]:
    """Return True if the type of a key is a group of keys."""
    # In Python 3.10 `tuple[int, ...]` is an instance of type, but `issubclass` refuses it
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel)


def leaves(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted key, field) of every key that holds a value, in the order of this file."""
    for name, info in model.model_fields.items():
        inner = info.annotation
        if is_section(inner):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def sections(model: type[BaseModel] = Config) -> dict[str, type[BaseModel]]:
    """Return the keys that hold a group of keys, with their classes; the root has the empty name."""
    inner = {name: info.annotation for name, info in model.model_fields.items()}
    nested = {name: kind for name, kind in inner.items() if is_section(kind)}
    return {"": model, **nested}


def is_free(key: str) -> bool:
    """Return True if changing this dotted key on resume does not change the meaning of the run."""
    return key in FREE


def _free_keys() -> frozenset[str]:
    return frozenset(
        name
        for name, info in leaves()
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("free")
    )


FREE = _free_keys()
