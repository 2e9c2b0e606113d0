"""Training and evaluation loaders of the reader `dali`: bytes from the reader processes, pixels from DALI.

Plans, order, substitutes, deadlines and the replay of late samples are those of the other readers. The reader
processes draw the plans, look videos up and put stored bytes (encoded.py), not pixels, into the slots. This process
hands the bytes to DALI ahead of the training step, in one run for each micro-batch and form. Clips that DALI does not
take or fails to decode are decoded by the reader processes. They cost more time, and `fallbacks` counts them.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from datasets.dali import capability, sessions
from datasets.dali.pipeline import Decoder, mode, require_dali
from datasets.dali.queue import Breaker, Job, Queue, clip_of
from datasets.lists.records import Records
from datasets.loading.bad_media import printable
from datasets.loading.base import Loader, LoaderOptions
from datasets.loading.eval import EvalLoader
from datasets.loading.messages import Answer, AsStored
from datasets.loading.train import Batch, TrainLoader, _Row, _Step
from datasets.plan.train import TrainSpec
from datasets.plan.views import EvalSpec, VideoPlan
from utils.shards import ShardPlan

#: Room for the stored bytes of one training clip; a larger clip is read as pixels. Unwritten pages take no memory.
ROOM = 32 << 20
#: Runs under way: one that is delivered next, one that is being decoded, one that waits.
DEPTH = 3
#: Bytes of whole frames that the clips of one run may have on the device before they are cropped.
RUN_BYTES = 4 << 30
#: Videos of an evaluation that are decoded in one run, so that several NVDEC engines work at once.
VIDEOS = 4
#: Log a reason when its count reaches one of these.
_LOGGED_AT = {10**power for power in (0, 2, 4, 6, 8)}


class DaliLoader(Loader):
    """Share DALI's queues between both loaders, and count the clips that were read without DALI."""

    _most: int | None = None  # bytes of a clip; None: its slot grows

    def _prepare(self, device: torch.device | str, clips: int, frames: int) -> None:
        """Check that DALI is installed, and set the limits of its runs. Call this before starting anything."""
        require_dali()

        #: Why clips were read on the CPU -> how many.
        self.fallbacks: collections.Counter[str] = collections.Counter()
        self._lines: list[str] = []
        self._sizes = {"clips": clips, "frames": frames}
        self._queues: dict[str, Queue] = {}
        self._breaker, self._sessions = Breaker(), sessions.of(torch.device(device))
        self._refused: dict[int, str] = {}  # samples that DALI could not decode
        # Decoded clips are copied out of DALI's buffers during the training step, not after it.
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None

    def close(self) -> None:
        """Stop DALI and the reader processes."""
        for queue in self._queues.values():
            queue.close()
        self._queues.clear()
        super().close()

    def notes(self) -> list[str]:
        """Return log lines since the last call that explain why clips were read on the CPU, ever more rarely."""
        lines, self._lines = [*self._breaker.lines, *self._lines], []
        self._breaker.lines.clear()
        return super().notes() + lines

    def _wish(self, sample: int) -> AsStored | None:
        """Return the request for stored bytes, or None if the sample must come as pixels."""
        return None if sample in self._refused else AsStored(self._most, tuple(self._breaker.closed))

    def _queue(self, form: str) -> Queue:
        if form not in self._queues:
            decoder = Decoder(form, self.device, stream=self._stream, **self._sizes)
            self._queues[form] = Queue(decoder, self._breaker, self._sessions)
        return self._queues[form]

    def _check(self, sample: int, answer: Answer) -> None:
        """Count a clip that arrived as pixels because DALI did not decode it."""
        reason = answer.refused or self._refused.get(sample)
        if reason and answer.ok and answer.stored is None:
            self.fallbacks[reason] += 1
            if (times := self.fallbacks[reason]) in _LOGGED_AT:
                path = printable(self.records.path(sample))
                self._lines.append(f"dali: {times} clip(s) decoded on the CPU, the last of {path}: {reason}")

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return memory on the device for decoded clips, allocated on the stream that fills it."""
        with torch.cuda.stream(self._stream):
            return torch.empty(shape, dtype=torch.uint8, device=self.device)

    def _put(self, out: torch.Tensor, pixels: np.ndarray | None) -> None:
        """Write one clip (T, h, w, 3) that was read on the CPU into its place; zeros for None."""
        with torch.cuda.stream(self._stream):
            out.zero_() if pixels is None else out.copy_(torch.from_numpy(pixels))

    def _hand_out(self, clips: torch.Tensor) -> torch.Tensor:
        """Return complete clips that the stream of the training step may use."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            # Keeps the allocator from reusing this memory on the copy stream while the step still reads it.
            clips.record_stream(current)
        return clips


