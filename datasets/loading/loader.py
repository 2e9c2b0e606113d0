"""The door to the data: `build` makes the loader of a loaded configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, overload

import torch

from datasets.lists.records import Records, records_of
from datasets.loading.base import Reading
from datasets.loading.eval import EvalLoader
from datasets.loading.train import TrainLoader
from datasets.memcached.servers import servers_of
from datasets.plan.train import train_spec
from datasets.plan.views import EvalSpec, eval_spec
from datasets.readers.facts_cache import FactsCache
from datasets.readers.spec import ReaderSpec

if TYPE_CHECKING:
    from utils.config import Config
    from utils.dist import World
    from utils.shards import ShardPlan


def reading(cfg: Config) -> Reading:
    """How a configuration wants media to be read."""
    data = cfg.data
    if data.facts is not None:
        FactsCache(data.facts)  # a wrong file is refused here, once, and not by every reader process
    memcached = servers_of(data.memcached) if data.reader in ("memcached", "dali") else None
    return Reading(
        reader=ReaderSpec(
            kind=data.reader,
            template=None if data.template in (None, "auto") else data.template,
            frame_base=data.frame_base if isinstance(data.frame_base, int) else None,
            memcached=memcached,
            facts=data.facts,
            missing_share=data.missing_share,
        ),
        workers=cfg.workers,
        prefetch=data.prefetch,
        deadline=data.deadline_seconds,
        on_bad=data.on_bad,
        bad_budget=data.bad_budget,
    )


def loaders(reader: str) -> tuple[type[TrainLoader], type[EvalLoader]]:
    """The training and the evaluation loader of a reader; UserError if what it needs is not installed."""
    if reader != "dali":
        return TrainLoader, EvalLoader
    from datasets.dali.loader import DaliEvalLoader, DaliTrainLoader

    return DaliTrainLoader, DaliEvalLoader


@overload
def build(
    cfg: Config,
    split: Literal["train"],
    world: World,
    shards: ShardPlan,
    *,
    start: int = 0,
    stop: int | None = None,
    records: Records | None = None,
    replay: Collection[tuple[int, int]] = (),
) -> TrainLoader: ...


@overload
def build(
    cfg: Config,
    split: Literal["val"],
    world: World,
    *,
    records: Records | None = None,
    spec: EvalSpec | None = None,
    skip: Collection[int] = (),
) -> EvalLoader: ...


def build(
    cfg: Config,
    split: str,
    world: World,
    shards: ShardPlan | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    records: Records | None = None,
    replay: Collection[tuple[int, int]] = (),
    spec: EvalSpec | None = None,
    skip: Collection[int] = (),
) -> TrainLoader | EvalLoader:
    """Make the loader of a configuration. It holds processes: close it, or use it in a `with` statement.

    Args:
        cfg: a loaded configuration.
        split: "train" or "val".
        world: rank, size and device of this process.
        shards: train: which positions this rank has (utils.shards.ShardPlan).
        start: train: first step.
        stop: train: number of steps of the run; None takes lr_scheduler.max_iter, which may be None = without end.
        records: the list, if it is loaded already.
        replay: train: see `TrainLoader`.
        spec: val: views; None = those of the configuration.
        skip: val: samples that are not wanted, because they were scored before; the same on every rank.
    """
    device: torch.device = world.device
    if records is None:
        records = records_of(cfg, split)
    if split == "train":
        if shards is None:
            raise ValueError("the training loader needs the shards of this rank")
        stop = cfg.lr_scheduler.max_iter if stop is None else stop
        return loaders(cfg.data.reader)[0](
            records,
            train_spec(cfg),
            dataclasses.replace(reading(cfg), prefetch=-(-cfg.data.prefetch // len(shards.micro_batches))),
            seed=cfg.seed,
            shards=shards,
            start=start,
            stop=stop,
            device=device,
            replay=replay,
            order=cfg.data.order,
            num_sample=cfg.data.num_sample,
        )
    if split != "val":
        raise ValueError(f"split is train or val, not {split!r}")
    views = eval_spec(cfg) if spec is None else spec
    return loaders(cfg.data.reader)[1](
        records, views, reading(cfg), rank=world.rank, world=world.size, device=device, skip=skip
    )
