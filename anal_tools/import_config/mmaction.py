"""Convert a config of MMAction2, 0.x or 1.x, to one of our experiments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from anal_tools.import_config import mm_schedule, python_file
from anal_tools.import_config.draft import Draft
from anal_tools.import_config.mm_model import take_model
from anal_tools.import_config.mm_pipeline import take_test, take_training, take_validation
from anal_tools.import_config.source import ForeignDict
from utils.errors import UserError

GPUS = 8  # what their file names and rates assume if nothing else is given
# Keys with nothing to take over, and the reason.
IDLE = {
    "default_scope": "names of their registry",
    "env_cfg": "the launcher sets up processes and backends",
    "log_processor": "the averages of the log run over print_freq iterations",
    "vis_backends": "curves are always written to events/",
    "visualizer": "curves are always written to events/",
    "log_level": "one log, log.txt",
    "resume": "a run that is started again continues by itself",
    "resume_from": "a run that is started again continues by itself",
    "work_dir": "the experiment folder",
    "dist_params": "the launcher sets up processes and backends",
    "workflow": "training and validation, always",
    "find_unused_parameters": "nothing to set",
    "model_wrapper_cfg": "nothing to set",
    "val_cfg": "validation is always on",
    "test_cfg": "eval.sh tests",
    "val_evaluator": "all metrics are always computed",
    "test_evaluator": "all metrics are always computed",
    "gpu_ids": "the second argument of train.sh",
    "omnisource": "no such training here",
    "checkpoint_config": "checkpoints are written every save_minutes and at each validation; best and latest stay",
    "launcher": "the first argument of train.sh",
    "cudnn_benchmark": "cuDNN looks for its fastest kernel unless deterministic: true",
    "custom_hooks": "no hooks; their work is listed in docs/migration.md if it has a counterpart",
    "custom_imports": "nothing of theirs is imported",
}


def convert(file: Path, gpus: int | None = None) -> Draft:
    """Return the experiment that a config becomes.

    Args:
        file: the `.py` file.
        gpus: number of GPUs in the original run; None: as in the file or its name, else 8.

    Raises:
        UserError: the file cannot be converted; the text names file, key and reason.
    """
    config = ForeignDict(file, python_file.read(file))
    if "model" not in config:
        raise UserError(f"{file}: has no `model`, so it is not a config of MMAction2; give the config of a recogniser")
    # 0.x has these keys at the top, 1.x none of them
    era = 0 if any(key in config for key in ("data", "lr_config", "total_epochs", "optimizer_config")) else 1

    model = config.part("model")
    if not model.text("type").startswith("Recognizer") or model.text("type") not in ("Recognizer2D", "Recognizer3D"):
        model.fail("type", f"{model.text('type')!r} is not supported here; use Recognizer2D or Recognizer3D")

    draft = Draft()
    # The model first: frames and optimiser depend on it
    take_model(model, draft)
    (_take_1x if era else _take_0x)(config, draft, gpus)
    _idle(config, draft)
    return draft


# ------------------------------------------------------------------------------------------------------------------ 1.x


def _take_1x(config: ForeignDict, draft: Draft, gpus: int | None) -> None:
    train = config.part("train_dataloader")
    average = config.part("model").part("cls_head").text("average_clips") or "logit"
    # Configs of published weights may have a test part only
    if not train.values:
        _no_training(config, config.part("test_dataloader").part("dataset"), draft, 1)
    else:
        repeat = _dataset(train.part("dataset"), draft, "train", 1)
        _batch(config, train, "batch_size", "num_workers", draft, gpus)
        _dataset(config.part("val_dataloader").part("dataset"), draft, "val", 1)
        _run_1x(config, draft, repeat)

    test = config.part("test_dataloader").part("dataset")
    if "val_source" not in draft.values:
        _dataset(test, draft, "val", 1)
    take_test(_pipeline(test), draft, _average(average))

    # Whatever is left of these needs no counterpart
    for name in ("val_dataloader", "test_dataloader"):
        config.skip(name)
    train.skip("persistent_workers", "pin_memory", "collate_fn", "sampler", "drop_last", "prefetch_factor")
    config.part("model").part("cls_head").skip("average_clips")

    hooks = config.part("default_hooks")
    logger = hooks.part("logger")
    if "interval" in logger:
        draft.exact("print_freq", logger.count("interval"), logger, "interval")
    draft.left_out(config, "default_hooks", note="no hooks; validation saves, and best and latest checkpoints stay")

    random = config.part("randomness")
    if "seed" in random:
        draft.exact("seed", random.count("seed"), random, "seed")
    draft.exact(
        "deterministic", random.flag("deterministic", False), random, *(["deterministic"] if random.values else [])
    )
    random.skip("diff_rank_seed")


def _run_1x(config: ForeignDict, draft: Draft, repeat: int) -> None:
    loop, wrapper = config.part("train_cfg"), config.part("optim_wrapper")
    if loop.text("type", "EpochBasedTrainLoop") != "EpochBasedTrainLoop" or loop.flag("by_epoch", True) is False:
        loop.fail("type", "a run in iterations; give its length, steps and validations in epochs")
    # RepeatDataset shows the list `repeat` times in one of their epochs
    epochs = loop.count("max_epochs") * repeat
    draft.exact("lr_scheduler.max_epoch", epochs, loop, "max_epochs")
    draft.exact("val_freq_epochs", loop.count("val_interval", 1) * repeat, loop, "val_interval")
    loop.skip("type", "by_epoch", "val_begin", "dynamic_intervals")

    optimizer = wrapper.part("optimizer")
    mm_schedule.take_optimizer(optimizer, wrapper, draft)
    mm_schedule.take_clip(wrapper, "clip_grad", draft)
    schedulers = config.parts("param_scheduler")
    # Milestones would count in other epochs
    if repeat != 1 and schedulers:
        config.fail("param_scheduler", "with a RepeatDataset; write the epochs out and remove RepeatDataset")
    mm_schedule.take_schedulers(schedulers, optimizer, epochs, draft)

    if wrapper.text("type", "OptimWrapper") == "AmpOptimWrapper":
        precision = "bf16" if wrapper.text("dtype", "float16") == "bfloat16" else "fp16"
        draft.exact("precision", precision, wrapper, "type")
    if wrapper.count("accumulative_counts", 1) != 1:
        draft.left_out(
            wrapper, "accumulative_counts", note="write batch_size and shards that make the same global batch"
        )
    wrapper.skip("type", "loss_scale", "dtype", "accumulative_counts")


# ------------------------------------------------------------------------------------------------------------------ 0.x


def _take_0x(config: ForeignDict, draft: Draft, gpus: int | None) -> None:
    # One `data` section holds all loaders of 0.x
    data = config.part("data")
    if "train" in data:
        repeat = _dataset(data.part("train"), draft, "train", 0)
        _batch(config, data, "videos_per_gpu", "workers_per_gpu", draft, gpus)
        _run_0x(config, draft, repeat)
        _dataset(data.part("val"), draft, "val", 0)
    else:
        _no_training(config, data.part("test"), draft, 0)
    if "val_source" not in draft.values:
        _dataset(data.part("test"), draft, "val", 0)

    # test_cfg is in the model or at the top; the oldest files have average_clips in the head
    model = config.part("model")
    test = model.part("test_cfg") if "test_cfg" in model else config.part("test_cfg")
    head = model.part("cls_head")
    average = test.text("average_clips") or head.text("average_clips") or "logit"
    take_test(_pipeline(data.part("test")), draft, _average(average))

    data.skip("test", "val_dataloader", "test_dataloader", "train_dataloader", "test_videos_per_gpu")
    data.skip("videos_per_gpu", "workers_per_gpu")


def _run_0x(config: ForeignDict, draft: Draft, repeat: int) -> None:
    optimizer = config.part("optimizer")

    # 0.x has either name
    name = "total_epochs" if "total_epochs" in config else "max_epochs"
    draft.exact("lr_scheduler.max_epoch", config.count(name) * repeat, config, name)

    evaluation = config.part("evaluation")
    draft.exact("val_freq_epochs", evaluation.count("interval", 1) * repeat, evaluation, "interval")
    config.skip("evaluation")

    mm_schedule.take_optimizer(optimizer, optimizer, draft)
    mm_schedule.take_clip(config.part("optimizer_config"), "grad_clip", draft)
    if repeat != 1:
        config.fail("lr_config", "with a RepeatDataset; write the epochs out and remove RepeatDataset")
    mm_schedule.take_lr_config(config.part("lr_config"), optimizer, draft)

    logger = config.part("log_config")
    if "interval" in logger:
        draft.exact("print_freq", logger.count("interval"), logger, "interval")
    draft.left_out(logger, "hooks", note="curves are always written to events/")

    if "fp16" in config:
        draft.exact("precision", "fp16", config, "fp16")
    if "seed" in config:
        draft.exact("seed", config.count("seed"), config, "seed")


# ----------------------------------------------------------------------------------------------------------------- data


def _average(word: str) -> str:
    return {"prob": "prob", "score": "logit"}.get(word, "logit")  # their "score" is a logit


def _pipeline(dataset: ForeignDict) -> Sequence[ForeignDict]:
    inner = dataset.parts("datasets")  # of a ConcatDataset: the first one's
    return _pipeline(inner[0]) if inner else dataset.parts("pipeline")


def _dataset(dataset: ForeignDict, draft: Draft, role: str, era: int) -> int:
    """Fill lists, roots and the pipeline of a data set.

    Returns:
        How often a RepeatDataset repeats it in an epoch.
    """
    kind = dataset.text("type", "VideoDataset")
    # Wrappers first: the list is inside them
    if kind == "RepeatDataset":
        dataset.skip("type")
        return _dataset(dataset.part("dataset"), draft, role, era) * dataset.count("times")
    if kind in ("ConcatDataset", "ClassBalancedDataset"):
        return _wrapped(dataset, kind, draft, role, era)

    if kind not in ("VideoDataset", "RawframeDataset"):
        dataset.fail("type", f"{kind!r} is not supported here; use VideoDataset or RawframeDataset")
    if not dataset.values:
        return 1

    if dataset.text("modality", "RGB") != "RGB":
        dataset.fail("modality", f"{dataset.text('modality')!r}; networks see RGB here")
    _list(dataset, draft, role, kind)

    steps = _pipeline(dataset)
    if role == "train":
        take_training(steps, draft, era, dataset.file)
    else:
        take_validation(steps, draft)

    dataset.skip("pipeline", "modality", "start_index", "test_mode", "num_classes", "type", "delimiter")
    return 1


def _wrapped(dataset: ForeignDict, kind: str, draft: Draft, role: str, era: int) -> int:
    if kind == "ClassBalancedDataset":
        note = "each class equally often here, there by oversample_thr"
        draft.other("data.order", "class_balanced", dataset, "type", "oversample_thr", note=note)
        return _dataset(dataset.part("dataset"), draft, role, era)

    several = dataset.parts("datasets")
    if not several:
        dataset.fail("datasets", "there is no list in it")
    # The pipeline of the first one; the lists themselves must be joined by hand
    _dataset(several[0], draft, role, era)
    names = [one.text("ann_file") for one in several]
    for one in several:
        one.skip(*map(str, one.values))

    note = f"write one list of {', '.join(names)[:200]}, with paths that begin at one root, and name it here"
    draft.ours_only(f"{role}_source", f"{role}.txt", note)
    draft.left_out(dataset, "type", note=f"several lists in one run: {note}")
    return 1


def _list(dataset: ForeignDict, draft: Draft, role: str, kind: str) -> None:
    """Fill the list, its root, the reader and the layout of the list."""
    frames = kind == "RawframeDataset"
    draft.exact(f"{role}_source", dataset.text("ann_file", f"{role}.txt") or f"{role}.txt", dataset, "ann_file")

    # 1.x: a dict with one key for videos and another for frames; 0.x: a path
    prefix = dataset.raw("data_prefix")
    if isinstance(prefix, dict):
        inner = dataset.part("data_prefix")
        name = next((name for name in ("video", "img", "prefix", "imgs") if name in inner), "video")
        draft.exact(f"{role}_root", inner.text(name) or ".", inner, name)
    else:
        draft.exact(f"{role}_root", dataset.text("data_prefix") or ".", dataset, "data_prefix")

    draft.exact("data.reader", "frames" if frames else "video", dataset, "type")
    if dataset.flag("multi_class", False):
        layout = "path_frames_labels" if frames else "path_labels"
        draft.exact("data.list_layout", layout, dataset, "multi_class")
        draft.values["loss"] = "bce"
    # The reader of lists recognises a column of offsets
    if dataset.flag("with_offset", False):
        draft.built_in(dataset, "with_offset", note="detected")

    if frames:
        draft.exact("data.template", dataset.text("filename_tmpl", "img_{:05}.jpg"), dataset, "filename_tmpl")
        draft.exact("data.frame_base", dataset.count("start_index", 1), dataset, "start_index")

    dataset.skip("multi_class", "with_offset", "dynamic_length", "power", "sample_by_class")


def _batch(config: ForeignDict, loader: ForeignDict, size: str, workers: str, draft: Draft, gpus: int | None) -> None:
    """Fill the batch of a GPU, and the number of GPUs for which their learning rates were chosen."""
    batch = loader.count(size)

    scale = config.part("auto_scale_lr")
    base = scale.count("base_batch_size", 0) if scale.values else 0
    # "8xb16" or "16x8b12" in a file name: GPUs and clips per GPU
    named = re.search(r"(?<![0-9])(\d{1,4})x?b(\d{1,4})(?![0-9])", config.file.stem)

    draft.exact("batch_size", batch, loader, size)
    draft.exact("workers", loader.count(workers, 2), loader, workers)

    # From the surest source to the least sure one
    if gpus is not None:
        draft.ours_only("shards", gpus, "--gpus")
    elif base and batch and base % batch == 0:
        draft.exact("shards", base // batch, scale, "base_batch_size")
    elif named and int(named[2]) == batch:
        draft.ours_only("shards", int(named[1]), "GPUs, from the name of the file")
        draft.note("GPUs", f"{named[1]}, from the name of the file: shards = {named[1]}")
    else:
        draft.ours_only("shards", GPUS, "GPUs of their run: not in the file, 8 is their usual number")
        draft.note("GPUs", f"not in the file; shards = {GPUS} is their usual number, --gpus N sets it")

    draft.values["reference_batch"] = base or batch * int(str(draft.values["shards"]))
    if scale.flag("enable", False):
        draft.left_out(
            scale, "enable", note="no rate changes with the batch; a batch other than reference_batch is reported"
        )
    scale.skip("enable", "base_batch_size")


def _no_training(config: ForeignDict, test: ForeignDict, draft: Draft, era: int) -> None:
    """Fill the required keys with placeholders for a config that only tests."""
    draft.note("training", "the file has no training part: batch, rate, length and training list are placeholders")
    remark = "placeholder: their file has no training part"
    given = {
        "batch_size": 8,
        "lr_scheduler.type": "COSINE",
        "lr_scheduler.base_lr": 0.0005,
        "lr_scheduler.max_epoch": 75,
    }
    given |= {"val_freq_epochs": 5, "train_source": "train.txt", "train_root": "."}

    for key, value in given.items():
        draft.ours_only(key, value, remark)
    if draft.values["model.type"] == "videomae":
        draft.ours_only("optimizer.type", "adamw", remark)
        draft.ours_only("weight_decay", 0.05, remark)

    # Frames and sampling are still real: they come from the test pipeline
    step = next((step for step in _pipeline(test) if step.text("type").endswith("SampleFrames")), None)
    if step is None:
        test.fail("pipeline", "does not define which frames a clip has (SampleFrames)")

    is_3d = config.part("model").text("type") == "Recognizer3D"
    clips = 1 if is_3d else step.count("num_clips", 1)
    draft.exact("model.num_segments", clips, step, *([] if is_3d else ["num_clips"]))

    is_dense = step.text("type") == "DenseSampleFrames"
    draft.exact("data.sampling", "tsm_dense" if is_dense else f"mmaction2_{era}x", step, "type")
    draft.exact("data.clip_len", step.count("clip_len", 1), step, "clip_len")
    draft.exact("data.frame_interval", step.count("frame_interval", 1), step, "frame_interval")


def _idle(config: ForeignDict, draft: Draft) -> None:
    """List what no rule has asked for: idle keys with their reason, all others without; skip helpers of the file."""
    if config.raw("load_from"):
        draft.left_out(config, "load_from", note="download the file and give its path in model.pretrained")

    for key, why in IDLE.items():
        if key in config.values:
            draft.left_out(config, key, note=why)

    # Sections that belong to the schema: an unknown key inside them must be listed
    tops = (
        "model",
        "data",
        "optim_wrapper",
        "optimizer",
        "train_dataloader",
        "train_cfg",
        "param_scheduler",
        "lr_config",
    )
    tops += ("optimizer_config", "auto_scale_lr", "randomness", "log_config", "evaluation")
    for key in config.values:
        if key not in tops:
            config.skip(str(key))  # names that the file defines for itself: paths, pipelines

    for name, value in list(config.unread()):
        draft.note(name, "no counterpart here, or none is known", value)
