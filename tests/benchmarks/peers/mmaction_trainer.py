"""The other side of `side_by_side.py`: MMAction2 1.2.0 trains one of its recipes, in a process of its own.

    PYTHON mmaction_trainer.py REQUEST.json

It imports none of our code, and runs in a folder of its own, for our `datasets` and `utils` hide packages of these
names. The request is one of `side_by_side.Recipe.request`; the answer is written to its `out`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
LAYOUTS = {"tsm": "NCHW", "slowonly": "NCTHW"}


def model_of(request: dict) -> dict:
    """Return the model as MMAction2's own configs write it, with our numbers."""
    head = {"num_classes": request["classes"], "dropout_ratio": request["dropout"], "average_clips": "prob"}
    layout = LAYOUTS[request["method"]]
    normalise = {"type": "ActionDataPreprocessor", "mean": MEAN, "std": STD, "format_shape": layout}
    if request["method"] == "tsm":
        backbone = {"type": "MobileNetV2TSM", "num_segments": request["frames"], "shift_div": 8, "pretrained": None}
        head |= {"type": "TSMHead", "in_channels": 1280, "num_segments": request["frames"], "is_shift": True}
        head |= {"consensus": {"type": "AvgConsensus", "dim": 1}, "spatial_type": "avg", "init_std": 0.001}
        kind = "Recognizer2D"
    else:
        backbone = {"type": "ResNet3dSlowOnly", "depth": 50, "pretrained": None, "lateral": False, "norm_eval": False}
        backbone |= {"conv1_kernel": (1, 7, 7), "conv1_stride_t": 1, "pool1_stride_t": 1, "inflate": (0, 0, 1, 1)}
        backbone |= {"zero_init_residual": False}
        head |= {"type": "I3DHead", "in_channels": 2048, "spatial_type": "avg"}
        kind = "Recognizer3D"
    return {"type": kind, "backbone": backbone, "cls_head": head, "data_preprocessor": normalise}


def loader_of(request: dict, split: str) -> dict:
    """Return the loader of the training or of the validation list."""
    size, layout, test = request["size"], LAYOUTS[request["method"]], split != "train"
    sampling = {"type": "SampleFrames", "clip_len": 1, "frame_interval": 1, "num_clips": request["frames"]}
    if layout == "NCTHW":  # one clip of so many neighbouring frames
        sampling |= {"clip_len": request["frames"], "frame_interval": request["interval"], "num_clips": 1}
    pipeline = [{"type": "DecordInit", "num_threads": 1}, sampling | {"test_mode": test}, {"type": "DecordDecode"}]
    if test:
        pipeline += [{"type": "Resize", "scale": (-1, size)}, {"type": "CenterCrop", "crop_size": size}]
    else:
        pipeline += [
            {"type": "RandomResizedCrop", "area_range": tuple(request["area"])},
            {"type": "Resize", "scale": (size, size), "keep_ratio": False},
            {"type": "Flip", "flip_ratio": 0.5},
        ]
    pipeline += [{"type": "FormatShape", "input_format": layout}, {"type": "PackActionInputs"}]
    data = {"type": "VideoDataset", "ann_file": request[split], "pipeline": pipeline, "test_mode": test}
    return {
        "batch_size": request["batch"],
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": not test},
        "dataset": data | {"data_prefix": {"video": request["root"]}},
    }


def schedule_of(request: dict, epoch: int) -> list[dict]:
    """Return a line up to the peak and a cosine down to 0, by iterations."""
    warm, last = round(request["warmup_epochs"] * epoch), round(request["epochs"] * epoch)
    start = request["first_rate"] / request["rate"]
    line = {"type": "LinearLR", "start_factor": start, "begin": 0, "end": warm, "by_epoch": False}
    cosine = {"type": "CosineAnnealingLR", "begin": warm, "end": last, "T_max": last - warm, "eta_min": 0.0}
    return [line, cosine | {"by_epoch": False}]


