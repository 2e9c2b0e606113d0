"""One training run: the parts built from a config and its resumable state.

`main.py` builds a `Run` and loops over it; here is what that loop asks of it between two steps: validate, save, stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import shlex
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from utils import bad_samples, checkpoint, config, faults, lr_schedule, pace, precise_bn, transforms, watchdog
from utils.faults import AgreedError, UserError
from utils.loss import training_loss
from utils.signals import StopFlag

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.loading.train import Batch, TrainLoader
    from utils.config import Config
    from utils.dist import World
    from utils.distill import Mutual, Teacher
    from utils.ema import Ema
    from utils.log import RunLog
    from utils.run_dir import RunDir
    from utils.shards import ShardPlan
    from utils.sync_bn import Statistics

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
            # A copy: `contiguous` leaves a 1 x 1 kernel as it is, with other strides than its gradient will have.
            parameter.data = parameter.data.clone(memory_format=formats[parameter.dim()])
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


def compiled(
    net: torch.nn.Module, wanted: bool | str, device: torch.device, say: Callable[[str], object]
) -> torch.nn.Module:
    """`torch.compile` of a model as `compile` asks for it; the model itself, and a sentence why, where it cannot be.

    Args:
        net: on its device.
        wanted: false, true, or the name of a mode of torch.compile.
        device: where it runs: a CPU needs a C++ compiler; a GPU needs triton, a C compiler and Python's headers.
        say: where the sentence goes.
    """
    if not wanted:
        return net
    missing = _missing_on_cpu() if device.type == "cpu" else _missing_for_triton()
    if missing:
        say(f"compile: the model is not compiled, {missing}")
        return net
    return torch.compile(net, mode=wanted if isinstance(wanted, str) else None)  # type: ignore[return-value]


def _missing_on_cpu() -> str | None:
    """What torch.compile needs on a CPU and does not find."""
    compiler = os.environ.get("CXX", "g++")
    program = (shlex.split(compiler) or ["g++"])[0]  # $CXX may name options too, as in `ccache g++`
    return None if shutil.which(program) else f"there is no C++ compiler ({compiler}; set $CXX)"


def _missing_for_triton() -> str | None:
    """What torch.compile needs for a GPU and does not find. Triton builds a launcher in C for each kernel."""
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    named = os.environ.get("CC")
    programs = [(shlex.split(named) or ["cc"])[0]] if named else ["gcc", "clang", "cc"]
    if not any(shutil.which(program) for program in programs):
        return f"there is no C compiler ({named or 'gcc, clang'}; set $CC)"
    headers = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(headers, "Python.h")):
        return f"Python's headers are not in {headers} (Debian: the package python3-dev)"
    return None


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
    ema: Ema | None
    distill: Teacher | Mutual | None
    revision: str  # of the code, asked once when the run starts: the files may change under it
    kernel: str  # name of the readers' resize kernel: another one means other pixels
    stack: contextlib.ExitStack  # undone when the run ends, however it ends
    step: int = 0  # finished iterations
    validated_step: int = -1  # the last step whose validation was completed
    best_prec1: float = -1.0  # per cent, of what `criterion` names; -1: never validated
    has_validated: bool = False  # this process has validated on at least one video that could be read
    window: dict[str, list[float]] = field(default_factory=dict)  # last print_freq values of the logged meters

    def __post_init__(self) -> None:
        limit = 60 * self.cfg.watchdog_minutes
        self.watch = watchdog.Watchdog(
            self.folder.exp, seconds=limit, rank=self.world.rank, ranks=self.world.size, say=self.log.event
        )
        self.pace = pace.Pace(self.world, self.shards, self.log.line, self.watch.who)

        budget = {"videos": len(self.train_records), "bad_budget": self.cfg.data.bad_budget}
        budget |= {"first_is_fatal": self.cfg.data.on_bad == "error"}
        self.bad = bad_samples.BadSamples(self.folder.exp, self.log, **budget)
        self.mirrored = transforms.mirrored_classes(self.cfg.data.flip_labels, self.class_names, self.world.device)
        self.precise: tuple[int, dict[str, torch.Tensor]] | None = None  # (step, BN statistics of its validation)

    def begin(self, state: dict[str, Any] | None) -> None:
        """Take up the plain values of a checkpoint, and say in the log what is special about this run."""
        if state:
            self.validated_step, self.best_prec1 = state["validated_step"], state["best_prec1"]
            self.window = state["window"]
            at = {"step": self.step, "validated": self.validated_step, "clips": self.step * self.shards.global_batch}
            self.world.on_main(lambda: self.bad.going_on(**at))
        else:
            self.log.line(getattr(self.net, "pretrained_note", "") or "initial weights: random")
        if self.distill:
            second = f"{self.cfg.distill.kind}: {self.cfg.distill.teacher}"
            self.log.line(f"distillation, {second}, weight {self.distill.weight:g}")
        if self.ema:
            self.log.line(f"validation uses a moving average of the weights, decay {self.ema.decay:g}")
        rates = {name: getattr(self.cfg.lr_scheduler, name) for name in ("base_lr", "warmup_lr", "min_lr")}
        remark = lr_schedule.scaling_remark(self.shards.global_batch, self.cfg.reference_batch, **rates)
        if remark and not state:
            self.log.line(remark)

    @property
    def criterion(self) -> str:
        """By what the best checkpoint is chosen."""
        return "mAP" if self.val_records.several else "Prec@1"

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
        epoch = len(self.train_records) / self.shards.global_batch
        found = {name: getattr(plain, name) for name in (*names, "warmup_type")}
        found["epoch_iters"] = epoch if plain.step_by == "epoch" else None
        found["warmup_epoch_iters"] = epoch if plain.warmup_by == "epoch" else None
        return found

    def augmentation(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of `transforms.augment` for one batch: what its plans drew, and the colour statistics."""
        wanted, dtype = self.cfg.augmentation, dtype_of(self.cfg.precision)
        return {"drawn": batch.drawn, "mean": wanted.mean, "std": wanted.std, "dtype": dtype}

    def relabelled(self, batch: Batch) -> Batch:
        """The batch as it is to be classified: a mirrored clip has the mirrored class where `data.flip_labels` says."""
        if self.mirrored is None:
            return batch
        return dataclasses.replace(batch, labels=transforms.mirrored_labels(batch.labels, batch.flip, self.mirrored))

    def loss(self, answer: Any, clips: torch.Tensor, batch: Batch, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, logits (B, K)) of what `model` answered to the clips, which were mixed with weight `lam`."""
        targets = {"kind": self.cfg.loss, "label_smooth": self.cfg.label_smooth, "weights": batch.weights, "lam": lam}
        if self.distill is None:
            return training_loss(answer, batch.labels, **targets)
        return self.distill.loss(answer, clips, batch.labels, **targets)

    def after_step(self, step: int) -> None:
        """What follows the optimiser step: running statistics and the average of the weights. Collective."""
        self.statistics.after_step()
        if self.ema:
            self.statistics.for_evaluation()  # group 0's, where groups have their own
            self.ema.update(self.net, step)

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
        self.folder.look()
        self.validated_step = self.step
        self.log.validation(self.step, result)
        reached = result.get("mean_average_precision", result["top1"])
        if reached > self.best_prec1:
            self.best_prec1 = reached
            self.save(checkpoint.BEST)
        return False

    @contextlib.contextmanager
    def evaluated(self, batches: Callable[..., TrainLoader], stop: StopFlag) -> Iterator[torch.nn.Module | None]:
        """The network to validate with, as it is to be while it is used: averaged weights, precise batch norm.

        Args:
            batches: `datasets.build` of the training clips; takes first and last step.

        Returns:
            The network; None when a signal stopped the precise batch norm.
        """
        net = self.ema.net if self.ema else self.net
        wanted, every = self.cfg.precise_bn.batches, self.cfg.precise_bn.every_iters or 1
        if not wanted or (self.step % every and self.step != self.last):
            yield net
            return
        began = time.monotonic()
        with (
            batches(start=self.step, stop=self.step + wanted) as loader,
            self.watch.during("precise batch norm", None, loader.being_read),
        ):
            values = precise_bn.averages(net, self._forwards(loader, stop), self.world)
        if values is None:
            yield None
            return
        self.precise = self.step, values
        self.log.line(f"batch-norm statistics averaged over {wanted} batches ({time.monotonic() - began:.1f} s)")
        with precise_bn.applied(net, values):
            yield net

    def _forwards(self, loader: TrainLoader, stop: StopFlag) -> Iterator[Callable[[torch.nn.Module], object] | None]:
        """A function for each micro-batch that puts it through a network, augmented but not mixed; None: stop."""
        for _, micro_batches in loader:
            self.bad.note(loader.ledger.take_events(), self.step, bad_samples.PRECISE_BN)
            stop.ask(loader.trouble)
            if self.world.any(stop.received):
                yield None
                return
            for batch in micro_batches:
                clips = transforms.augment(batch.clips, **self.augmentation(batch))  # (B, C, T, H, W)

                def forward(net: torch.nn.Module, clips: torch.Tensor = clips) -> object:
                    with autocast(self.cfg.precision, self.world.device):
                        return net(clips)

                yield forward
            self.watch.progress()

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
            "resize": self.kernel,
            "lists": {"train": self.train_records.list_hash, "val": self.val_records.list_hash},
            "code": self.revision,
            "token": self.folder.token,
            "versions": checkpoint.versions(),
        }
        if self.ema:
            state["ema"] = self.ema.net.state_dict()
        if self.precise and self.precise[0] == self.step:
            state["precise_bn"] = self.precise[1]
        if self.distill:
            state |= self.distill.state()

        def write() -> None:
            with self.folder.saving(name) as check:
                keep_as = self.folder.token if self.folder.has_predecessor else None
                checkpoint.save(self.folder.exp, name, state, check=check, keep_as=keep_as)

        self.world.on_main(write)
        self.log.flush()

    def end_epoch(self, *, final: bool = False) -> None:
        """Sum up the bad samples if an epoch ends with this step, or the run. Collective."""
        clips, videos = self.step * self.shards.global_batch, len(self.train_records)
        epoch = clips // videos
        if final:
            epoch = -(-clips // videos)
        elif self.step == self.last or epoch == (clips - self.shards.global_batch) // videos:
            return
        self.world.barrier()  # the journals of all ranks are complete up to this step
        self.world.on_main(lambda: self.bad.sum_up(self.step, epoch, enforce=not final))

    def stopped(self, stop: StopFlag) -> int:
        """The last line of a run that was asked to stop, and its exit code."""
        why = stop.name or "another rank"  # which has had a signal or a trouble, and reports the latter itself
        self.log.line(f"stopped by {why} at iteration {self.step}, saved; the same command continues")
        if stop.trouble and not self.world.is_main:
            self.log.event(f"rank {self.world.rank} stopped the run: {stop.trouble}")
            faults.tell(UserError(f"stopped by {stop.trouble}; everything is saved"))
        return STOPPED

    def non_finite(
        self, step: int, losses: dict[tuple[int, ...], float], sample_at: Callable[[int], int]
    ) -> AgreedError:
        """The error that every rank raises together; it names the videos of the shards whose loss is not a number.

        Args:
            losses: mean loss of each of this rank's micro-batches, by its shards.
            sample_at: position -> sample, of datasets.plan.order.
        """
        bad = torch.zeros(self.shards.total, dtype=torch.float64, device=self.world.device)
        for shards, value in losses.items():
            bad[list(shards)] = float(not math.isfinite(value))
        self.world.sum_(bad)
        positions = [p for shard in bad.nonzero().flatten().tolist() for p in self.shards.positions(step, shard)]
        samples = [sample_at(position) for position in positions]
        names = ", ".join(self.train_records.path(sample) for sample in samples[:16])
        return AgreedError(
            f"the loss of iteration {step + 1} is not finite; all ranks stopped before the optimiser step and the last "
            f"checkpoint is as it was. Videos in the batch: {names}{', ...' if len(samples) > 16 else ''}. "
            "Lower the learning rate, set common.clip_grad, or look at these videos"
        )
