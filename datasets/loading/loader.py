"""Make the loaders of a loaded configuration: `train` and `val`.

A loader owns processes. Close it, or use it in a `with` statement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

from datasets.lists.records import Records, records_of
from datasets.loading.base import LoaderOptions
from datasets.loading.eval import EvalLoader
from datasets.loading.train import TrainLoader
from datasets.memcached.servers import servers_of
from datasets.plan.train import train_spec
from datasets.plan.views import EvalSpec, eval_spec
from datasets.readers.metadata_cache import MetadataCache
from datasets.readers.spec import ReaderSpec

if TYPE_CHECKING:
    from utils.config import Config
    from utils.dist import World
    from utils.shards import ShardPlan


def loader_options(cfg: Config) -> LoaderOptions:
    """Return how a configuration reads its media."""
    data = cfg.data
    if data.metadata is not None:
        MetadataCache(data.metadata)  # refuse a wrong file here, once, and not in every reader process
    memcached = servers_of(data.memcached) if data.reader in ("memcached", "dali") else None

    return LoaderOptions(
        reader=ReaderSpec(
            kind=data.reader,
            template=None if data.template in (None, "auto") else data.template,
            frame_base=data.frame_base if isinstance(data.frame_base, int) else None,
            memcached=memcached,
            metadata=data.metadata,
            missing_share=data.missing_share,
        ),
        workers=cfg.workers,
        prefetch=data.prefetch,
        deadline=data.deadline_seconds,
        on_bad=data.on_bad,
        bad_budget=data.bad_budget,
    )


def loaders(reader: str) -> tuple[type[TrainLoader], type[EvalLoader]]:
    """Return the training and the evaluation loader of a reader. Raise UserError if it is not installed."""
    if reader != "dali":
        return TrainLoader, EvalLoader
    # Imported only here: DALI is optional and takes seconds to load.
    from datasets.dali.loader import DaliEvalLoader, DaliTrainLoader

    return DaliTrainLoader, DaliEvalLoader


def train(
    cfg: Config,
    world: World,
    shards: ShardPlan,
    *,
    start: int = 0,
    stop: int | None = None,
    records: Records | None = None,
    replay: Collection[tuple[int, int]] = (),
) -> TrainLoader:
    """Make the training loader.

    Args:
        cfg: a loaded configuration.
        world: rank, size and device of this process.
        shards: positions of this rank (utils.shards.ShardPlan).
        start: first step.
        stop: number of steps of the run; None uses lr_scheduler.max_iter, which may be None (no limit).
        records: the list, if it is loaded already.
        replay: see `TrainLoader`.
    """
    # data.prefetch counts micro-batches, the loader counts steps.
    return loaders(cfg.data.reader)[0](
        records_of(cfg, "train") if records is None else records,
        train_spec(cfg),
        dataclasses.replace(loader_options(cfg), prefetch=-(-cfg.data.prefetch // len(shards.micro_batches))),
        seed=cfg.seed,
        shards=shards,
        start=start,
        stop=cfg.lr_scheduler.max_iter if stop is None else stop,
        device=world.device,
        replay=replay,
        order=cfg.data.order,
        num_sample=cfg.data.num_sample,
    )


def val(
    cfg: Config,
    world: World,
    *,
    records: Records | None = None,
    spec: EvalSpec | None = None,
    skip: Collection[int] = (),
) -> EvalLoader:
    """Make the loader of the validation list.

    Args:
        cfg, world, records: as in `train`.
        spec: views; None = those of the configuration.
        skip: samples to leave out because they were scored before; the same on every rank.
    """
    records = records_of(cfg, "val") if records is None else records
    views = eval_spec(cfg) if spec is None else spec
    return loaders(cfg.data.reader)[1](
        records, views, loader_options(cfg), rank=world.rank, world=world.size, device=world.device, skip=skip
    )
