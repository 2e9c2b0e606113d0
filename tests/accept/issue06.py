"""The acceptance table of issue 06: weights, predict, export, speed. `make accept ISSUE=06 [ROWS=a,b]`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import checks06  # noqa: E402
from rows import run_rows, workspace  # noqa: E402


def parity() -> dict:
    """The peers' published formats, all parameters random, against the peers' own logits."""
    return checks06.parity()


def hostile() -> dict:
    """Weights that would run code, and truncated ones."""
    return checks06.hostile(workspace() / "hostile")


def predict_export() -> dict:
    """The demo's model on real videos through torch and onnxruntime."""
    return checks06.predict_and_export(workspace())


def step() -> dict:
    """A training step on one CPU thread beside MMAction2's."""
    return checks06.steps(workspace())


def gpu_step() -> dict:
    """A training step on a GPU beside plain PyTorch."""
    return checks06.gpu_steps(workspace())


ROWS = {
    "parity": ("31 published formats, parity-expand --check", "each <= 1e-4 of the largest logit, no key left", parity),
    "hostile": (
        ".pkl, .pdparams, .pth, .pyth that run code; truncated",
        "refused with the name or the reason",
        hostile,
    ),
    "predict_export": (
        "data/single by torch and onnxruntime",
        "same top-5, logits <= 1e-4, infer.json",
        predict_export,
    ),
    "step": ("train step / MMAction2's, CPU seconds, one thread", "<= 1.03; SlowFast <= .97", step),
    "gpu_step": ("train step on one GPU / fp32-tf32 eager channels-first", ">= 2x faster, MFU reported", gpu_step),
}

if __name__ == "__main__":
    sys.exit(run_rows(ROWS, "06"))
