"""Set a training run up: config -> ranks -> folder and lock -> lists -> readers -> model -> checkpoint -> log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datasets.lists import first_look
from datasets.lists.class_names import read_class_names
from datasets.loading import loader
from datasets.plan import order
from datasets.readers.resize import KERNEL
from utils import checkpoint, config, dist, faults, ledger, log, lr_schedule, run_dir, signals, transforms
from utils.engine import learner, state
from utils.engine.monitor import Monitor
from utils.engine.run import Run
from utils.faults import UserError
from utils.shards import ShardPlan

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.loading.train import TrainLoader
    from utils.config import Config
    from utils.dist import World


@contextlib.contextmanager
def start(exp: Path, *, overrides: Sequence[str] = (), fresh: bool = False) -> Iterator[Run]:
    """Set a run up, from wherever its folder says that it is; all of it is undone on leaving. Collective.

    Args:
        exp: experiment folder.
        overrides: `key=value` texts that replace config values.
        fresh: move the files of an earlier run to `old/<time>/`.

    Raises:
        UserError: config, lists, weights or folder do not allow the run. Nothing was changed then.
    """
    cfg = config.load(exp, overrides)
    if cfg.data.folds:
        raise UserError(f"{exp}: data.folds is set; start {exp / 'train.sh'} PARTITION N, which trains each fold")
    config.check_files(cfg)
    with contextlib.ExitStack() as stack:
        # Ranks, folder, checkpoint
        world = dist.join()
        stack.push(dist.leave)
        faults.fail_point("start.joined")
        folder = run_dir.RunDir(exp)
        world.on_main(folder.lock)
        stack.callback(folder.close)
        found = None if fresh else checkpoint.find_on_all_ranks(exp, world, state.check)
        saved = found.state if found else None

        # Lists, and what they say about the config
        train_records, val_records = (loader.records_of(cfg, split) for split in ("train", "val"))
        class_names = read_class_names(config.class_names_file(cfg), cfg.model.num_class)
        shards = ShardPlan(
            total=saved["shards"] if saved else cfg.shards or world.size,
            batch_size=cfg.batch_size,
            world=world.size,
            rank=world.rank,
            group_size=cfg.model.kwargs["bn_group_size"],
        )
        cfg = config.resolve_lengths(cfg, len(train_records), shards.global_batch)
        messages = first_look.look(cfg, train_records, val_records, compare=world.is_main)
        lists = {"train": train_records.list_hash, "val": val_records.list_hash}
        if found:
            differences = config.differences(found.state["config"], config.to_dict(cfg))
            messages += [*found.messages, *checkpoint.check_resume(found.state, differences, lists, KERNEL)]

        # Readers start while the model is built
        step, validated = (saved["step"], saved["validated_step"]) if saved else (0, -1)
        marker = ledger.resume_marker(step=step, clips=step * shards.global_batch, validated=validated)
        replay = ledger.given_up(exp, marker=marker) if saved else set()
        batches = stack.enter_context(train_loader(cfg, world, shards, train_records, step, replay))
        made = learner.build(cfg, world, shards, saved, messages.append)
        facts = {"config": config.to_dict(cfg), "classes": class_names, "resize": KERNEL, "lists": lists}
        current = state.TrainState(made, facts)
        if found:
            current.load(found)
        sample_at = order.of(cfg.data.order, cfg.seed, train_records)
        made.path_at = lambda position: train_records.path(sample_at(position))
        made.mirrored = transforms.mirrored_classes(cfg.data.flip_labels, class_names, world.device)

        # Nothing in lists, config or weights can be wrong any more: only now an old run is moved away.
        world.on_main(lambda: checkpoint.take_over(folder, found, fresh=fresh))
        run_log = stack.enter_context(log.RunLog(exp, world.is_main, step))
        revision = run_dir.revision() if world.is_main else ""  # one rank asks: hundreds may share the file system
        facts |= {"code": revision, "token": folder.token}
        run_log.start(exp, cfg, overrides, shards, revision=revision)
        for line in messages:
            run_log.line(line)
        monitor = Monitor(current, folder, run_log, train_records)
        made.on_phase = monitor.watch.phase
        if saved:
            world.on_main(lambda: monitor.bad.resume(marker))
        stack.callback(lambda: monitor.note(batches))  # the bad samples that stopped the run too

        stop = stack.enter_context(signals.StopFlag(signals.stop_announcement()))
        run = Run(cfg, current, folder, run_log, monitor, batches, stop, train_records, val_records)
        _introduce(run, resumed=saved is not None)
        faults.fail_point("start.built")
        monitor.watch.phase("start", step, batches.being_read)
        stack.enter_context(monitor.watch)
        # A lost rank shows as an error of DDP's or gloo's own: `contact` says what it means.
        with run_log.last_words(), dist.contact(world):
            yield run


def train_loader(
    cfg: Config, world: World, shards: ShardPlan, records: Records, step: int, replay: set[tuple[int, int]]
) -> TrainLoader:
    """Start the reader processes; they give the batches from `step` on."""
    return loader.build(cfg, "train", world, shards, start=step, records=records, replay=replay)


def _introduce(run: Run, *, resumed: bool) -> None:
    """Write what is special about a run into its log."""
    cfg, made = run.cfg, run.learner
    if not resumed:
        run.log.line(getattr(made.net, "pretrained_note", "") or "initial weights: random")
    if made.distill:
        run.log.line(f"distillation, {cfg.distill.kind}: {cfg.distill.teacher}, weight {made.distill.weight:g}")
    if made.ema:
        run.log.line(f"validation uses a moving average of the weights, decay {made.ema.decay:g}")
    rates = {name: getattr(cfg.lr_scheduler, name) for name in ("base_lr", "warmup_lr", "min_lr")}
    remark = lr_schedule.scaling_remark(made.shards.global_batch, cfg.reference_batch, **rates)
    if remark and not resumed:
        run.log.line(remark)
