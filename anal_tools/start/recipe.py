"""Choose network, sampling, size and length for these videos and this machine; give a reason for each choice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "pretrained/mobilenetv2_imagenet_features.pth"
RESNET_WEIGHTS = "pretrained/resnet50-19c8e357.pth"
# Classes that mirroring would exchange
LEFT_RIGHT = r"(?i)(^|[^a-z])(left|right|clockwise|counterclockwise)([^a-z]|$)"
FRAMES = 8  # of a clip; TSM's usual number
WIDE = 1.2  # long by short side; above it a square in the centre leaves out too much
MARK = "Written by `python main.py start`"  # tells a config of `start` from a user's
# Pretrained features learn few videos by heart in a few epochs; they need more variety than random weights
STRONG = (0.4, 0.4, 0.4, 0.1)
LEAST_EPOCHS, MOST_EPOCHS = 10, 60


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Attributes:
        method, backbone: `model.type` and `model.backbone`.
        weights: file in the repository that it starts from; "" for random weights.
        size: side of a clip on a CPU and on a GPU, in pixels.
        clips: clips that a training run sees, on a CPU and on a GPU.
        batch, rate: clips per step, and the peak learning rate for this number.
        decay, dropout, smooth: weight decay, dropout, label smoothing.
        area: smallest share of a frame that a training crop covers.
        colors: strength of the colour jitter: brightness, contrast, saturation, hue.
        mix_up: alpha of mixup; None for none.
        about: a sentence that describes it.
    """

    method: str
    backbone: str
    weights: str
    size: tuple[int, int]
    clips: tuple[int, int]
    batch: int
    rate: float
    decay: float
    dropout: float
    smooth: float
    area: float
    colors: tuple[float, float, float, float]
    mix_up: float | None
    about: str