@dataclasses.dataclass
class _Run:
    """One run of DALI: clips of one form of one micro-batch."""

    step: _Step
    rows: list[_Row]  # in the order of the job's clips
    queue: Queue
    job: Job


@dataclasses.dataclass
class _Ahead:
    """The part of a step that is prepared: clips of each micro-batch, and the answers placed in them or in a run."""

    outs: list[torch.Tensor]
    answers: set[int] = dataclasses.field(default_factory=set)


class DaliTrainLoader(DaliLoader, TrainLoader):
    """`TrainLoader` with clips that DALI decodes; same arguments, same batches."""

    _reads_views_together = False  # DALI decodes each view as a separate clip
    _most = ROOM

    def __init__(
        self,
        records: Records,
        spec: TrainSpec,
        options: LoaderOptions,
        *,
        shards: ShardPlan,
        device: torch.device | str = "cpu",
        **more: Any,
    ) -> None:
        clips = max(len(micro_batch) for micro_batch in shards.micro_batches) * shards.batch_size
        self._prepare(device, clips, spec.sampling.frames_per_clip)
        self._ahead: dict[int, _Ahead] = {}
        self._waiting: collections.deque[_Run] = collections.deque()
        self._running: collections.deque[_Run] = collections.deque()
        super().__init__(records, spec, stored(options, device), shards=shards, device=device, **more)

    def _room(self, clip_bytes: int) -> int:
        # A slot holds pixels or stored bytes, so its places are large enough for both.
        return max(clip_bytes, ROOM)

    def _take(self, answer: Answer) -> None:
        self._check(self._where[answer.id][1].asked, answer)
        super()._take(answer)

    def _finish(self, step: _Step) -> None:
        """Wait until all clips of a step are read and decoded, and start to decode the clips of later steps."""
        waited, began = self.seconds_waiting, time.perf_counter()
        super()._finish(step)
        self._plan(step)

        while any(run.step is step for run in (*self._running, *self._waiting)):
            self._start()
            self._collect(self._running.popleft())
            super()._finish(step)  # waits for the pixels of the clips that DALI refused
            self._plan(step)

        # Before this step is used, keep DALI busy with the next ones.
        self._look_ahead()
        self.seconds_waiting = waited + time.perf_counter() - began  # replaces what super() added: decoding counts too

    def copy_ahead(self) -> None:
        """Start to decode the steps whose clips have been read."""
        if self._steps:
            self._look_ahead()

    def _look_ahead(self) -> None:
        for answer in self._answers(wait=False):
            self._take(answer)

        # Plan the steps that are read completely, in order, and start runs as far as `DEPTH` allows.
        for following in self._steps:
            if following.open:
                break  # later steps wait, so that runs stay in the order of delivery
            self._plan(following)
        self._start()

    def _copies_from_slots(self) -> bool:
        return False  # DALI takes the bytes out of them

    def _plan(self, step: _Step) -> None:
        """Put the clips that arrived since the last call into their places, or into runs."""
        if step.step not in self._ahead:
            sizes = [len(micro_batch) * self.shards.batch_size for micro_batch in self.shards.micro_batches]
            self._ahead[step.step] = _Ahead([self._empty((size, *self._clip)) for size in sizes])
        ahead, first = self._ahead[step.step], 0

        # Rows are in the order of the micro-batches.
        for out in ahead.outs:
            rows = step.rows[first : first + len(out)]
            first += len(rows)

            runs: dict[str, list[int]] = {}  # form -> places in the micro-batch
            for at, row in enumerate(rows):
                answer = row.answer
                if answer is None:
                    # No sample could be read for this place: it holds zeros, and its weight in the loss is 0.
                    self._put(out[at], None)
                elif answer.id not in ahead.answers:
                    ahead.answers.add(answer.id)
                    if answer.stored:
                        runs.setdefault(answer.stored.form, []).append(at)
                    else:
                        self._put(out[at], self._slots[step.slot].view(row.place * self._place_bytes, self._clip))

            for form, places in runs.items():
                # The whole frames lie on the device before they are cropped, so a form may need several runs.
                for part in within_budget(places, [rows[at].answer for at in places]):
                    self._waiting.append(self._run_of(step, form, rows, part, out))

    def _run_of(self, step: _Step, form: str, rows: list[_Row], places: list[int], out: torch.Tensor) -> _Run:
        slot, chosen = self._slots[step.slot], [rows[at] for at in places]
        clips = [clip_of(row.answer, slot, row.place * self._place_bytes) for row in chosen if row.answer]
        return _Run(step, chosen, self._queue(form), Job(clips, [out[at] for at in places], places))

    def _start(self) -> None:
        while self._waiting and len(self._running) < DEPTH:
            run = self._waiting.popleft()
            run.queue.submit(run.job)
            self._running.append(run)

    def _collect(self, run: _Run) -> None:
        """Finish the oldest run, and request the clips that DALI could not decode again, as pixels."""
        row_at = dict(zip(run.job.names, run.rows, strict=True))

        for at, reason in run.queue.collect():
            row = row_at[at]
            self._refused[row.asked] = reason
            row.answer = None
            run.step.open += 1
            self._ask(run.step, row)

    def _clips(self, step: _Step, rows: list[_Row]) -> torch.Tensor:
        return self._hand_out(self._ahead[step.step].outs.pop(0))

    def _batches(self, step: _Step) -> list[Batch]:
        batches = super()._batches(step)
        del self._ahead[step.step]
        return batches