def runner_of(request: dict, folder: Path):  # noqa: ANN201
    """Return MMEngine's Runner for the recipe."""
    from mmengine.runner import Runner

    videos = sum(1 for line in Path(request["train"]).read_text().splitlines() if line.strip())
    optimiser = {"type": "SGD", "lr": request["rate"], "momentum": 0.9, "nesterov": True}
    clip = {"max_norm": request["clip_grad"], "norm_type": 2}
    hooks = {"logger": {"type": "LoggerHook", "interval": 1, "ignore_last": False}}
    return Runner(
        model=model_of(request),
        work_dir=str(folder),
        train_dataloader=loader_of(request, "train"),
        val_dataloader=loader_of(request, "val"),
        train_cfg={"type": "EpochBasedTrainLoop", "max_epochs": request["epochs"], "val_interval": request["epochs"]},
        val_cfg={"type": "ValLoop"},
        val_evaluator={"type": "AccMetric"},
        optim_wrapper={"optimizer": optimiser | {"weight_decay": request["decay"]}, "clip_grad": clip},
        param_scheduler=schedule_of(request, -(-videos // request["batch"])),
        default_hooks=hooks | {"checkpoint": {"type": "CheckpointHook", "interval": request["epochs"]}},
        custom_hooks=[{"type": "Curve"}],
        default_scope="mmaction",
        log_level="ERROR",
        experiment_name=f"seed{request['seed']}",
        randomness={"seed": request["seed"]},
    )


def register_curve() -> list[list[float]]:
    """Register a hook that writes down the loss and the learning rate of each iteration; return what it fills."""
    from mmaction.registry import HOOKS
    from mmengine.hooks import Hook

    curve: list[list[float]] = []

    @HOOKS.register_module(name="Curve")
    class Curve(Hook):
        priority = "VERY_HIGH"  # before the schedulers move the rate

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:  # noqa: ANN001
            curve.append([float(outputs["loss"]), runner.optim_wrapper.param_groups[0]["lr"]])

    return curve


def fill_images(model, file: str) -> None:  # noqa: ANN001
    """Fill the backbone from a file with torchvision's names: both list their layers in the same order."""
    import torch

    backbone_state = model.backbone.state_dict()
    state = {name: tensor for name, tensor in torch.load(file, weights_only=True).items() if "classifier" not in name}
    assert [tensor.shape for tensor in backbone_state.values()] == [tensor.shape for tensor in state.values()]
    model.backbone.load_state_dict(dict(zip(backbone_state, state.values(), strict=True)))


def initial(request: dict) -> dict:
    """Write the weights from which both sides start."""
    import torch
    from mmaction.registry import MODELS

    torch.manual_seed(request["seed"])
    model = MODELS.build(model_of(request))
    model.init_weights() if request["method"] != "tsm" else model.cls_head.init_weights()
    if request["images"]:
        fill_images(model, request["images"])
    torch.save({"state_dict": model.state_dict()}, request["initial"])
    clips = Path(request["initial"]).with_suffix(".clips")
    return {"logits": logits(model, torch.load(clips, weights_only=True))} if clips.exists() else {}


def logits(model, clips) -> list[list[float]]:  # noqa: ANN001
    """Return the class scores of normalised clips, (B, C, T, H, W) -> (B, K)."""
    import torch

    model.eval()
    with torch.no_grad():
        if type(model).__name__ == "Recognizer2D":
            frames = clips.transpose(1, 2).flatten(0, 1)  # -> (B*T, C, H, W)
            return model.cls_head(model.backbone(frames), clips.shape[2]).tolist()
        return model.cls_head(model.backbone(clips)).tolist()


def train(request: dict) -> dict:
    """Train from the initial weights; return the curve, and the class scores of each video of the validation list."""
    import torch

    curve = register_curve()
    folder = Path(request["out"]).with_suffix("")
    runner = runner_of(request, folder)
    runner.model.load_state_dict(torch.load(request["initial"], weights_only=True)["state_dict"])
    runner._has_loaded = True  # so that no initialisation follows
    runner.model.init_weights = lambda: None
    runner.train()

    scores = []
    runner.model.eval()
    with torch.no_grad():
        for batch in runner.build_dataloader(loader_of(request, "val")):
            scores += [sample.pred_score.tolist() for sample in runner.model.val_step(batch)]
    return {"curve": curve, "scores": scores}


def main() -> None:
    """Do what the request says."""
    request = json.loads(Path(sys.argv[1]).read_text())
    import cv2
    import mmaction.datasets
    import mmaction.engine
    import mmaction.models  # noqa: F401  fills the registries
    import torch
    from mmengine.registry import init_default_scope

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    init_default_scope("mmaction")
    answer = {"initial": initial, "train": train}[request["verb"]](request)
    part = Path(request["out"]).with_suffix(".part")
    part.write_text(json.dumps(answer))
    os.replace(part, request["out"])


if __name__ == "__main__":
    main()
