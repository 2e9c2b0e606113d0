"""An experiment with weights, without training it: random ones that tell videos apart, written as a run writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests import experiment, models
from utils import checkpoint, config
from utils.engine.network import model_arguments

NAMES = [f"class {k}" for k in range(8)]


def make(folder: Path, data: Path, *, name: str = checkpoint.BEST, **changes: object) -> Path:
    """The experiment of tests/experiment.py with a checkpoint; `changes` as there."""
    exp = experiment.make(folder, data, **changes)
    cfg = config.load(exp)
    torch.manual_seed(3)
    model = models.build(**model_arguments(cfg, pretrained=False))
    nn.init.normal_(model.classifier.weight, std=0.5)  # scores that differ
    state = {
        "model": model.state_dict(),
        "config": config.to_dict(cfg),
        "classes": NAMES,
        "step": 7,
        "code": "",
        "versions": checkpoint.versions(),
    }
    checkpoint.save(exp, name, state)
    return exp
