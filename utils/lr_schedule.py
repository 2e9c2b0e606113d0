"""The learning rate as a function of the iteration: linear warm-up, then cosine or steps. Imports nothing heavy."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence


def lr_at(
    step: int,
    *,
    type: str,
    base_lr: float,
    max_iter: int,
    warmup_steps: int = 0,
    warmup_lr: float | None = None,
    min_lr: float = 0.0,
    lr_steps: Sequence[int] | None = None,
    lr_mults: Sequence[float] | None = None,
) -> float:
    """Learning rate of iteration `step`, to be set before its optimiser step.

    * Warm-up: a line from base_lr at iteration 0 to `warmup_lr` at iteration warmup_steps. So `warmup_lr` is the
      PEAK and base_lr the start; without warm-up the peak is base_lr.
    * COSINE: min_lr + (peak - min_lr) * (1 + cos(pi * progress)) / 2, progress 0 at the end of the warm-up and 1 at
      max_iter (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts).
    * STEP: the peak times the product of the lr_mults whose lr_steps have been reached.

    Args:
        step: iteration, from 0.
        type: "COSINE" or "STEP".
        base_lr, warmup_lr, min_lr: learning rates of the whole global batch.
        max_iter, warmup_steps, lr_steps: iterations; lr_steps ascending.
        lr_mults: one factor for each of lr_steps.

    Raises:
        ValueError: an unknown type.
    """
    peak = base_lr if warmup_steps <= 0 or warmup_lr is None else warmup_lr
    if step < warmup_steps:
        return base_lr + step / warmup_steps * (peak - base_lr)
    if type == "COSINE":
        progress = min((step - warmup_steps) / max(max_iter - warmup_steps, 1), 1.0)
        return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * progress)) / 2
    if type == "STEP":
        return peak * math.prod((lr_mults or ())[: bisect_right(lr_steps or (), step)])
    raise ValueError(f"lr_scheduler.type is {type!r}; it must be COSINE or STEP")
