"""Observe a training run: phases, slow ranks, bad samples, the progress line."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from utils import ledger, watchdog
from utils.log import ANY_RANK, Meter

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.loading.eval import EvalLoader
    from datasets.loading.train import Batch, TrainLoader
    from utils.engine.learner import Learner
    from utils.engine.state import TrainState
    from utils.log import RunLog
    from utils.run_dir import RunDir

# A loss is a spike if it exceeds the mean of those before it by this many deviations, and by this factor.
SPIKE, LOSSES = (6.0, 1.5), (20, 50)  # LOSSES: least and largest number of losses before it
OF_A_STEP = ("loss", "top1", "top5")  # the meters that a resume restores
SHARED = {*OF_A_STEP, "non_finite", "stop", "save"}  # numbers of every step; all others belong to individual heads


class Monitor:
    """Observes a run, and writes what it finds to the log and to `jobs/`.

    Args:
        state: of the run; this class keeps its window of meters up to date.
        folder: the experiment folder.
        log: receives the lines and curves.
        records: the training list.

    Attributes:
        watch: the watchdog; it only records phases until the run enters it.
        bad: the journal of bad samples.
    """

    def __init__(self, state: TrainState, folder: RunDir, log: RunLog, records: Records) -> None:
        cfg, world = state.learner.cfg, state.learner.world
        self.state, self.folder, self.log, self.records = state, folder, log, records

        # The watchdog, and the journal of bad samples
        self.watch = watchdog.Watchdog(
            folder.exp,
            seconds=60 * cfg.watchdog_minutes,
            rank=world.rank,
            ranks=world.size,
            say=lambda text: log.event("watchdog", "hang", "ERROR", ANY_RANK, message=text),
        )
        self.bad = ledger.BadSamples(
            folder.exp,
            log,
            videos=len(records),
            num_sample=cfg.data.num_sample,
            bad_budget=cfg.data.bad_budget,
            first_is_fatal=cfg.data.on_bad == "error",
        )

        # Meters begin with the values that a checkpoint kept
        self._meters = {name: Meter(cfg.print_freq, state.window.get(name, ())) for name in OF_A_STEP}
        self._meters |= {name: Meter(cfg.print_freq) for name in ("time", "data")}
        self._of_heads: dict[str, Meter] = {}  # curves

        self._clock, self._waited = time.monotonic(), 0.0
        self._losses = deque(state.window.get("loss", ()), LOSSES[1])
        self._scale, self._reported = state.learner.scaler.get_scale(), state.step

    @property
    def learner(self) -> Learner:
        """The parts of the training step."""
        return self.state.learner

    def restart_clock(self) -> None:
        """Restart the clock, so that the time of the next step excludes a validation or the start before it."""
        self._clock = time.monotonic()

    def after_step(self, numbers: dict[str, float], lr: float, loader: TrainLoader, last: int) -> None:
        """Add the numbers of a step; every `print_freq` steps write the progress line. Collective.

        Args:
            numbers: of `main.train_step`.
            lr: the learning rate of the step.
            loader: the loader that read the clips.
            last: iterations of the run.
        """
        now = time.monotonic()
        self._meters["time"].add(now - self._clock)
        self._meters["data"].add(loader.seconds_waiting - self._waited)
        self._clock, self._waited = now, loader.seconds_waiting

        # Meters, and the window of them that the next checkpoint keeps
        self._look_for_spike(numbers["loss"])
        for name in OF_A_STEP:
            if not math.isnan(numbers[name]):  # an accuracy is nan if no clip of the step could be read
                self._meters[name].add(numbers[name])
        for name in numbers.keys() - SHARED:  # a probe with several heads
            window = Meter(self.learner.cfg.print_freq, self.state.window.get(name, ()))
            self._of_heads.setdefault(name, window).add(numbers[name])
        meters = self._meters | self._of_heads
        self.state.window = {name: meter.state() for name, meter in meters.items()}

        # Bad samples of this step, and their summary if it ends an epoch
        self.note(loader)
        self.end_epoch(is_last=self.state.step == last)

        if self.learner.is_due(self.state.step):
            self._report(lr, loader, last)

    def _look_for_spike(self, loss: float) -> None:
        """Log a loss far above the losses before it."""
        before = self._losses
        if len(before) >= LOSSES[0]:
            mean, deviations = statistics.fmean(before), SPIKE[0] * statistics.pstdev(before)
            if loss > max(mean + deviations, SPIKE[1] * mean):
                about = {"iteration": self.state.step, "loss": loss, "mean": mean, "losses": len(before)}
                self.log.event("loss", "spike", "WARNING", **about)
        before.append(loss)

    def _report(self, lr: float, loader: TrainLoader, last: int) -> None:
        # Another process may have taken the folder while this one was suspended
        self.folder.look()
        step, meters, learner = self.state.step, self._meters, self.learner

        # Iteration 1 has a progress line, but no full window over which to compare the ranks
        is_window = step % learner.cfg.print_freq == 0
        lines, more = [], {}
        if is_window:
            figures = self._figures()
            # One all-reduce compares the ranks and carries the figures, so a progress line waits for the GPU once
            lines, read = learner.stragglers.report(
                data=meters["data"].average, step=meters["time"].average, figures=list(figures.values())
            )
            more = dict(zip(figures, read, strict=True))

        self.log.training(step, last, meters, lr=lr, clips=learner.shards.global_batch, more=more)
        if self._of_heads:
            self.log.scalars(step, {name: self._of_heads[name].average for name in sorted(self._of_heads)})

        if not is_window:
            return

        # Remarks on this window: skipped steps, slow ranks, the readers' traffic
        self._look_for_skipped_steps(more)
        for rank, text in lines:
            self.log.remark("speed", text, "WARNING", slowest=None if rank is None else self.watch.who(rank))
        loader.traffic.write(self.log, step)
        self.write_notes(loader)

    def _figures(self) -> dict[str, torch.Tensor]:
        """Return curves of the optimiser, on the device: the gradient norm, and the loss scale of fp16."""
        learner, figures = self.learner, {}
        if learner.grad_norm is not None:
            figures["grad_norm"] = learner.grad_norm
        if learner.scaler.is_enabled():
            # `get_scale` would wait for the GPU; a scaled 1 stays on it
            figures["loss_scale"] = learner.scaler.scale(torch.ones((), device=learner.world.device))
        return figures

    def _look_for_skipped_steps(self, figures: Mapping[str, float]) -> None:
        """Log the fp16 steps that were skipped: each halves the loss scale."""
        if "loss_scale" not in figures:
            return

        scale = figures["loss_scale"]
        if scale < self._scale:
            skipped = round(math.log2(self._scale / scale)) if scale else 1
            # Their gradients overflowed
            self.log.event("fp16", "skipped", "WARNING", steps=skipped, after=self._reported, loss_scale=scale)
        self._scale, self._reported = scale, self.state.step

    def note(self, loader: TrainLoader | EvalLoader, during: str = ledger.TRAINING) -> None:
        """Journal the bad samples that a loader has met since the last call."""
        self.bad.note(loader.ledger.take_events(), self.state.step, during)

    def write_notes(self, loader: TrainLoader) -> None:
        """Write the loader's other notes to the log."""
        for text in loader.notes():
            self.log.remark("data", text, "INFO", ANY_RANK)

    def end_epoch(self, *, is_last: bool = False, final: bool = False) -> None:
        """Sum up the bad samples if this step ends an epoch or the run. Collective.

        Args:
            is_last: this is the last step: the call with `final` follows after its validation.
            final: the run ends here.
        """
        batch, length = self.learner.shards.global_batch, self.bad.videos * self.learner.cfg.data.num_sample
        clips = self.state.step * batch
        epoch = clips // length

        # The end of the run closes the current epoch, even an incomplete one
        if final:
            epoch = -(-clips // length)
        elif is_last or epoch == (clips - batch) // length:
            return

        self.learner.world.barrier()  # the journals of all ranks are complete up to this step
        self.learner.world.on_main(lambda: self.bad.sum_up(self.state.step, epoch, enforce=not final))

    def names(self, micro_batches: Iterable[Batch]) -> list[str]:
        """Return the clips of this rank's share of a global batch, for the watchdog."""
        samples = [sample for batch in micro_batches for sample in batch.samples]
        return [f"sample {sample}: {self.records.path(sample)}" for sample in samples]