RECIPES = {
    "finetune": Recipe(
        "tsm", "mobilenetv2", WEIGHTS, (112, 224), (1600, 20_000), 8, 0.004, 5e-4, 0.5, 0.1, 0.5, STRONG, 0.2,
        "TSM on MobileNetV2 that starts from ImageNet weights",
    ),
    "finetune-large": Recipe(
        "tsm", "resnet50", RESNET_WEIGHTS, (112, 224), (2400, 40_000), 8, 0.005, 5e-4, 0.5, 0.1, 0.5, STRONG, 0.2,
        "TSM on ResNet-50 that starts from ImageNet weights",
    ),
    "small": Recipe(
        "tsm", "resnet18", "", (56, 112), (4000, 30_000), 8, 0.01, 1e-3, 0.5, 0.0, 0.7, (0.2, 0.2, 0.2, 0.0), None,
        "TSM on ResNet-18 from random weights",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DataSummary:
    """What the choices depend on.

    Attributes:
        kind: "video" or "frames".
        train: number of training videos.
        classes: names of the classes.
        frames, short_side, long_side: (N,) of the readable videos.
        gpus, cores: of this machine.
    """

    kind: str
    train: int
    classes: Sequence[str]
    frames: np.ndarray
    short_side: np.ndarray
    long_side: np.ndarray
    gpus: int
    cores: int


@dataclass
class Choices:
    """The values of the config, and the reasons."""

    recipe: Recipe
    size: int
    views: str
    segments: int
    epochs: float
    batch: int
    flip: bool
    workers: int
    weights: str
    why: list[tuple[str, str]] = field(default_factory=list)


def choose(
    summary: DataSummary,
    *,
    name: str | None,
    weights: str | None,
    size: int | None,
    segments: int | None,
    epochs: float | None,
) -> Choices:
    """Choose what the user has left open.

    Args:
        summary: of the data and the machine.
        name, weights, size, segments, epochs: what the user chose; None to choose here.

    Raises:
        UserError: there is no such recipe, or its weights are missing.
    """
    name, why_name = _recipe(summary, name, weights)
    recipe = RECIPES[name]
    on_gpu = summary.gpus > 0
    file = weights or (str(ROOT / recipe.weights) if recipe.weights else "")
    why = [("recipe", f"{name}: {recipe.about}, {why_name}")]

    # Size of a clip
    side = float(np.median(summary.short_side))
    if size is None:
        size, reason = recipe.size[on_gpu], "this machine has a GPU" if on_gpu else "small, because there is no GPU"
        # Without weights any size is possible: crops larger than the videos would only cost time
        if not file and side < 0.75 * size:
            size, reason = max(32, 8 * round(0.875 * side / 8)), f"the videos have {side:.0f} pixels"
        enlarged = ", so videos are enlarged" if side < size else ""
        why.append(("size", f"{size} pixels: {reason}; the median short side is {side:.0f}{enlarged}"))

    # Sampling and length
    frames = float(np.median(summary.frames))
    if segments is None:
        segments = FRAMES
        why.append(
            (
                "sampling",
                f"one frame from each of {segments} parts of a video; the median video has {frames:.0f} frames",
            )
        )

    if epochs is None:
        enough = recipe.clips[on_gpu] / summary.train
        epochs = float(round(min(MOST_EPOCHS, max(LEAST_EPOCHS, enough))))
        why.append(("length", f"{epochs:g} epochs of {summary.train} videos, about {recipe.clips[on_gpu]:,} clips"))

    # Evaluation
    views = "3crop" if float(np.median(summary.long_side / summary.short_side)) > WIDE else "centre"
    seen = "three crops side by side, because the frames are wide" if views == "3crop" else "one crop in the centre"
    why.append(("evaluation", f"the last checkpoint, {seen}"))

    # Flip, reader and machine
    flip = not any(re.search(LEFT_RIGHT, name.replace("_", " ")) for name in summary.classes)
    why.append(("flip", "clips are mirrored" if flip else "clips are not mirrored: class names contain left or right"))
    why.append(("reader", "video files" if summary.kind == "video" else "folders of frames"))
    why.append(("machine", f"{summary.gpus} GPUs, {summary.cores} cores"))

    return Choices(
        recipe=recipe,
        size=size,
        views=views,
        segments=segments,
        epochs=epochs,
        batch=min(recipe.batch, max(2, summary.train // 2)),  # a small list still has two steps per epoch
        flip=flip,
        workers=max(1, min(8, summary.cores // max(1, summary.gpus) - 1)),  # one core stays for the rank
        weights=file,
        why=why,
    )


def _recipe(summary: DataSummary, name: str | None, weights: str | None) -> tuple[str, str]:
    if name is not None and name not in RECIPES:
        raise UserError(f"--recipe {name}: no such recipe; choose one of {', '.join(RECIPES)}")

    if name is not None:
        file = RECIPES[name].weights
        if file and not weights and not (ROOT / file).is_file():
            raise UserError(
                f"--recipe {name}: starts from {file}, which is missing; pretrained/README.md explains where to get it"
            )
        return name, "as requested"

    # The best recipe whose weights are available
    if summary.gpus and (ROOT / RESNET_WEIGHTS).is_file():
        return "finetune-large", f"because this machine has {RESNET_WEIGHTS} and a GPU"
    if weights or (ROOT / WEIGHTS).is_file():
        return "finetune", f"because {weights or WEIGHTS} is available"
    return "small", f"because there are no weights to start from ({WEIGHTS} would be used)"


def config_text(
    chosen: Choices, summary: DataSummary, paths: dict[str, str], *, folds: bool, seed: int, about: str
) -> str:
    """Return a complete, commented config.yaml; `paths` holds root, train, val, classes and metadata as YAML text."""
    recipe = chosen.recipe
    # Optional lines
    known = f"\n        metadata: {paths['metadata']}" if "metadata" in paths else ""
    crossed = "\n        folds: lists         # foldNN_train.txt, foldNN_val.txt (docs/folds.md)" if folds else ""
    mixed = f"\n        mix_up: {recipe.mix_up}" if recipe.mix_up else ""
    weights = _quoted(chosen.weights) if chosen.weights else "False"

    return f"""\
# {about}
# {MARK}; change what you like (docs/config.md). Run it again: train.sh local {min(1, summary.gpus)}
common:
    model:
        type: {recipe.method}
        backbone: {recipe.backbone}
        num_segments: {chosen.segments}          # frames of a clip
        num_class: {len(summary.classes)}
        dropout: {recipe.dropout}
        pretrained: {weights}

    augmentation:
        input_size: {chosen.size}          # pixels
        test_resize: {chosen.size}         # a test crop is as high as the frame
        crop: random_resized
        area: [{recipe.area}, 1.0]
        colorjitter: {list(recipe.colors)}{mixed}

    data:
        reader: {summary.kind}
        sampling: tsn            # one frame from each of num_segments parts of the video
        flip: {chosen.flip}
        class_names: {paths["classes"]}{known}{crossed}

    workers: {chosen.workers}
    batch_size: {chosen.batch}
    shards: 1

    lr_scheduler:
        type: COSINE
        base_lr: {recipe.rate / 10:g}
        warmup_epochs: {max(1.0, chosen.epochs / 10):g}
        warmup_lr: {recipe.rate:g}         # the peak
        min_lr: 0.0
        max_epoch: {chosen.epochs:g}

    label_smooth: {recipe.smooth}
    no_wd: True
    momentum: 0.9
    weight_decay: {recipe.decay:g}
    nesterov: True
    clip_grad: 20
    seed: {seed}

    val_freq_epochs: {max(1.0, chosen.epochs / 4):g}
    print_freq: 10

    train_root: {paths["root"]}
    train_source: {paths["train"]}
    val_root: {paths["root"]}
    val_source: {paths["val"]}
"""


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)
