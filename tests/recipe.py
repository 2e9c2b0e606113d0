"""The whole recipe of a video transformer on a tiny VideoMAE, for tests of stops and of other numbers of ranks."""

from __future__ import annotations

import json
from typing import Any

RECIPE: dict[str, Any] = {
    "model.type": "videomae",
    "model.backbone": "vit3d",
    "model.dropout": 0.1,
    "model.kwargs.width": 24,
    "model.kwargs.depth": 3,
    "model.kwargs.heads": 2,
    "model.kwargs.mlp_ratio": 2.0,
    "model.kwargs.drop_path": 0.3,
    "model.kwargs.attention_dropout": 0.1,
    "model.kwargs.checkpointing": True,
    "model.kwargs.freeze": 1,
    "optimizer.type": "adamw",
    "optimizer.layer_decay": 0.75,
    "weight_decay": 0.05,
    "nesterov": False,
    "no_wd": False,
    "lr_scheduler.base_lr": 1e-4,
    "lr_scheduler.warmup_lr": 1e-3,
    "batch_size": 4,
    "data.num_sample": 2,
    "augmentation.colorjitter": None,
    "augmentation.randaugment": "rand-m7-n4-mstd0.5-inc1",
    "augmentation.random_erasing": [0.5, 0.02, 0.333, 0.3],
    "augmentation.random_erasing_mode": "pixel",
    "augmentation.mix_up": 0.8,
    "augmentation.cutmix": 1.0,
}


def words(**changes: Any) -> list[str]:
    """The recipe as `key=value` texts; keys of `changes` have two underscores for a dot."""
    settings = RECIPE | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]