class DaliEvalLoader(DaliLoader, EvalLoader):
    """`EvalLoader` with frames that DALI decodes; same arguments, same items."""

    def __init__(
        self,
        records: Records,
        spec: EvalSpec,
        options: LoaderOptions,
        *,
        device: torch.device | str = "cpu",
        **more: Any,
    ) -> None:
        self._prepare(device, VIDEOS, spec.sampling.frames_per_clip * spec.num_clips)
        self._running: collections.deque[tuple[Queue, Job]] = collections.deque()  # clips are named by their round
        self._next_run = 0  # the first round that is neither in a run nor read as pixels
        self._decoded: dict[int, torch.Tensor] = {}  # round -> frames (F, h, w, 3)
        super().__init__(records, spec, stored(options, device), device=device, **more)

    def _finish(self, index: int) -> None:
        """Wait until the video of a round is read and decoded, and start to decode the videos after it."""
        super()._finish(index)
        self._start()

        # Collect all runs up to the one with this round. Request the clips that DALI could not decode as pixels.
        while self._running and self._running[0][1].names[0] <= index:
            queue, _ = self._running.popleft()
            for number, reason in queue.collect():
                self._refused[self._mine[number]] = reason
                del self._ready[number], self._decoded[number]
                self._ask(number)
            super()._finish(index)  # waits for the pixels of the videos that DALI refused

        # The waits above may have let more videos arrive: give them to DALI before this item is used.
        for answer in self._answers(wait=False):
            self._ready[self._where.pop(answer.id)] = answer
        self._start()
        self._check(self._mine[index], self._ready[index])

    def _start(self) -> None:
        """Start to decode the videos that have arrived, in order."""
        while self._next_run in self._ready and len(self._running) < DEPTH:
            form, numbers = self._next_of_one_form()
            if not numbers:
                continue  # the next video was read as pixels

            clips = [clip_of(self._ready[number], self._slots[self._slot_of[number]], 0) for number in numbers]
            outs = [self._empty((len(clip.rows), *clip.size, 3)) for clip in clips]
            queue, job = self._queue(form), Job(clips, outs, numbers)

            queue.submit(job)
            self._running.append((queue, job))
            self._decoded |= dict(zip(numbers, outs, strict=True))

    def _next_of_one_form(self) -> tuple[str, list[int]]:
        """Return the next rounds that go into one run of DALI; no rounds if the next one was read as pixels."""
        form, numbers, size = "", [], 0
        while self._next_run in self._ready and len(numbers) < VIDEOS:
            answer = self._ready[self._next_run]
            stored = answer.stored
            if numbers and (stored is None or stored.form != form or size + stored.decoded > RUN_BYTES):
                break

            self._next_run += 1
            if stored is None:
                break  # read as pixels: needs no run, and ends this one to keep the order
            form, size = stored.form, size + stored.decoded
            numbers.append(self._next_run - 1)

        return form, numbers

    def _frames(self, slot: int, plan: VideoPlan) -> torch.Tensor:
        # The base class has already advanced to the next round.
        decoded = self._decoded.pop(self._round - 1, None)
        return super()._frames(slot, plan) if decoded is None else self._hand_out(decoded)


def stored(options: LoaderOptions, device: torch.device | str) -> LoaderOptions:
    """Return `options` changed so that the reader processes give bytes for the decoder of this device."""
    device = torch.device(device)
    limits = capability.limits(device) if device.type == "cuda" else None
    spec = dataclasses.replace(options.reader, kind="encoded", decoder=mode(device), limits=limits)
    return dataclasses.replace(options, reader=spec)


def within_budget(places: list[int], answers: list[Answer | None]) -> Iterator[list[int]]:
    """Yield the clips in runs whose whole frames fit into `RUN_BYTES`; one larger clip is a run alone."""
    part: list[int] = []
    size = 0

    for place, answer in zip(places, answers, strict=True):
        decoded = answer.stored.decoded if answer and answer.stored else 0
        if part and size + decoded > RUN_BYTES:
            yield part
            part, size = [], 0
        part.append(place)
        size += decoded

    if part:
        yield part
