"""One training run as `main.train` sees it: its batches, its checkpoints, its validations, its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from datasets.loading import eval as eval_loader
from datasets.loading import loader
from utils import checkpoint, errors, ledger, lr_schedule, optim
from utils.engine import precise_bn, probes
from utils.engine.evaluate import evaluate, of_config
from utils.errors import UserError
from utils.log import ANY_RANK

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.loading.train import Batch, TrainLoader
    from utils.config import Config
    from utils.dist import World
    from utils.engine.learner import Learner
    from utils.engine.monitor import Monitor
    from utils.engine.state import TrainState
    from utils.log import RunLog
    from utils.run_dir import RunDir
    from utils.signals import StopFlag

STOPPED = 75  # exit code after a request to stop: the state is saved, and the same command resumes the run


@dataclass
class TrainingRun:
    """One training run; `setup.start` builds it.

    Attributes:
        cfg: the experiment.
        state: the content of a checkpoint: the learner and the counters.
        folder: the experiment folder, locked.
        log: log.txt and the curves.
        monitor: the watchdog, the meters and the journal of bad samples.
        batches: the loader of the training clips.
        stop: set by a signal, or by readers that do not start.
        train_records, val_records: the lists.
    """

    cfg: Config
    state: TrainState
    folder: RunDir
    log: RunLog
    monitor: Monitor
    batches: TrainLoader
    stop: StopFlag
    train_records: Records
    val_records: Records
    _saved_at: float = field(default_factory=time.monotonic)
    _has_validated: bool = False  # this process, on at least one video that could be read

    @property
    def learner(self) -> Learner:
        """The parts of the training step."""
        return self.state.learner

    @property
    def world(self) -> World:
        """The ranks."""
        return self.learner.world

    @property
    def last(self) -> int:
        """The last iteration of the run."""
        assert self.cfg.lr_scheduler.max_iter is not None, "lengths were resolved at the start"
        return self.cfg.lr_scheduler.max_iter

    @property
    def is_finished(self) -> bool:
        """True when the last iteration has been validated."""
        return self.state.validated_step == self.last

    # ---------------------------------------------------------------- between two steps

    def steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """Yield (step, this rank's micro-batches) from the first step that is not done, and set its learning rate."""
        watch = self.monitor.watch
        for step, micro_batches in watch.steps(iter(self.batches), self.batches.being_read, self.monitor.names):
            optim.set_lr(self.learner.optimizer, self.lr_at(step))
            yield step, micro_batches

    def lr_at(self, step: int) -> float:
        """Return the learning rate of an iteration."""
        schedule, clips = self.cfg.lr_scheduler, len(self.train_records) * self.cfg.data.num_sample
        # Steps in an epoch: not a whole number in general
        epoch = clips / self.learner.shards.global_batch
        begin = schedule.cosine_begin_epoch

        names = ("type", "base_lr", "warmup_steps", "warmup_lr", "min_lr", "lr_steps", "lr_mults", "warmup_type")
        return lr_schedule.lr_at(
            step,
            **{name: getattr(schedule, name) for name in names},
            max_iter=self.last,
            epoch_iters=epoch if schedule.step_by == "epoch" else None,
            warmup_epoch_iters=epoch if schedule.warmup_by == "epoch" else None,
            begin=None if begin is None else round(begin * epoch),
        )

    def requests(self) -> dict[str, bool]:
        """Return this rank's requests to the next step: to stop after it, to save after it."""
        self.stop.ask(self.batches.service.trouble)
        minutes = (time.monotonic() - self._saved_at) / 60
        # Rank 0 alone writes, so its clock decides when a save is due
        return {"stop": self.stop.received, "save": self.world.is_main and minutes > self.cfg.save_minutes}

    def after_step(self, step: int, numbers: dict[str, float]) -> None:
        """Count a step as finished, and write its progress line if one is due. Collective."""
        self.state.step = step + 1
        self.monitor.after_step(numbers, self.lr_at(step), self.batches, self.last)

    def save(self, name: str = checkpoint.LATEST) -> None:
        """Write a checkpoint. Collective: the group statistics are gathered, then rank 0 writes."""
        with self.monitor.watch.during(f"writing {name}"):
            # A gather over all ranks: it comes before the part that only rank 0 runs
            self.learner.bn_stats.for_evaluation()
            values = self.state.values()

            def write() -> None:
                with self.folder.saving(name) as check:
                    # An earlier start may wake up and replace files: a second name is safe from it
                    keep_as = self.folder.token if self.folder.has_predecessor else None
                    checkpoint.save(self.folder.exp, name, values, check=check, keep_as=keep_as)

            self.world.on_main(write)
            self.log.flush()

        if name == checkpoint.LATEST:
            self._saved_at = time.monotonic()

    # ---------------------------------------------------------------- validation

    @property
    def is_at_validation(self) -> bool:
        """True when the run validates after the iteration that has just finished."""
        assert self.cfg.val_freq is not None, "lengths were resolved at the start"
        return self.state.step % self.cfg.val_freq == 0 or self.state.step == self.last

    @property
    def owes_validation(self) -> bool:
        """True when this step was saved, but the process ended before its validation did."""
        return self.state.step > 0 and self.is_at_validation and self.state.validated_step < self.state.step

    def validate(self) -> bool:
        """Validate, write the numbers, keep the checkpoint if it is the best so far. Collective.

        Returns:
            False when a request to stop ended the validation; the resumed run then repeats it.
        """
        self.learner.bn_stats.for_evaluation()
        result = self._scores()
        if result is None:
            return False

        # Minutes have passed: make sure that the folder is still ours before writing
        self.folder.look()
        self.state.validated_step = self.state.step
        self.log.validation(self.state.step, result)

        reached = probes.criterion(result)
        if reached > self.state.best_metric:
            self.state.best_metric = reached
            self.save(checkpoint.BEST)

        self.batches.traffic.write_total(self.log, self.world)
        self.monitor.restart_clock()
        return True

    def _scores(self) -> dict[str, float] | None:
        """Score the validation list with the views of the config; None if stopped."""
        watch = self.monitor.watch

        with precise_bn.network(self) as net:
            if net is None:
                return None
            with (
                loader.val(self.cfg, self.world, records=self.val_records) as videos,
                watch.during("validation", None, videos.being_read),
            ):
                # One pass scores all heads of a probe
                heads = probes.count(net)
                with probes.all_heads(net):
                    results = evaluate(
                        net,
                        videos,
                        heads=heads,
                        **of_config(self.cfg, self.world),
                        clips_per_forward=self.cfg.batch_size,
                        keep=watch.passing(),
                        stop=self.stop,
                    )

                # The best head gives the result, and answers from here on
                result = results[probes.best_of(results)] if results else None
                if results and heads:
                    probes.choose(results, net, self.learner.net)
                    probes.write(results, net, self.log, self.state.step)

                # The first validation only: nothing readable means a wrong root or reader, not some bad files
                if result is not None and not self._has_validated:
                    if eval_loader.read_nothing(result):
                        raise eval_loader.none_readable(videos)
                    self._has_validated = True

                self.monitor.note(videos, ledger.VALIDATION)
                for text in videos.notes():
                    self.log.remark("data", text, "INFO", ANY_RANK, once=True, during=ledger.VALIDATION)
                videos.traffic.write(self.log)
        return result

    # ---------------------------------------------------------------- the end

    def stopped(self) -> int:
        """Write the last log line of a run that was asked to stop; return its exit code."""
        # Another rank received the signal or had the trouble; it reports its trouble itself, below
        why = self.stop.name or "another rank"
        about = {"iteration": self.state.step, "by": why, "message": "saved; run the same command to resume"}
        self.log.event("run", "stopped", **about)

        # Rank 0 has written the line above; only the rank in trouble can report the trouble
        if self.stop.trouble and not self.world.is_main:
            why = {"rank": self.world.rank, "message": self.stop.trouble}
            self.log.event("run", "trouble", "ERROR", ANY_RANK, **why)
            errors.report_error(UserError(f"stopped by {self.stop.trouble}; everything is saved"))
        return STOPPED

    def finish(self) -> int:
        """Sum up, save once more (the last validation is part of the state), and return 0. Collective."""
        self.monitor.end_epoch(final=True)
        self.monitor.write_notes(self.batches)
        self.save()

        criterion = "mAP" if self.val_records.multi_label else "top-1"
        best, path = round(self.state.best_metric, 3), self.folder.path(checkpoint.LATEST)
        self.log.event("run", "finished", iteration=self.last, metric=criterion, best=best, checkpoint=path)
        return 0
