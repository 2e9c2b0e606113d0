"""Score videos with a network: the one function behind `train`'s validation, `eval`, `predict` and `export`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from datasets.loading.eval import rounds
from utils import metrics, transforms, view_batches
from utils.engine import network

if TYPE_CHECKING:
    from datasets.loading.eval import EvalLoader, VideoItem
    from utils.config import Config
    from utils.dist import World
    from utils.signals import StopFlag


def evaluate(
    net: torch.nn.Module,
    videos: EvalLoader,
    *,
    world: World,
    num_class: int,
    normalise: Callable[[torch.Tensor], torch.Tensor],
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    clips_per_forward: int | None = 32,
    average: str = "prob",
    keep: Callable[[VideoItem, torch.Tensor | None], None] | None = None,
    stop: StopFlag | None = None,
    earlier: Iterable[tuple[int, torch.Tensor | None]] = (),
    heads: int = 0,
) -> list[dict[str, float]] | None:
    """Score every video exactly once over all ranks. Nothing else in the project scores videos.

    A video that cannot be read counts as wrong. All ranks do the same number of rounds, so that they can agree in each
    round whether to stop. When memory runs out, the evaluation continues with fewer views per forward pass.

    Args:
        net: clips (N, C, T, H, W) -> logits (N, K), or (N, heads, K); it is put into evaluation mode.
        videos: the loader.
        world: the ranks.
        num_class: K.
        normalise: uint8 (N, T, H, W, C) -> float (N, C, T, H, W).
        autocast: the mixed-precision region of a forward pass.
        clips_per_forward: views per forward pass; None to measure the best number.
        average: how to average the views of a video, one of `metrics.AVERAGES`.
        keep: called with (item, logits (V, K) or (V, heads, K) float32, None for a failed video).
        stop: stops the evaluation after a round in which any rank has received a signal.
        earlier: (sample, logits as in `keep`) of videos scored by an earlier process, each on one rank only. They count
            too.
        heads: number of heads of a probe that answer side by side; 0: the network has one answer.

    Returns:
        The result of `metrics.Tally.metrics`, one for each head; None if a signal stopped the evaluation.
    """

    def forward(clips: torch.Tensor) -> torch.Tensor:
        with autocast():
            return net(normalise(clips)).float()

    net.eval()
    records = videos.records
    tallies = [
        metrics.Tally(records.labels, num_class, targets=records.targets, device=world.device, average=average)
        for _ in range(max(heads, 1))
    ]

    def add(sample: int, logits: torch.Tensor | None) -> None:
        for head, tally in enumerate(tallies):
            # A failed video counts as wrong for every head
            tally.add(sample, logits[:, head] if heads and logits is not None else logits)

    # A resumed evaluation counts the videos of the earlier process first
    for sample, logits in earlier:
        add(sample, logits)

    views = videos.spec.views
    runner = view_batches.ViewBatcher(forward, world.device, size=clips_per_forward, net=net)
    # Views of a full round: a short last round is padded to the same chunks, so that results stay bit-identical
    full = max(1, runner.group // views) * views

    with torch.inference_mode(), view_batches.full_precision():
        for items in rounds(videos, runner.group):  # empty on a rank that has run out of videos
            croppers = [(crop_views, views) for _, crop_views in items if crop_views is not None]

            # The views of several videos run together; `split` gives each video its (V, K) or (V, heads, K) back
            scores = iter(runner.run(*view_batches.joined(croppers), full).split(views) if croppers else ())
            for item, crop_views in items:
                video_logits = next(scores) if crop_views is not None else None
                add(item.sample, video_logits)
                if keep is not None:
                    keep(item, video_logits)

            # Collective: every rank takes part in every round, even with no videos left
            if stop is not None:
                stop.ask(videos.service.trouble)
                if world.any(stop.received):
                    return None

        for tally in tallies:
            world.sum_(tally.counts)
    return [tally.metrics() for tally in tallies]


def of_config(cfg: Config, world: World) -> dict[str, Any]:
    """Return the arguments of `evaluate` that a config decides: world, num_class, normalise, autocast."""
    return {
        "world": world,
        "num_class": cfg.model.num_class,
        "normalise": normaliser(cfg),
        "autocast": functools.partial(network.autocast, cfg.precision, world.device),
    }


def normaliser(cfg: Config) -> functools.partial[torch.Tensor]:
    """Return the function from uint8 clips (N, T, H, W, C) to a network's input, with the mean and std of a config."""
    augmentation = cfg.augmentation
    dtype = network.dtype_of(cfg.precision)
    return functools.partial(transforms.normalise, mean=augmentation.mean, std=augmentation.std, dtype=dtype)
