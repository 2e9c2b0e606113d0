"""Set up a training run: config -> ranks -> folder and lock -> lists -> readers -> model -> checkpoint -> log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from datasets.lists import first_look
from datasets.lists.class_names import read_class_names
from datasets.loading import loader
from datasets.plan import order
from datasets.readers.resize import KERNEL
from methods.interop import provenance
from utils import allocator, checkpoint, config, dist, errors, ledger, log, lr_schedule, run_dir, signals, transforms
from utils.engine import learner, state
from utils.engine.monitor import Monitor
from utils.engine.run import TrainingRun
from utils.errors import UserError
from utils.shards import ShardPlan

if TYPE_CHECKING:
    from torch.nn import Module

    from datasets.lists.records import Records
    from methods.interop.provenance import Start
    from utils.config import Config


@contextlib.contextmanager
def start(exp: Path, *, overrides: Sequence[str] = (), fresh: bool = False) -> Iterator[TrainingRun]:
    """Set up a run, from its checkpoint if there is one, and close everything on leaving. Collective.

    Args:
        exp: experiment folder.
        overrides: `key=value` texts that replace config values.
        fresh: move the files of an earlier run to `old/<time>/`.

    Raises:
        UserError: config, lists, weights or folder do not allow the run. In that case nothing has been changed.
    """
    allocator.use_huge_pages()

    # Cheap checks first, before any rank waits for another
    cfg = config.load(exp, overrides)
    if cfg.data.folds:
        raise UserError(f"{exp}: data.folds is set; start {exp / 'train.sh'} PARTITION N, which trains each fold")
    config.check_files(cfg)

    with contextlib.ExitStack() as stack:
        # Ranks, folder, checkpoint. `push`, not `callback`: `dist.leave` must see the error that ends the run
        world = dist.join()
        stack.push(dist.leave)
        if world.device.type == "cpu":
            allocator.keep_freed_memory()
        errors.fail_point("start.joined")

        folder = run_dir.RunDir(exp)
        world.on_main(folder.lock)
        stack.callback(folder.close)

        resume_from = None if fresh else checkpoint.find_on_all_ranks(exp, world, state.check)
        saved = resume_from.state if resume_from else None

        # Lists, and the lengths and remarks that follow from them
        train_records, val_records = (loader.records_of(cfg, split) for split in ("train", "val"))
        class_names = read_class_names(config.class_names_file(cfg), cfg.model.num_class)

        # A resume keeps the shards of the first start, whatever the number of ranks
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
        if resume_from:
            differences = config.differences(resume_from.state["config"], config.to_dict(cfg))
            messages += [*resume_from.messages, *checkpoint.check_resume(resume_from.state, differences, lists, KERNEL)]

        # Readers start while the model is built. A clip that was given up in a step that is now repeated fails again,
        # so that the step sees the same batch
        step, validated = (saved["step"], saved["validated_step"]) if saved else (0, -1)
        marker = ledger.resume_marker(step=step, clips=step * shards.global_batch, validated=validated)
        replay = ledger.given_up(exp, marker=marker) if saved else set()
        batches = stack.enter_context(
            loader.train(cfg, world, shards, start=step, records=train_records, replay=replay)
        )

        # Model and optimiser, filled from the checkpoint
        run_learner = learner.build(cfg, world, shards, saved, messages.append)
        metadata = {"config": config.to_dict(cfg), "classes": class_names, "resize": KERNEL, "lists": lists}
        metadata["initial"], remarks = _initial(cfg, run_learner.net, saved, class_names, val_records)
        messages += remarks
        current = state.TrainState(run_learner, metadata)
        if resume_from:
            current.load(resume_from)

        # Messages name clips by path; the learner knows only their positions
        turn_at = order.Order(
            cfg.data.order, cfg.seed, train_records, batch_size=cfg.batch_size, num_sample=cfg.data.num_sample
        )
        run_learner.path_at = lambda position: train_records.path(turn_at(position).sample)
        run_learner.mirrored = transforms.mirrored_classes(cfg.data.flip_labels, class_names, world.device)

        # Lists, config and weights have been checked: only now move the files of an old run
        world.on_main(lambda: checkpoint.take_over(folder, resume_from, fresh=fresh))
        run_log = stack.enter_context(log.RunLog(exp, world.is_main, step))

        # The log
        revision = run_dir.revision() if world.is_main else ""  # rank 0 alone: hundreds may share the file system
        metadata |= {"code": revision, "token": folder.token}
        run_log.start(exp, cfg, overrides, shards, revision=revision)
        for line in messages:
            run_log.remark("start", line)

        # The monitor; on leaving it also notes the bad samples that stopped the run
        monitor = Monitor(current, folder, run_log, train_records)
        run_learner.on_phase = monitor.watch.phase
        if saved:
            world.on_main(lambda: monitor.bad.resume(marker))
        stack.callback(lambda: monitor.note(batches))

        # From here on a signal asks the run to stop after its step
        stop = stack.enter_context(signals.StopFlag(signals.stop_announcement()))
        run = TrainingRun(cfg, current, folder, run_log, monitor, batches, stop, train_records, val_records)
        _introduce(run, resumed=saved is not None)
        errors.fail_point("start.built")

        # Name the phase before the watchdog starts: it reports the phase if nothing follows
        monitor.watch.phase("start", step, batches.being_read)
        stack.enter_context(monitor.watch)

        # DDP and gloo report a lost rank with errors of their own; `contact` translates them
        with run_log.last_words(), dist.contact(world):
            yield run


def _initial(
    cfg: Config, net: Module, saved: dict[str, object] | None, class_names: list[str], val_records: Records
) -> tuple[dict[str, str], list[str]]:
    """Return what is known about the initial weights of a run, and remarks on them for the log.

    Raises:
        UserError: their classifier has the classes of the lists in a different order.
    """
    start: Start | None = getattr(net, "pretrained", None)
    if saved or start is None:
        return provenance.earlier_of(saved), []

    # The classes must agree; a network that has seen the validation videos gets a remark
    remarks = provenance.check_start(start, class_names, cfg.augmentation.input_size)
    remarks.append(provenance.seen_line(start.initial, f"{cfg.val_source} {cfg.val_root}"))
    remarks.append(provenance.list_line(start.lists, val_records.list_hash, f"the initial weights {start.path}"))
    return start.initial, [line for line in remarks if line]


def device_name(device: torch.device) -> str:
    """Return the name of a device, such as `cpu` or `cuda (NVIDIA A100-SXM4-80GB)`."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _introduce(run: TrainingRun, *, resumed: bool) -> None:
    """Write the metadata of a run into its log."""
    cfg, run_learner = run.cfg, run.learner
    # Counted here: methods.macs imports triton on a CUDA build
    parameters = sum(parameter.numel() for parameter in run_learner.net.parameters())
    run.log.event(
        "run",
        "setup",
        device=device_name(run_learner.world.device),
        threads=torch.get_num_threads(),
        videos=len(run.train_records),
        val_videos=len(run.val_records),
        classes=cfg.model.num_class,
        parameters=parameters,
        iterations=run.last,
        iterations_per_epoch=len(run.train_records) * cfg.data.num_sample / run_learner.shards.global_batch,
    )

    # The source of the weights, and options that change the training
    if not resumed:
        run.log.remark("weights", getattr(run_learner.net, "pretrained_note", "") or "initial weights: random")
    if run_learner.distill:
        about = {"kind": cfg.distill.kind, "teacher": cfg.distill.teacher, "weight": run_learner.distill.weight}
        run.log.event("distill", "start", **about)
    if run_learner.ema:
        text = "validation uses a moving average of the weights"
        run.log.event("ema", "start", decay=run_learner.ema.decay, message=text)

    # Learning rates that do not fit the global batch
    rates = {name: getattr(cfg.lr_scheduler, name) for name in ("base_lr", "warmup_lr", "min_lr")}
    remark = lr_schedule.scaling_remark(run_learner.shards.global_batch, cfg.reference_batch, **rates)
    if remark and not resumed:
        run.log.remark("lr", remark)
    if cfg.optimizer.type == "adamw" and not resumed:
        videos = run_learner.shards.global_batch // cfg.data.num_sample
        run.log.remark("lr", lr_schedule.rate_per_256(videos, rates["warmup_lr"] or rates["base_lr"]))
