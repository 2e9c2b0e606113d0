"""A tiny experiment with every random part of training on, for the tests of the loop."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from tests.log_lines import parse_log

CONFIG = """\
common:
    model:
        type: {method}
        backbone: {backbone}
        num_segments: 2
        num_class: 8
        dropout: 0.5
        pretrained: False
        kwargs: {{bn_group_size: {group}, bn_sync_stats: {sync_stats}}}
    augmentation:
        input_size: 32
        test_resize: 36
        crop: random_resized
        colorjitter: [0.2, 0.2, 0.2, 0.1]
        random_erasing: [0.5, 0.02, 0.4, 0.3]
        mix_up: 0.2
    data: {{reader: video, sampling: tsn}}
    workers: {workers}
    batch_size: 4
    lr_scheduler: {{type: COSINE, base_lr: 0.01, warmup_steps: 2, warmup_lr: 0.02, max_iter: {steps}}}
    label_smooth: 0.1
    no_wd: True
    momentum: 0.9
    weight_decay: 0.0001
    nesterov: True
    val_freq: {val_freq}
    print_freq: {print_freq}
    train_root: {data}
    train_source: {data}/lists/train.txt
    val_root: {data}
    val_source: {data}/lists/val.txt
"""
DEFAULTS = {"method": "tsn", "backbone": "resnet18", "group": 1, "sync_stats": True, "workers": 0}
DEFAULTS |= {"steps": 6, "val_freq": 3, "print_freq": 2}


def make(folder: Path, data: Path, **changes: object) -> Path:
    """Write the config into a new folder; `changes` replace DEFAULTS."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(data=data, **(DEFAULTS | changes)))
    return folder


def few_videos(exp: Path, data: Path, count: int = 4) -> str:
    """An override that makes an experiment validate on its first videos only."""
    lines = (data / "lists/val.txt").read_text().splitlines(keepends=True)
    (exp / "few.txt").write_text("".join(lines[:count]))
    return f"common.val_source={exp / 'few.txt'}"


def fingerprint(exp: Path, name: str = "ckpt.pth.tar") -> str:
    """sha256 over weights, BN buffers, averages of the optimiser, step, best accuracy and the logged losses."""

    state = torch.load(exp / name, weights_only=True)
    digest = hashlib.sha256()
    for key, tensor in sorted(state["model"].items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    for key, values in sorted(state["optimizer"]["state"].items()):
        for name, value in sorted(values.items()):
            digest.update(f"{key} {name}".encode() + torch.as_tensor(value).numpy().tobytes())
    lines = [[line[key] for key in ("step", "loss", "loss_avg", "top1", "lr")] for line in parse_log(exp / "log.txt")]
    digest.update(json.dumps([lines, state["step"], state["best_metric"]]).encode())
    return digest.hexdigest()
