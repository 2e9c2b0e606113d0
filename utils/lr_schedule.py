"""Compute the learning rate of an iteration: warm-up, then cosine or steps. Imports nothing heavy."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

WARMUPS = ("to_peak", "to_schedule", "factor_linear", "factor_constant", "factor_exp")


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
    warmup_type: str = "to_peak",
    epoch_iters: float | None = None,
    warmup_epoch_iters: float | None = None,
    begin: int | None = None,
) -> float:
    """Return the learning rate of iteration `step`, to be set before its optimiser step.

    base_lr is the rate of iteration 0 and `warmup_lr` the PEAK, with which the schedule begins. Without warm-up the
    peak is base_lr. The schedule S(k):

    * COSINE: min_lr + (peak - min_lr) * (1 + cos(pi * progress)) / 2, progress 0 if the schedule begins and 1 at
      max_iter (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts).
    * STEP: the peak times the product of the lr_mults whose lr_steps have been reached.

    The warm-up, k < W = warmup_steps, with r = base_lr / peak:

    * to_peak (MMAction2 1.x): a line from base_lr to the peak. The cosine begins at W; with other types at 0.
    * to_schedule (PySlowFast, PaddleVideo): a line from base_lr to S(W).
    * factor_linear, factor_constant, factor_exp (MMAction2 0.x, by its runner): S(k) times
      1 - (1 - k/W) (1 - r), times r, times r ** (1 - k/W).

    Args:
        step: iteration, from 0.
        type: "COSINE" or "STEP".
        base_lr, warmup_lr, min_lr: learning rates of the whole global batch.
        max_iter, warmup_steps, lr_steps: iterations; lr_steps ascending.
        lr_mults: one factor for each of lr_steps.
        warmup_type: one of WARMUPS.
        epoch_iters, warmup_epoch_iters: iterations per epoch, not necessarily whole: S, or the k of the warm-up,
            changes only when an epoch begins, rounded like all lengths in epochs. None: it changes in every iteration.
        begin: first iteration of the cosine, if it differs (`begin` of MMAction2's schedulers).

    Raises:
        ValueError: an unknown type or warmup_type.
    """
    if warmup_type not in WARMUPS:
        raise ValueError(f"lr_scheduler.warmup_type is {warmup_type!r}; it must be one of {', '.join(WARMUPS)}")

    # Without warm-up the schedule starts from base_lr, whatever warmup_lr is.
    peak = base_lr if warmup_steps <= 0 or warmup_lr is None else warmup_lr
    if begin is None:
        begin = warmup_steps if warmup_type == "to_peak" else 0

    schedule = _schedule(type, peak, begin, max_iter, min_lr, lr_steps or (), lr_mults or ())
    moved = step if epoch_iters is None else _epoch_begin(step, epoch_iters)

    if step >= warmup_steps:
        return schedule(moved)

    # During the warm-up: `share` of the way, from 0 to 1, in steps of an epoch if the recipe warms up by epochs.
    share = (step if warmup_epoch_iters is None else _epoch_begin(step, warmup_epoch_iters)) / warmup_steps

    if warmup_type in ("to_peak", "to_schedule"):
        end = peak if warmup_type == "to_peak" else schedule(warmup_steps)
        return base_lr + share * (end - base_lr)
    return schedule(moved) * _factor(warmup_type, share, base_lr / peak)


def _factor(warmup_type: str, share: float, ratio: float) -> float:
    """Return the factor that a warm-up of MMAction2 0.x applies to the regular rate, `share` of the way through it."""
    if warmup_type == "factor_linear":
        return 1 - (1 - share) * (1 - ratio)
    return ratio if warmup_type == "factor_constant" else ratio ** (1 - share)


def _schedule(
    type: str,
    peak: float,
    begin: int,
    max_iter: int,
    min_lr: float,
    lr_steps: Sequence[int],
    lr_mults: Sequence[float],
) -> Callable[[int], float]:
    """Return S: the rate at an iteration, as if there were no warm-up."""

    def cosine(step: int) -> float:
        # Clamped to 0..1: before `begin` the rate is the peak, after max_iter min_lr.
        progress = min(max(step - begin, 0) / max(max_iter - begin, 1), 1.0)
        return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def steps(step: int) -> float:
        return peak * math.prod(lr_mults[: bisect_right(lr_steps, step)])  # the steps at or before this iteration

    if type not in ("COSINE", "STEP"):
        raise ValueError(f"lr_scheduler.type is {type!r}; it must be COSINE or STEP")
    return cosine if type == "COSINE" else steps


def _epoch_begin(step: int, epoch_iters: float) -> int:
    """Return the first iteration of the epoch of `step`; epoch e begins at round(e * epoch_iters)."""
    epoch = int((step + 0.5) / epoch_iters)  # a first guess: rounding may put it one epoch off
    # Rounded lengths of epochs differ by one iteration: step to the epoch that really holds this iteration.

    while round((epoch + 1) * epoch_iters) <= step:
        epoch += 1
    while round(epoch * epoch_iters) > step:
        epoch -= 1

    return round(epoch * epoch_iters)


def scaling_remark(
    global_batch: int, reference_batch: int | None, *, base_lr: float, warmup_lr: float | None, min_lr: float
) -> str | None:
    """Return what the linear scaling rule suggests for the learning rates; None if the batch is the recipe's.

    The rule: k times the batch, k times the rate (Goyal et al. 2017, arXiv:1706.02677, section 2.1). It is a remark for
    the log: the code never changes a learning rate.
    """
    if reference_batch is None or global_batch == reference_batch:
        return None

    rates = {"base_lr": base_lr, "warmup_lr": warmup_lr, "min_lr": min_lr}
    factor = global_batch / reference_batch
    scaled = [f"{name} {rate:g} -> {rate * factor:g}" for name, rate in rates.items() if rate]

    return (
        f"the global batch is {global_batch}, the recipe's learning rates are for {reference_batch}: the linear "
        f"scaling rule would make {', '.join(scaled)}. Nothing was changed; set these rates if you want them"
    )


def rate_per_256(videos: int, peak: float) -> str:
    """Return, for the log, the peak rate in the form that recipes of transformers use."""
    return (
        f"the peak learning rate {peak:g} at a global batch of {videos} videos is {peak * 256 / videos:g} per 256 "
        "(recipes of transformers state the latter)"
    )
