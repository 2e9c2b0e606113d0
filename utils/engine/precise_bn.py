"""Precise batch norm: average the statistics of many training batches for an evaluation.

Source: Wu and Johnson 2021, arXiv:2105.07576, section 3.1. fvcore, PySlowFast and PaddleVideo use the same name.
The running statistics come from the last ten or so batches, each with different weights. Here the weights do not change
while N global batches pass. Each batch has a mean and an unbiased variance (the convention of the running buffers).
Their averages over the batches replace the running statistics. The training itself is not affected.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from datasets.loading import loader
from utils import ledger
from utils.dist import World
from utils.engine.network import autocast
from utils.sync_bn import GroupBatchNorm

if TYPE_CHECKING:
    from datasets.loading.train import TrainLoader
    from utils.engine.run import TrainingRun


def averages(
    net: nn.Module, forwards: Iterable[Callable[[nn.Module], object] | None], world: World
) -> dict[str, Tensor] | None:
    """Return statistics of the layers that training would update. Collective. The model and its buffers do not change.

    Layers frozen by the model's own `train()` (partial BN) are left out, and so are those that do not run in evaluation
    (auxiliary heads). Dropout is off.

    Args:
        net: the model itself, its batch norm converted by `sync_bn.convert`.
        forwards: a function for each micro-batch of this rank, which runs the network it is given on that batch;
            the same number on each rank. None ends the work: the ranks have agreed to stop.
        world: the ranks.

    Returns:
        Buffer names of `net` with their values, the same on every rank; None if it was stopped.
    """
    modes = {module: module.training for module in net.modules()}
    layers = _training_layers(net)
    sums: dict[str, Tensor] = {}
    count = 0

    # Only these layers are in training mode, so only they compute statistics of the batch
    try:
        for layer in layers.values():
            layer.training = True
        for forward in forwards:
            if forward is None:
                return None

            for layer in layers.values():
                layer.ran = False
            with torch.no_grad():
                forward(net)
            for name, layer in layers.items():
                # float64: N batches are summed
                if layer.ran and layer.batch_mean is not None and layer.batch_var is not None:
                    both = torch.cat([layer.batch_mean, layer.batch_var]).double()
                    sums[name] = both if name not in sums else sums[name].add_(both)
            count += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer in layers.values():
            layer.ran = False
            for scratch in (layer.batch_mean, layer.batch_var):
                if scratch is not None:
                    scratch.zero_()

    # Each rank of a BN group has the statistics of the whole group, so all groups have equal weight in the sum
    flat = world.sum_(torch.cat([*sums.values()])) / (count * world.size) if sums else torch.zeros(0)

    # From (mean, variance) of each layer to the names of the model's buffers
    result: dict[str, Tensor] = {}
    for name, part in zip(sums, flat.split([len(total) for total in sums.values()]), strict=True):
        mean, var = part.chunk(2)
        buffer = layers[name].running_mean
        assert buffer is not None
        prefix = f"{name}." if name else ""
        result[f"{prefix}running_mean"], result[f"{prefix}running_var"] = mean.to(buffer.dtype), var.to(buffer.dtype)
    return result


def _training_layers(net: nn.Module) -> dict[str, GroupBatchNorm]:
    """Return the batch-norm layers that the model trains, by name. Leave the model in evaluation mode."""
    net.train()  # a model with frozen layers switches them back to evaluation here
    layers = {name: module for name, module in net.named_modules() if isinstance(module, GroupBatchNorm)}
    layers = {name: layer for name, layer in layers.items() if layer.training and layer.running_mean is not None}
    net.eval()
    return layers


@contextlib.contextmanager
def applied(net: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Give the model's buffers these values within the block, and restore them afterwards."""
    buffers = {name: buffer for name, buffer in net.named_buffers() if name in values}
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    for name, buffer in buffers.items():
        buffer.copy_(values[name])

    try:
        yield
    finally:
        for name, buffer in buffers.items():
            buffer.copy_(before[name])


@contextlib.contextmanager
def network(run: TrainingRun) -> Iterator[nn.Module | None]:
    """Yield the network to validate with: the moving average if there is one, with precise batch norm if it is due.

    Yield None if a signal stopped the precise batch norm. Collective.
    """
    cfg, learner, state = run.cfg, run.learner, run.state
    net = learner.ema.net if learner.ema else learner.net
    batches, every = cfg.precise_bn.batches, cfg.precise_bn.every_iters or 1
    if not batches or (state.step % every and state.step != run.last):
        yield net
        return

    # Read the next batches of the training order ahead of the training, which reads them again later
    began = time.monotonic()
    clips = loader.train(
        cfg,
        run.world,
        learner.shards,
        start=state.step,
        stop=state.step + batches,
        records=run.train_records,
        replay=ledger.given_up(run.folder.exp, ledger.PRECISE_BN, state.step),
    )

    with clips, run.monitor.watch.during("precise batch norm", None, clips.being_read):
        values = averages(net, _forwards(run, clips), run.world)
    if values is None:
        yield None
        return

    # A checkpoint of this step then has the statistics that its validation used
    state.precise_bn = state.step, values
    seconds = round(time.monotonic() - began, 1)
    run.log.event("batch_norm", "averaged", batches=batches, seconds=seconds)
    with applied(net, values):
        yield net


def _forwards(run: TrainingRun, batches: TrainLoader) -> Iterator[Callable[[nn.Module], object] | None]:
    """Yield a function for each micro-batch that runs a network on it, augmented but not mixed; None: stop."""
    for _, micro_batches in batches:
        run.monitor.note(batches, ledger.PRECISE_BN)

        # Once a step, so that all ranks stop at the same one
        run.stop.ask(batches.service.trouble)
        if run.world.any(run.stop.received):
            yield None
            return

        for batch in micro_batches:
            clips, _ = run.learner.augment(batch)  # (B, C, T, H, W)

            # `clips` is bound now: a closure would see the clips of a later micro-batch
            def forward(net: nn.Module, clips: Tensor = clips) -> object:
                with autocast(run.cfg.precision, run.world.device):
                    return net(clips)

            yield forward

        run.monitor.watch.progress()
