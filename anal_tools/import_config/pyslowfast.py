"""Convert a YAML config of PySlowFast to an experiment; absent keys have PySlowFast's own defaults.

`utils.config.yaml_lines` reads the file: plain values only, limited in size and depth. A repeated key is an error,
although PySlowFast takes the last one: its two values usually differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from anal_tools.import_config.draft import Draft
from anal_tools.import_config.python_file import Key
from anal_tools.import_config.source import ForeignDict, shown
from utils.config import yaml_lines
from utils.errors import UserError

ARCHS = ("slowfast", "slow", "slowonly")
LR = "lr_scheduler."
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 18: (2, 2, 2, 2)}  # depth: blocks of res2 to res5
# Whole sections with nothing to take over, and the reason.
IDLE = {
    "TENSORBOARD": "curves are always written to events/",
    "OUTPUT_DIR": "the experiment folder",
    "LOG_MODEL_INFO": "the log lists the parameters",
    "DIST_BACKEND": "the launcher sets up processes and backends",
    "DEMO": "python main.py predict",
    "DETECTION": "no detection here",
}


def convert(file: Path, gpus: int | None = None) -> Draft:
    """Return the experiment that a config becomes.

    Args:
        file: the `.yaml` file.
        gpus: number of GPUs in the original run; None: NUM_GPUS x NUM_SHARDS from the file.

    Raises:
        UserError: the file cannot be converted; the text names file, line or key, and the reason.
    """
    config = ForeignDict(file, _values(file))
    if not any(name in config for name in ("MODEL", "TRAIN", "SOLVER")):
        raise UserError(f"{file}: has no MODEL, TRAIN or SOLVER, so it is not a config of PySlowFast")

    draft = Draft()
    _model(config, draft)
    _data(config, draft)
    shards = _batch(config, draft, gpus)
    _solver(config, draft, shards)
    _augmentation(config, draft)
    # After `_batch`: a group of batch norm cannot be larger than the number of shards
    _batch_norm(config.part("BN"), config.part("SOLVER"), draft, int(str(draft.values["shards"])))
    _test(config, draft)
    _rest(config, draft)
    return draft


def _values(file: Path) -> Mapping[Key, object]:
    """Return the plain values of the file."""
    document = yaml_lines.read(file)
    # Report the first problem only; the next try shows the next one
    if document.problems:
        keys, line, text = document.problems[0]
        name = ".".join(map(str, keys))
        raise UserError(f"{file}:{line}: {f'{name}: ' if name else ''}{text}")

    if not isinstance(document.value, Mapping):
        raise UserError(f"{file}: has no keys, so it is not a config of PySlowFast")
    return document.value


def _model(config: ForeignDict, draft: Draft) -> None:
    model, resnet = config.part("MODEL"), config.part("RESNET")

    arch = model.text("ARCH", "slowfast")
    if arch not in ARCHS:
        model.fail("ARCH", f"{arch!r} is not supported here; use one of {', '.join(ARCHS)}")
    name = model.text("MODEL_NAME", "SlowFast")
    if name not in ("SlowFast", "ResNet", "PTVSlowFast", "PTVResNet"):
        model.fail("MODEL_NAME", f"{name!r} is not supported here; use SlowFast or ResNet")

    # Multigrid changes the clip size during the run, which moves the whole schedule
    multigrid = config.part("MULTIGRID")
    for key in ("SHORT_CYCLE", "LONG_CYCLE"):
        if multigrid.flag(key, False):
            multigrid.fail(
                key, "batches whose clips change size are not supported here; import the config without multigrid"
            )

    is_fast = arch == "slowfast"
    draft.exact("model.type", "slowfast" if is_fast else "slowonly", model, "ARCH")
    draft.built_in(model, "MODEL_NAME")
    draft.exact("model.num_class", model.count("NUM_CLASSES", 400), model, "NUM_CLASSES")
    draft.exact("model.dropout", model.number("DROPOUT_RATE", 0.5), model, "DROPOUT_RATE")
    draft.exact("model.kwargs.fc_std", model.number("FC_INIT_STD", 0.01), model, *_given(model, "FC_INIT_STD"))
    if model.number("DROPCONNECT_RATE", 0.0):
        draft.left_out(model, "DROPCONNECT_RATE", note="residual branches are not dropped here")

    loss = model.text("LOSS_FUNC", "cross_entropy")
    # soft_cross_entropy is cross entropy with the mixed labels of mixup: `ce` here
    if loss not in ("cross_entropy", "bce", "bce_logit", "soft_cross_entropy"):
        model.fail("LOSS_FUNC", f"{loss!r} is not supported here; use cross_entropy or bce")
    draft.exact("loss", "bce" if loss.startswith("bce") else "ce", model, "LOSS_FUNC")

    _resnet(resnet, draft, is_fast)
    if is_fast:
        _slowfast(config.part("SLOWFAST"), draft)
    else:
        config.skip("SLOWFAST")
    _non_local(config.part("NONLOCAL"), draft, is_fast)
    _weights(config.part("TRAIN"), draft)


def _given(source: ForeignDict, *keys: str) -> list[str]:
    return [key for key in keys if key in source.values]


def _resnet(resnet: ForeignDict, draft: Draft, is_fast: bool) -> None:
    depth = resnet.count("DEPTH", 50)
    if depth not in BLOCKS:
        resnet.fail("DEPTH", f"{depth} is not one of {', '.join(map(str, BLOCKS))}")
    draft.exact("model.backbone", f"resnet{depth}", resnet, "DEPTH")

    zero = resnet.flag("ZERO_INIT_FINAL_BN", False)
    draft.exact("model.kwargs.zero_init_residual", zero, resnet, "ZERO_INIT_FINAL_BN")
    # "STRIDE_1X1: False" strides in the 3x3 convolution, as torchvision does
    expected = {"NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "STRIDE_1X1": False}
    expected["TRANS_FUNC"] = "basic_transform" if depth < 50 else "bottleneck_transform"
    _fixed(resnet, expected, draft)

    # A number for each stage and pathway
    for key, strides in (("SPATIAL_STRIDES", (1, 2, 2, 2)), ("SPATIAL_DILATIONS", (1, 1, 1, 1))):
        stages = _stages(resnet, key)
        for number, stage in enumerate(stages):
            if len(stages) != len(strides) or any(value != strides[number] for value in stage):
                resnet.fail(key, f"{shown(resnet.values[key])} makes a different network; the one here has {strides}")

    draft.built_in(resnet, "SPATIAL_STRIDES", "SPATIAL_DILATIONS", "INPLACE_RELU")
    _temporal_kernels(resnet, draft, depth, is_fast)


def _stages(source: ForeignDict, key: str) -> list[list[object]]:
    """Return a list of four lists with one number for each pathway; an empty list if the key is absent."""
    value = source.raw(key)
    if value is None:
        return []
    if not isinstance(value, tuple) or not all(isinstance(stage, tuple) for stage in value):
        source.wrong(key, "a list of lists")
    return [list(stage) for stage in value]


def _temporal_kernels(resnet: ForeignDict, draft: Draft, depth: int, is_fast: bool) -> None:
    """Take over how many blocks of a stage have a temporal kernel: all, except in res4 of a ResNet-101."""
    key = "NUM_BLOCK_TEMP_KERNEL"
    counts = _temporal_blocks(resnet, key, depth, 1 + is_fast)

    # All blocks of res2, res3 and res5 have one
    blocks = BLOCKS[depth]
    if any(number != blocks[stage] for stage in (0, 1, 3) for number in counts[stage]):
        resnet.fail(key, "only res4 can have blocks without a temporal kernel here")

    # res4 may have fewer in a SlowFast, and each pathway its own number
    every, slow, fast = blocks[2], counts[2][0], counts[2][-1]
    if slow != every and not is_fast:
        resnet.fail(key, f"all {every} blocks of res4 have a temporal kernel in a SlowOnly here")
    if slow != every or fast != slow:
        draft.exact("model.kwargs.res4_temporal_blocks", slow, resnet, key)
    if fast != slow:
        draft.exact("model.kwargs.fast_res4_temporal_blocks", fast, resnet, key)
    if slow == every:
        draft.built_in(resnet, key)


def _temporal_blocks(resnet: ForeignDict, key: str, depth: int, pathways: int) -> list[list[int]]:
    """Return the number of blocks with a temporal kernel by stage and pathway, no more than the stage has blocks."""
    stages = _stages(resnet, key) or [[number] * pathways for number in (3, 4, 6, 3)]  # their defaults
    counts = [[number for number in stage if isinstance(number, int)] for stage in stages]
    if len(stages) != 4 or any(
        not len(stage) == len(ours) == pathways for stage, ours in zip(stages, counts, strict=True)
    ):
        resnet.wrong(key, "a list of four stages with a number for each pathway")
    return [[min(number, most) for number in stage] for stage, most in zip(counts, BLOCKS[depth], strict=True)]


def _fixed(source: ForeignDict, expected: Mapping[str, object], draft: Draft) -> None:
    for key, value in expected.items():
        if key in source and source.raw(key) != value:
            source.fail(key, f"{shown(source.values[key])} makes a different network; the one here has {value!r}")
    draft.built_in(source, *expected)


def _slowfast(part: ForeignDict, draft: Draft) -> None:
    draft.exact("model.kwargs.alpha", part.count("ALPHA", 8), part, "ALPHA")
    draft.exact("model.kwargs.beta_inv", part.count("BETA_INV", 8), part, "BETA_INV")
    draft.exact("model.kwargs.fusion_kernel", part.count("FUSION_KERNEL_SZ", 5), part, "FUSION_KERNEL_SZ")
    _fixed(part, {"FUSION_CONV_CHANNEL_RATIO": 2}, draft)


def _non_local(part: ForeignDict, draft: Draft, is_fast: bool) -> None:
    """Take over non-local blocks: after every second block of res3 and res4, in the Slow pathway."""
    stages = _stages(part, "LOCATION")
    slow = [stage[0] if stage else () for stage in stages]
    others = [place for stage in stages for place in stage[1:] if place]
    if not any(slow) and not others:
        draft.built_in(part, "LOCATION", "GROUP", "POOL", "INSTANTIATION", note="no non-local blocks")
        return

    # Their LOCATION lists block indices by stage and pathway
    if others or slow != [(), (1, 3), (1, 3, 5), ()] or draft.values["model.backbone"] != "resnet50":
        part.fail(
            "LOCATION", "blocks come after [1, 3] of res3 and [1, 3, 5] of res4 of a ResNet-50's Slow pathway here"
        )

    # One group, and keys pooled by two in height and width
    for key, only in (("GROUP", 1), ("POOL", (1, 2, 2))):
        for stage in _stages(part, key)[1:3]:
            if stage and stage[0] != only:
                part.fail(key, f"{shown(part.values[key])} makes a different block; the one here has {only}")
    draft.built_in(part, "GROUP", "POOL")

    form = part.text("INSTANTIATION", "dot_product")
    ours = {"softmax": "embedded_gaussian", "dot_product": "dot_product"}.get(form)
    if ours is None:
        part.wrong("INSTANTIATION", "softmax or dot_product")
    draft.exact("model.kwargs.non_local", ours, part, "LOCATION", "INSTANTIATION")
    if not is_fast:
        draft.values["model.kwargs.non_local_form"] = "pyslowfast"


def _weights(train: ForeignDict, draft: Draft) -> None:
    # PySlowFast starts from random weights unless it is given a checkpoint
    draft.values["model.pretrained"] = False
    if train.text("CHECKPOINT_FILE_PATH"):
        note = "set model.pretrained to a file on this machine; PySlowFast's .pyth and .pkl are read"
        draft.left_out(train, "CHECKPOINT_FILE_PATH", note=note)
    draft.left_out(train, "CHECKPOINT_TYPE", "CHECKPOINT_INFLATE", note="recognised by the names in the file")


def _data(config: ForeignDict, draft: Draft) -> None:
    data, train = config.part("DATA"), config.part("TRAIN")
    draft.ours_only("model.num_segments", 1, "one clip of clip_len frames")
    draft.ours_only("data.sampling", "pyslowfast", "a random clip, at 30 frames per second")

    frames, rate = data.count("NUM_FRAMES", 8), data.count("SAMPLING_RATE", 8)
    draft.exact("data.clip_len", frames, data, "NUM_FRAMES")
    draft.exact("data.frame_interval", rate, data, "SAMPLING_RATE")

    # Videos of a different rate are resampled to 30 frames per second by both
    if data.number("TARGET_FPS", 30) != 30:
        draft.left_out(data, "TARGET_FPS", note="clips are stretched to 30 frames per second here")
    draft.built_in(data, "TARGET_FPS")

    draft.exact("augmentation.input_size", data.count("TRAIN_CROP_SIZE", 224), data, "TRAIN_CROP_SIZE")
    mean, std = (
        [round(x, 6) for x in data.numbers(key, [usual] * 3)] for key, usual in (("MEAN", 0.45), ("STD", 0.225))
    )
    draft.exact("augmentation.mean", mean, data, *_given(data, "MEAN"))
    draft.exact("augmentation.std", std, data, *_given(data, "STD"))
    draft.exact("data.flip", data.flag("RANDOM_FLIP", True), data, *_given(data, "RANDOM_FLIP"))

    _crop(data, draft)
    if data.flag("MULTI_LABEL", False):
        draft.exact("data.list_layout", "path_labels", data, "MULTI_LABEL")
    _fixed(data, {"REVERSE_INPUT_CHANNEL": False}, draft)
    _lists(data, train, draft)


def _crop(data: ForeignDict, draft: Draft) -> None:
    area, aspect = data.numbers("TRAIN_JITTER_SCALES_RELATIVE"), data.numbers("TRAIN_JITTER_ASPECT_RELATIVE")
    if area:
        draft.exact("augmentation.crop", "random_resized", data, "TRAIN_JITTER_SCALES_RELATIVE")
        draft.exact("augmentation.area", area, data, "TRAIN_JITTER_SCALES_RELATIVE")
        if aspect:
            draft.exact("augmentation.aspect", aspect, data, "TRAIN_JITTER_ASPECT_RELATIVE")
        data.skip("TRAIN_JITTER_SCALES")
        return

    # Absolute jitter: 256 to 320 for a crop of 224, and in proportion to the crop
    sides, size = data.numbers("TRAIN_JITTER_SCALES", (256, 320)), data.count("TRAIN_CROP_SIZE", 224)
    usual = [round(size * 256 / 224), round(size * 320 / 224)]
    if [int(side) for side in sides] == usual:
        draft.exact("augmentation.crop", "short_side_jitter", data, "TRAIN_JITTER_SCALES")
    else:
        note = f"the short side is {usual[0]} to {usual[1]} for a crop of {size} here"
        draft.other("augmentation.crop", "short_side_jitter", data, "TRAIN_JITTER_SCALES", note=note, comment=note)

    draft.values["augmentation.test_resize"] = max(256, size)
    if data.flag("INV_UNIFORM_SAMPLE", False):
        draft.left_out(data, "INV_UNIFORM_SAMPLE", note="the short side is uniform here, not its inverse")


def _lists(data: ForeignDict, train: ForeignDict, draft: Draft) -> None:
    """Fill lists and roots: theirs are train.csv and val.csv of one folder, with paths below PATH_PREFIX."""
    folder = data.text("PATH_TO_DATA_DIR").rstrip("/")
    root = data.text("PATH_PREFIX") or "."
    for role in ("train", "val"):
        file = f"{folder}/{role}.csv" if folder else f"{role}.csv"
        draft.exact(f"{role}_source", file, data, *_given(data, "PATH_TO_DATA_DIR"))
        draft.exact(f"{role}_root", root, data, *_given(data, "PATH_PREFIX"))

    if data.text("PATH_LABEL_SEPARATOR", " ") != " ":
        draft.left_out(
            data, "PATH_LABEL_SEPARATOR", note="path and label are separated by a space here: write the lists again"
        )

    # These loaders read folders of frames
    kind = train.text("DATASET", "kinetics")
    if kind.lower() in ("ssv2", "charades"):
        draft.other("data.reader", "frames", train, "DATASET", note="give lists of `folder frames label`")
        draft.left_out(train, "DATASET", note=f"the sampling of their {kind} loader differs from that for videos")
    else:
        draft.exact("data.reader", "video", train, "DATASET")


def _batch(config: ForeignDict, draft: Draft, gpus: int | None) -> int:
    """Fill batch and shards; return NUM_SHARDS, by which the learning rates may be multiplied."""
    train = config.part("TRAIN")
    machines, each = config.count("NUM_SHARDS", 1), config.count("NUM_GPUS", 1)
    batch = train.count("BATCH_SIZE", 64)
    if machines < 1 or each < 1 or batch % each:
        train.fail("BATCH_SIZE", f"{batch} clips are not a multiple of NUM_GPUS ({each})")

    # BATCH_SIZE is that of one machine, and NUM_SHARDS counts machines
    total = batch * machines
    shards = gpus or each * machines
    if total % shards:
        train.fail("BATCH_SIZE", f"{total} clips cannot be divided among {shards} GPUs; give a different --gpus")

    if gpus:
        draft.ours_only("shards", shards, "--gpus")
    else:
        draft.exact("shards", shards, config, *_given(config, "NUM_GPUS", "NUM_SHARDS"))
    draft.other("batch_size", total // shards, train, "BATCH_SIZE", note="per GPU here, per machine there")
    draft.values["reference_batch"] = total

    draft.exact(
        "workers", config.part("DATA_LOADER").count("NUM_WORKERS", 8), config.part("DATA_LOADER"), "NUM_WORKERS"
    )
    draft.exact("val_freq_epochs", train.count("EVAL_PERIOD", 10), train, "EVAL_PERIOD")
    draft.exact("seed", max(config.count("RNG_SEED", 1), 0), config, *_given(config, "RNG_SEED"))
    return machines


def _solver(config: ForeignDict, draft: Draft, shards: int) -> None:
    solver = config.part("SOLVER")
    kind = solver.text("OPTIMIZING_METHOD", "sgd")
    if kind == "sgd":
        draft.exact("momentum", solver.number("MOMENTUM", 0.9), solver, "MOMENTUM")
        draft.exact("nesterov", solver.flag("NESTEROV", True), solver, *_given(solver, "NESTEROV"))
        draft.built_in(solver, "OPTIMIZING_METHOD")
        if solver.number("DAMPENING", 0):
            draft.left_out(solver, "DAMPENING", note="the momentum has no dampening here")
    elif kind == "adamw":
        draft.exact("optimizer.type", "adamw", solver, "OPTIMIZING_METHOD")
        if "LAYER_DECAY" in solver and solver.number("LAYER_DECAY") != 1:
            draft.exact("optimizer.layer_decay", solver.number("LAYER_DECAY"), solver, "LAYER_DECAY")
        solver.skip("MOMENTUM", "NESTEROV")
    else:
        solver.fail("OPTIMIZING_METHOD", f"{kind!r} is not supported here; use sgd or adamw")

    draft.exact("weight_decay", solver.number("WEIGHT_DECAY", 1e-4), solver, "WEIGHT_DECAY")
    if "CLIP_GRAD_L2NORM" in solver:
        draft.exact("clip_grad", solver.number("CLIP_GRAD_L2NORM"), solver, "CLIP_GRAD_L2NORM")

    # Linear scaling: the rate of the file is that of one machine
    factor = shards if solver.flag("BASE_LR_SCALE_NUM_SHARDS", False) else 1
    draft.built_in(solver, "BASE_LR_SCALE_NUM_SHARDS", note=f"written as their rates times {factor}")
    _rates(solver, draft, factor)


def _rates(solver: ForeignDict, draft: Draft, factor: int) -> None:
    """Fill schedule and warm-up; both change with every iteration in both projects."""
    epochs = solver.number("MAX_EPOCH", 300)
    draft.exact(LR + "max_epoch", epochs, solver, "MAX_EPOCH")
    policy, peak = solver.text("LR_POLICY", "cosine"), solver.number("BASE_LR", 0.1) * factor

    if policy == "cosine":
        draft.exact(LR + "type", "COSINE", solver, "LR_POLICY")
        low = solver.number("COSINE_END_LR", 0.0) * factor
        draft.exact(LR + "min_lr", low, solver, *_given(solver, "COSINE_END_LR"))
        solver.skip("GAMMA", "STEPS", "LRS", "STEP_SIZE")
    elif policy == "steps_with_relative_lrs":
        _relative_steps(solver, draft, epochs)
    else:
        solver.fail("LR_POLICY", f"{policy!r} is not supported here; use cosine or steps_with_relative_lrs")

    length = solver.number("WARMUP_EPOCHS", 0.0)
    if not length:
        draft.exact(LR + "base_lr", peak, solver, "BASE_LR")
        solver.skip("WARMUP_EPOCHS", "WARMUP_START_LR")
        return

    draft.exact(LR + "warmup_epochs", length, solver, "WARMUP_EPOCHS")
    draft.exact(LR + "base_lr", solver.number("WARMUP_START_LR", 0.01) * factor, solver, "WARMUP_START_LR")
    draft.exact(LR + "warmup_lr", peak, solver, "BASE_LR")

    # With COSINE_AFTER_WARMUP the warm-up ends at the peak, else at the cosine's value there
    after = policy == "cosine" and solver.flag("COSINE_AFTER_WARMUP", False)
    draft.exact(
        LR + "warmup_type", "to_peak" if after else "to_schedule", solver, *_given(solver, "COSINE_AFTER_WARMUP")
    )
    solver.skip("WARMUP_FACTOR")


def _relative_steps(solver: ForeignDict, draft: Draft, epochs: float) -> None:
    # LRS are factors of BASE_LR, lr_mults factors of the rate before
    steps, rates = solver.numbers("STEPS"), solver.numbers("LRS")
    if len(steps) > len(rates) or not steps or steps[0] != 0 or rates[0] != 1 or min(rates) <= 0:
        solver.fail("STEPS", "must begin with 0, and LRS with 1; there must be a rate for each step")

    at = [step for step in steps[1:] if step < epochs]
    draft.exact(LR + "type", "STEP", solver, "LR_POLICY")
    draft.exact(LR + "lr_epochs", at, solver, "STEPS")
    factors = [float(f"{rates[i + 1] / rates[i]:.12g}") for i in range(len(at))]  # rounded: no 0.10000000000000002
    draft.exact(LR + "lr_mults", factors, solver, "LRS")


def _augmentation(config: ForeignDict, draft: Draft) -> None:
    aug, mixup = config.part("AUG"), config.part("MIXUP")

    if aug.flag("ENABLE", False):
        note = "timm's operations on bytes, bilinear; see docs/decisions.md"
        draft.other("augmentation.randaugment", aug.text("AA_TYPE", "rand-m9-mstd0.5-inc1"), aug, "AA_TYPE", note=note)
        probability = aug.number("RE_PROB", 0.25)
        if probability:
            # Area and aspect are constants in their code
            draft.other(
                "augmentation.random_erasing", [probability, 0.02, 0.333333, 0.3], aug, "RE_PROB", note="timm's areas"
            )
            draft.exact("augmentation.random_erasing_mode", "pixel", aug, "RE_MODE")
        if aug.count("NUM_SAMPLE", 1) != 1:
            draft.left_out(aug, "NUM_SAMPLE", note="set data.num_sample, and batch_size in clips")
        draft.left_out(aug, "INTERPOLATION", "RE_COUNT", "RE_SPLIT", "COLOR_JITTER", note="one rule here")
    config.skip("AUG")  # not enabled: nothing to report
    if mixup.flag("ENABLE", False):
        note = "neighbouring clips are mixed here, a random permutation there"
        for ours, theirs, usual in (("mix_up", "ALPHA", 0.8), ("cutmix", "CUTMIX_ALPHA", 1.0)):
            if mixup.number(theirs, usual):
                draft.other(f"augmentation.{ours}", mixup.number(theirs, usual), mixup, theirs, note=note)
        # A switch exists only between two kinds of mixing
        if {"augmentation.mix_up", "augmentation.cutmix"} <= draft.values.keys():
            draft.exact("augmentation.mix_up_switch", mixup.number("SWITCH_PROB", 0.5), mixup, "SWITCH_PROB")
        draft.exact("label_smooth", mixup.number("LABEL_SMOOTH_VALUE", 0.1), mixup, "LABEL_SMOOTH_VALUE")
        if mixup.number("PROB", 1.0) != 1:
            draft.left_out(mixup, "PROB", note="every batch is mixed here")

    config.skip("MIXUP")


def _batch_norm(norm: ForeignDict, solver: ForeignDict, draft: Draft, shards: int) -> None:
    # Weight decay: theirs may differ for batch norm, ours is the same or none
    decay, general = norm.number("WEIGHT_DECAY", 0.0), solver.number("WEIGHT_DECAY", 1e-4)

    adamw = draft.values.get("optimizer.type") == "adamw"
    flat = solver.flag("ZERO_WD_1D_PARAM", False)
    if not adamw and (flat or (decay == 0 and general)):
        draft.exact(
            "no_wd",
            True if flat else "bn",
            norm if not flat else solver,
            "ZERO_WD_1D_PARAM" if flat else "WEIGHT_DECAY",
        )
    elif decay != general and not adamw:
        draft.left_out(norm, "WEIGHT_DECAY", note="batch norm has the decay of the other weights here, or none")

    norm.skip("WEIGHT_DECAY")
    solver.skip("ZERO_WD_1D_PARAM")

    if norm.flag("USE_PRECISE_STATS", False):
        batches = norm.count("NUM_BATCHES_PRECISE", 200)
        draft.exact("precise_bn.batches", batches, norm, "USE_PRECISE_STATS", "NUM_BATCHES_PRECISE")
    norm.skip("USE_PRECISE_STATS", "NUM_BATCHES_PRECISE")

    if norm.number("MOMENTUM", 0.1) != 0.1:
        draft.left_out(norm, "MOMENTUM", note="running statistics move by .1 here")
    draft.built_in(norm, "MOMENTUM")

    kind = norm.text("NORM_TYPE", "batchnorm")
    if kind.startswith("sync_batchnorm"):
        # NUM_SYNC_DEVICES GPUs share statistics; a small --gpus limits the group
        group = norm.count("NUM_SYNC_DEVICES", 1)
        draft.exact("model.kwargs.bn_group_size", min(group, shards), norm, "NORM_TYPE", "NUM_SYNC_DEVICES")
    elif kind != "batchnorm":
        draft.left_out(norm, "NORM_TYPE", "NUM_SPLITS", note="plain batch norm over each GPU's clips here")

    norm.skip("NORM_TYPE", "NUM_SYNC_DEVICES", "NUM_SPLITS")


def _test(config: ForeignDict, draft: Draft) -> None:
    test, data = config.part("TEST"), config.part("DATA")
    clips, crops = test.count("NUM_ENSEMBLE_VIEWS", 10), test.count("NUM_SPATIAL_CROPS", 3)
    size = data.count("TEST_CROP_SIZE", 256)

    if crops not in (1, 3) or data.text("ENSEMBLE_METHOD", "sum") != "sum":
        draft.note("TEST", f"{clips} x {crops} views, {data.text('ENSEMBLE_METHOD', 'sum')}: no such protocol here")
        return
    # They sum the scores of all views, and place crops at three positions of the longer side
    if (clips, crops) == (10, 3):
        draft.test = f"--protocol k400-10x3 --scale {size} --crop-size {size} --average sum --per-position"
    else:
        draft.test = f"--views {clips}x{crops} --scale {size} --crop-size {size} --average sum --per-position"

    draft.test_row("TEST, DATA.TEST_CROP_SIZE")
    data.skip("ENSEMBLE_METHOD", "TEST_CROP_SIZE")


def _rest(config: ForeignDict, draft: Draft) -> None:
    """List what no rule has asked for."""
    train = config.part("TRAIN")
    if train.raw("ENABLE") is False:
        draft.left_out(train, "ENABLE", note="train.sh trains; to run only their test, use eval.sh")
    train.skip("ENABLE")  # True needs no row

    draft.left_out(train, "CHECKPOINT_PERIOD", note="checkpoints are written every save_minutes and at each validation")
    draft.left_out(train, "AUTO_RESUME", note="a run that is started again continues by itself")
    draft.built_in(config.part("DATA"), "INPUT_CHANNEL_NUM", note="frames are RGB")
    draft.left_out(config.part("DATA"), "DECODING_BACKEND", note="data.reader decides")

    config.part("DATA_LOADER").skip("PIN_MEMORY")
    config.part("TEST").skip("ENABLE", "DATASET", "BATCH_SIZE", "SPLIT", "SAVE_RESULTS_PATH")
    draft.left_out(config.part("TEST"), "CHECKPOINT_FILE_PATH", "CHECKPOINT_TYPE", note="eval.sh ... --checkpoint FILE")

    for key, why in IDLE.items():
        if key in config.values:
            draft.left_out(config, key, note=why)
    for name, value in list(config.unread()):
        draft.note(name, "no counterpart here, or none is known", value)
