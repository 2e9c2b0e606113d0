"""One training run: the parts built from a config and its resumable state.

`main.py` builds a `Run` and loops over it; here is what that loop asks of it between two steps: validate, save, stop.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from utils import checkpoint, config, log, pace, run_dir, watchdog
from utils.faults import AgreedError
from utils.signals import StopFlag

if TYPE_CHECKING:
    from datasets.bad_media import BadEvent
    from datasets.records import Records
    from datasets.train_loader import Batch, TrainLoader
    from utils.config import Config
    from utils.dist import World
    from utils.log import RunLog
    from utils.run_dir import RunDir
    from utils.shards import ShardPlan
    from utils.sync_bn import Statistics

JOURNAL = "jobs/bad_samples.jsonl"
STOPPED = 75  # exit code of a run that a signal stopped: its state is saved, the same command continues it


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of weights and clips; bf16 and fp16 train float32 weights under autocast."""
    return torch.float64 if precision == "fp64" else torch.float32


def place(net: torch.nn.Module, device: torch.device, precision: str) -> torch.nn.Module:
    """Move a model to its device and dtype, weights in channels_last(_3d), the layout in which clips arrive."""
    net = net.to(device, dtype_of(precision))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in net.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])
    return net


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The mixed-precision region that `precision` asks for; nothing for fp32 and fp64."""
    if precision in ("fp32", "fp64"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def model_arguments(cfg: Config, *, pretrained: bool | str) -> dict[str, Any]:
    """Keyword arguments of `methods.build` for a config; `bn_*` options belong to utils/sync_bn.py."""
    model = cfg.model
    return {
        "type": model.type,
        "backbone": model.backbone,
        "num_class": model.num_class,
        "num_segments": model.num_segments * cfg.data.clip_len,  # T, the frames that enter the network
        "dropout": model.dropout,
        "pretrained": pretrained,
        **{key: value for key, value in model.kwargs.items() if not key.startswith("bn_")},
    }


@dataclass
class Run:
    """One training run: what was built from the config, and the few values that change while it trains.

    The resumable state is the model, the optimiser, the BN group statistics and the plain fields at the end. Order,
    augmentation, dropout and mixup are functions of (seed, step), so one integer stands for them all.
    """

    cfg: Config
    world: World
    shards: ShardPlan
    folder: RunDir
    log: RunLog
    train_records: Records
    val_records: Records
    class_names: list[str]
    net: torch.nn.Module  # the model itself
    model: Any  # the same as training calls it: compiled and wrapped for DDP where asked
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    statistics: Statistics
    stack: contextlib.ExitStack  # undone when the run ends, however it ends
    step: int = 0  # finished iterations
    validated_step: int = -1  # the last step whose validation was completed
    best_prec1: float = -1.0  # per cent; -1: never validated
    window: dict[str, list[float]] = field(default_factory=dict)  # last print_freq values of the logged meters

    def __post_init__(self) -> None:
        limit = 60 * self.cfg.watchdog_minutes
        self.watch = watchdog.Watchdog(
            self.folder.exp, seconds=limit, rank=self.world.rank, ranks=self.world.size, say=self.log.event
        )
        self.pace = pace.Pace(self.world, self.shards, self.log.line, self.watch.who)

    def watch_over(self, loader: TrainLoader) -> None:
        """Wake the watchdog, until the run ends."""
        self.watch.phase("start", self.step, loader.being_read)
        self.stack.enter_context(self.watch)

    def names(self, micro_batches: list[Batch]) -> list[str]:
        """The clips of this rank's share of a global batch, for the watchdog."""
        samples = [sample for batch in micro_batches for sample in batch.samples]
        return [f"sample {sample}: {self.train_records.path(sample)}" for sample in samples]

    def schedule(self) -> dict[str, Any]:
        """Keyword arguments of `lr_schedule.lr_at`."""
        plain = self.cfg.lr_scheduler
        names = ("type", "base_lr", "warmup_steps", "warmup_lr", "min_lr", "max_iter", "lr_steps", "lr_mults")
        return {name: getattr(plain, name) for name in names}

    def augmentation(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of `transforms.augment` for one batch: what its plans drew, and the colour statistics."""
        wanted = self.cfg.augmentation
        drawn = {"flip": batch.flip, "jitter": batch.jitter, "erase": batch.erase}
        return drawn | {"mean": wanted.mean, "std": wanted.std, "dtype": dtype_of(self.cfg.precision)}

    @property
    def last(self) -> int:
        """The last iteration of the run."""
        assert self.cfg.lr_scheduler.max_iter is not None, "lengths were resolved at the start"
        return self.cfg.lr_scheduler.max_iter

    def is_at_validation(self) -> bool:
        """True when the run validates after the iteration that is finished now."""
        assert self.cfg.val_freq is not None, "lengths were resolved at the start"
        return self.step % self.cfg.val_freq == 0 or self.step == self.last

    def owes_validation(self) -> bool:
        """True when this step was saved, but the process ended before its validation did."""
        return self.step > 0 and self.is_at_validation() and self.validated_step < self.step

    def validate(self, score: Callable[[StopFlag], dict[str, float] | None], stop: StopFlag) -> bool:
        """Validate with `score`, log the numbers, keep the checkpoint if it is the best so far.

        Returns:
            True when a signal asked to stop meanwhile; the validation is then owed.
        """
        self.statistics.for_evaluation()
        result = score(stop)
        if result is None:
            return True
        self.validated_step = self.step
        self.log.validation(self.step, result)
        if result["top1"] > self.best_prec1:
            self.best_prec1 = result["top1"]
            self.save(checkpoint.BEST)
        return False

    def save(self, name: str) -> None:
        """Write a checkpoint. Every rank must call this: group statistics are gathered, then rank 0 writes."""
        with self.watch.during(f"writing {name}"):
            self._save(name)

    def _save(self, name: str) -> None:
        self.statistics.for_evaluation()
        state = {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "group_statistics": self.statistics.group_state(),
            **{name: getattr(self, name) for name in ("step", "validated_step", "best_prec1", "window")},
            "seed": self.cfg.seed,
            "shards": self.shards.total,
            "global_batch": self.shards.global_batch,
            "config": config.to_dict(self.cfg),
            "classes": self.class_names,
            "lists": {"train": self.train_records.list_hash, "val": self.val_records.list_hash},
            "code": run_dir.revision(),
            "versions": checkpoint.versions(),
        }
        self.world.on_main(lambda: checkpoint.save(self.folder.exp, name, state))
        self.log.flush()

    def note_bad(self, event: BadEvent) -> None:
        """Journal one sample that could not be read, and log it when it is met for the first time. Any rank may."""
        row = {"step": self.step, "position": event.position, "sample": event.sample, "late": event.timeout}
        self.log.journal(JOURNAL, row | {"path": event.path, "reason": event.reason})
        if event.new:
            self.log.event(str(event))

    def bad_samples(self) -> list[dict[str, Any]]:
        """The journal of samples that could not be read, of all ranks and all processes of this run."""
        return log.read_journal(self.folder.path(JOURNAL))

    def late_samples(self) -> set[tuple[int, int]]:
        """(position, sample) of what was given up as too slow: it must fail again when its step is run again."""
        return {(row["position"], row["sample"]) for row in self.bad_samples() if row["late"]}

    def log_bad_samples(self) -> None:
        """One line for the log: how many samples could not be read, and where they are named."""
        names = {row["path"] for row in self.bad_samples()}
        if names:
            self.log.line(f"{len(names)} videos could not be read; each is named with its reason in {JOURNAL}")

    def stopped(self, stop: StopFlag) -> int:
        """The last line of a run that was asked to stop, and its exit code."""
        why = stop.name or "another rank's signal"
        self.log.line(f"stopped by {why} at iteration {self.step}, saved; the same command continues")
        return STOPPED

    def non_finite(
        self, step: int, losses: dict[tuple[int, ...], float], sample_at: Callable[[int, int, int], int]
    ) -> AgreedError:
        """The error that every rank raises together; it names the videos of the shards whose loss is not a number.

        Args:
            losses: mean loss of each of this rank's micro-batches, by its shards.
            sample_at: datasets.order.sample_at.
        """
        bad = torch.zeros(self.shards.total, dtype=torch.float64, device=self.world.device)
        for shards, value in losses.items():
            bad[list(shards)] = float(not math.isfinite(value))
        self.world.sum_(bad)
        positions = [p for shard in bad.nonzero().flatten().tolist() for p in self.shards.positions(step, shard)]
        samples = [sample_at(position, self.cfg.seed, len(self.train_records)) for position in positions]
        names = ", ".join(self.train_records.path(sample) for sample in samples[:16])
        return AgreedError(
            f"the loss of iteration {step + 1} is not finite; all ranks stopped before the optimiser step and the last "
            f"checkpoint is as it was. Videos in the batch: {names}{', ...' if len(samples) > 16 else ''}. "
            "Lower the learning rate, set common.clip_grad, or look at these videos"
        )
