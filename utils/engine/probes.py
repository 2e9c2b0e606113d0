"""The heads of a probe in a run: score all, choose the best, write a line and curves for each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

from torch import nn

from methods.probe import Probe
from utils.errors import UserError
from utils.log import RunLog, format_validation


def count(net: nn.Module) -> int:
    """Return the number of heads of a probe with several; 0 for any other network."""
    return len(net.heads) if isinstance(net, Probe) and len(net.heads) > 1 else 0


def check(net: nn.Module, *, precision: str, distills: bool) -> None:
    """Refuse options that make the heads of a probe depend on each other, or that need a single answer.

    Raises:
        UserError: several heads with fp16 or with distillation.
    """
    if not count(net):
        return
    if precision == "fp16":
        raise UserError(
            "common.precision: with fp16, a gradient that overflows in one head of a probe skips the step of all; set "
            "bf16 or fp32, or train one head (model.kwargs.lr_mults and decays)"
        )
    if distills:
        raise UserError("common.distill: a probe with several heads has no single answer; train one head, or remove it")


def all_heads(net: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a probe answers with the logits of all heads."""
    return net.all_heads() if isinstance(net, Probe) else contextlib.nullcontext()


def criterion(result: Mapping[str, float]) -> float:
    """Return the number by which the best checkpoint and the best head are chosen, per cent."""
    return result.get("mean_average_precision", result["top1"])


def best_of(results: Sequence[Mapping[str, float]]) -> int:
    """Return the head with the highest criterion, the first of equal ones; nan is below all."""
    reached = [criterion(result) for result in results]
    # max() keeps the first of equal values, but nan compares false with all: it counts as the lowest
    return max(range(len(results)), key=lambda head: -math.inf if math.isnan(reached[head]) else reached[head])


def choose(results: Sequence[Mapping[str, float]], *nets: nn.Module) -> None:
    """Make the best head answer in evaluation."""
    for net in nets:
        assert isinstance(net, Probe)
        net.choose(best_of(results))


def write(results: Sequence[Mapping[str, float]], net: nn.Module, log: RunLog, step: int) -> None:
    """Write the result of each head, then the best head, and the curves."""
    assert isinstance(net, Probe)
    curves: dict[str, float] = {}
    for number, (result, (rate, decay)) in enumerate(zip(results, net.grid, strict=True)):
        of_run = "of the run" if decay is None else f"{decay:g}"
        log.line(f"head {number:02}, rate x {rate:g}, weight decay {of_run}:{format_validation(result)}")
        curves |= {f"loss_val/head{number:02}": result["loss"], f"top1_val/head{number:02}": result["top1"]}
    log.line(f"best head: {best_of(results):02}")
    log.scalars(step, curves)
