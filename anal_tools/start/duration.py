"""Estimate how long training takes on this machine, before it begins."""

from __future__ import annotations

import math
from pathlib import Path

from utils import config
from utils.config.lengths import resolve_lengths

STEPS = 2  # timed steps, after one warm-up step


def estimate(exp: Path) -> str:
    """Time steps of an experiment that `start` wrote, on random clips, and return a sentence for the user."""
    import torch

    from anal_tools.benchmark.step import Step
    from utils import dist

    cfg = config.load(exp)
    lists = sorted((exp / "lists").glob("*train.txt"))
    videos = len(lists[0].read_text("utf-8", errors="surrogateescape").splitlines())
    steps = resolve_lengths(cfg, videos, cfg.batch_size * (cfg.shards or 1)).lr_scheduler.max_iter or 0

    step = Step(cfg, dist.World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu")), bare=False)
    step.loop(1)
    seconds = step.loop(STEPS)

    trainings = f"each of {len(lists)} training runs takes" if len(lists) > 1 else "training takes"
    return (
        f"{trainings} about {duration(steps * seconds)} here: {steps} steps of {seconds:.2g} s, without reading and "
        "evaluation"
    )


def duration(seconds: float) -> str:
    """Return a duration in readable form: `40 s`, `12 min`, `3 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
