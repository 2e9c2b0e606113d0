"""Training clips by global position: plans -> reader processes -> micro-batches on the device.

Which clips come out depends on the seed and the positions only: not on the number of workers, ranks or prefetched
steps, and not on what was read before.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
import time
from collections.abc import Collection, Iterator

import numpy as np
import torch

from datasets.lists.records import Records
from datasets.loading.bad_media import MAX_SUBSTITUTES, BadEvent, Ledger, Substitutes, printable
from datasets.loading.base import Loader, Reading
from datasets.loading.messages import Answer, ReadClip
from datasets.loading.workers import Setup
from datasets.plan import order as orders
from datasets.plan.train import Plan, TrainSpec
from datasets.plan.views import VideoPlan
from utils import transfer
from utils.faults import UserError
from utils.shards import ShardPlan


@dataclasses.dataclass
class Batch:
    """One micro-batch. B clips, T frames, F = 1 row for a clip, or T.

    Attributes:
        clips: (B, T, H, W, 3) uint8 RGB. On the CPU a view of shared memory: valid until the next step is asked for.
        labels: (B,) int64; where videos have several labels (B, K) float32, 1 at each.
        weights: (B,) float32, 0 for a clip that could not be read (its pixels are 0).
        samples: records shown (a substitute's own index).
        drawn: name of an augmentation -> (B, F, ...) rows as in `Plan.ops`, in the order of application; on the CPU,
            where they are read.
        shards: shards that make up the batch, in order.
        positions: global position of each clip.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    samples: list[int]
    drawn: dict[str, torch.Tensor]
    shards: tuple[int, ...]
    positions: list[int]

    @property
    def flip(self) -> torch.Tensor:
        """(B,) bool on the CPU: which clips are mirrored."""
        return (
            self.drawn["flip"].flatten() if "flip" in self.drawn else torch.zeros(len(self.samples), dtype=torch.bool)
        )


@dataclasses.dataclass
class _Row:
    """One clip that is being read."""

    position: int
    sample: int  # of the order; a substitute is asked for under another number
    asked: int
    place: int
    tries: int = 0
    answer: Answer | None = None
    others: list[_Row] = dataclasses.field(default_factory=list)  # further views, read with it


@dataclasses.dataclass
class _Step:
    """One global step: the clips of this rank, in the order of the micro-batches; `open` are still to be read."""

    step: int
    slot: int
    rows: list[_Row]
    open: int


class TrainLoader(Loader):
    """Iterating gives (step, [Batch, ...]): this rank's micro-batches of each global step from `start` on.

    Args:
        records: the list.
        spec: what is drawn for each clip.
        reading: how media are read.
        seed: of the run.
        shards: which positions this rank has.
        start: first step.
        stop: number of steps of the run; None = without end.
        device: where batches go. A GPU gets them by asynchronous copies, straight from the readers' memory.
        replay: (position, sample) pairs that were given up before a resume for a reason that is not the file's; they
            fail again, unread.
        order: "shuffled" or "class_balanced".
        num_sample: views of each video in a shard; a multiple of it is `batch_size`.
    """

    _reads_views_together = True

    def __init__(
        self,
        records: Records,
        spec: TrainSpec,
        reading: Reading,
        *,
        seed: int,
        shards: ShardPlan,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | str = "cpu",
        replay: Collection[tuple[int, int]] = (),
        order: str = "shuffled",
        num_sample: int = 1,
    ) -> None:
        if not len(records):
            raise UserError("the training list has no videos")
        self.spec = spec
        self.seed = seed
        self._videos = len(records)
        self.shards = shards
        self._micro_batches = shards.micro_batches
        self.ledger = Ledger(len(records), reading.bad_budget, reading.on_bad)
        self._replay = set(replay)
        self._num_sample = num_sample
        self._sample_at = orders.of(order, seed, records, batch_size=shards.batch_size, num_sample=num_sample)
        self._substitutes = Substitutes(records.labels)
        self._next, self._stop = start, stop
        self._steps: collections.deque[_Step] = collections.deque()
        self._where: dict[int, tuple[_Step, _Row]] = {}  # request id -> clip
        self._free = list(range(reading.prefetch + 1))
        self._held: int | None = None  # slot whose clips the consumer has
        self._clip = (spec.sampling.frames_per_clip, spec.input_size, spec.input_size, 3)
        self._place_bytes = self._room(int(np.prod(self._clip)))
        clips = sum(len(shard_list) for shard_list in shards.micro_batches) * shards.batch_size
        setup = Setup(reading.reader, train=spec, seed=seed)
        size = clips * self._place_bytes
        super().__init__(setup, records, reading, slots=len(self._free), slot_bytes=size, device=device)
        self._copies = transfer.CopyStream(self.device) if self._copies_from_slots() else None
        self._pages = transfer.PinnedPages()
        self._copied: tuple[_Step, list[Batch]] | None = None  # the next step, on its way to the device
        self._leaving: collections.deque[tuple[torch.cuda.Event, int]] = collections.deque()  # slots being copied
        if self._copies is not None:
            self._pin_slots(size)
        self._begin()

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        return self

    def __next__(self) -> tuple[int, list[Batch]]:
        """The next step; ends the validity of the clips of the step before on the CPU."""
        if self._held is not None:
            self._free.append(self._held)
            self._held = None
        if self._copies is not None:
            self._take_back_slots()
        self._ask_ahead()
        if self._copies is not None:
            return self._handed_over(self._copies)
        if not self._steps:
            raise StopIteration
        step = self._steps.popleft()
        self._finish(step)
        self._held = step.slot
        return step.step, self._batches(step)

    def copy_ahead(self) -> None:
        """Start to copy the next step's clips to a GPU if they are read. Returns at once; on a CPU it does nothing."""
        if self._copies is None or self._copied is not None or not self._steps:
            return
        for answer in self._answers(wait=False):
            self._take(answer)
        if not self._steps[0].open:
            self._copied = self._copy(self._steps.popleft(), self._copies)
        self._take_back_slots()
        self._ask_ahead()

    def close(self) -> None:
        """See `Loader.close`."""
        if not self._closed:
            self._copied = None
            self._pages.release(after_error=sys.exc_info()[0] is not None)
        super().close()

    def _copies_from_slots(self) -> bool:
        """True where clips are copied from the slots to the device."""
        return self.device.type == "cuda"

    def _pin_slots(self, size: int) -> None:
        """Let the GPU read the slots themselves. Where the system refuses, each clip goes through a pinned copy."""
        for slot in self._slots:
            if not self._pages.add(slot.view(0, (size,))):
                break

    def _handed_over(self, copies: transfer.CopyStream) -> tuple[int, list[Batch]]:
        """The next step on a GPU, for the current stream."""
        if self._copied is None:
            if not self._steps:
                if not self._leaving:
                    raise StopIteration
                self._leaving[0][0].synchronize()  # one slot only: its copy has to end before it is filled again
                self._take_back_slots()
                self._ask_ahead()
                if not self._steps:
                    raise StopIteration
            step = self._steps.popleft()
            self._finish(step)
            self._copied = self._copy(step, copies)
        (done, batches), self._copied = self._copied, None
        copies.hand_over(tensor for batch in batches for tensor in (batch.clips, batch.labels, batch.weights))
        return done.step, batches

    def _copy(self, step: _Step, copies: transfer.CopyStream) -> tuple[_Step, list[Batch]]:
        with copies.entered():
            batches = self._batches(step)
        self._leaving.append((copies.mark(), step.slot))
        return step, batches

    def _take_back_slots(self) -> None:
        """Free the slots whose clips have arrived on the device."""
        while self._leaving and self._leaving[0][0].query():
            self._free.append(self._leaving.popleft()[1])

    def _room(self, clip_bytes: int) -> int:
        """Bytes of a slot that one clip has."""
        return clip_bytes

    def _finish(self, step: _Step) -> None:
        """Wait until all clips of a step are read."""
        began = time.perf_counter()
        while step.open:
            for answer in self._answers():
                self._take(answer)
        self.seconds_waiting += time.perf_counter() - began

    def _ask_ahead(self) -> None:
        while self._free and (self._stop is None or self._next < self._stop):
            rows: list[_Row] = []
            tasks: list[_Row] = []
            for micro_batch in self._micro_batches:
                for shard in micro_batch:
                    for position in self.shards.positions(self._next, shard):
                        sample = self._sample_at(position)
                        rows.append(_Row(position, sample, sample, len(rows)))
                    tasks += self._grouped(rows[-self.shards.batch_size :])
            step = _Step(self._next, self._free.pop(), rows, len(tasks))
            self._steps.append(step)
            self._next += 1
            for row in tasks:
                self._ask(step, row)

    def _grouped(self, rows: list[_Row]) -> list[_Row]:
        """Return the rows of a shard that are asked for; views that are read with another row hang on it."""
        turns = len(rows) // self._num_sample
        if not self._reads_views_together or turns == len(rows):
            return rows
        for number, row in enumerate(rows[:turns]):
            row.others = rows[number + turns :: turns]
        return rows[:turns]

    def _ask(self, step: _Step, row: _Row) -> None:
        if (row.position, row.asked) in self._replay:
            reason = "was given up before the resume, because it was late or ended its reader process"
            self._failed(step, row, Answer(0, reason=reason, timeout=True))
            return
        self._number += 1
        self._where[self._number] = (step, row)
        self._service.submit(self._number, self._task(step, row))

    def _task(self, step: _Step, row: _Row) -> ReadClip:
        size, count = self.shards.batch_size, self._num_sample
        turn, view = orders.turn_of(row.position, size, count)
        return ReadClip(
            row.asked,
            turn // self._videos,
            row.position,
            step.slot,
            row.place * self._place_bytes,
            frames_of=row.position - view * (size // count),
            views=tuple((other.position, other.place * self._place_bytes) for other in row.others),
        )

    def _sample_of(self, request: int) -> int | None:
        entry = self._where.get(request)
        return None if entry is None else entry[1].asked

    def _take(self, answer: Answer) -> None:
        step, row = self._where.pop(answer.id)
        if answer.plan is not None:
            row.answer = answer
            for other, plan in zip(row.others, answer.views, strict=True):
                other.asked, other.answer = row.asked, dataclasses.replace(answer, plan=plan)
            step.open -= 1
        else:
            self._failed(step, row, answer)

    def _failed(self, step: _Step, row: _Row, answer: Answer) -> None:
        """A clip could not be read: ask for its substitute, or leave its place empty."""
        path = printable(answer.path or self.records.path(row.asked))
        following = None
        if self.reading.on_bad == "substitute" and row.tries < MAX_SUBSTITUTES:
            following = self._substitutes.after(row.asked)
            following = None if following == row.sample else following  # all of the label were tried
        action = "skipped (weight 0)" if following is None else f"sample {following} stands in"
        action = "the run stops" if self.reading.on_bad == "error" else action
        new, reason = row.asked not in self.ledger.samples, self._reason(row.asked, answer)
        event = BadEvent(row.position, row.asked, path, reason, action, new, answer.timeout, answer.crashed)
        self.ledger.add(event)
        if following is None:
            step.open -= 1
        else:
            row.asked, row.tries = following, row.tries + 1
            self._ask(step, row)

    def _batches(self, step: _Step) -> list[Batch]:
        batches, first = [], 0
        for micro_batch in self._micro_batches:
            last = first + len(micro_batch) * self.shards.batch_size
            batches.append(self._batch(step, step.rows[first:last], micro_batch))
            first = last
        return batches

    def _batch(self, step: _Step, rows: list[_Row], shards: tuple[int, ...]) -> Batch:
        plans = [row.answer.plan if row.answer else None for row in rows]
        samples = [row.asked if row.answer else row.sample for row in rows]  # a substitute shows its own labels
        if self.records.several:
            labels = torch.from_numpy(np.stack([self.records.multi_hot(sample) for sample in samples]))
        else:
            labels = torch.tensor([int(self.records.labels[sample]) for sample in samples])
        weights = torch.tensor([float(row.answer is not None) for row in rows])
        return Batch(
            clips=self._clips(step, rows),
            labels=transfer.to_device(labels, self.device),
            weights=transfer.to_device(weights, self.device),
            samples=samples,
            drawn={name: self._drawn(name, plans) for name in self.spec.ops},
            shards=shards,
            positions=[row.position for row in rows],
        )

    def _clips(self, step: _Step, rows: list[_Row]) -> torch.Tensor:
        """(B, T, H, W, 3) uint8 on the device: the clips of a micro-batch."""
        clips = self._slots[step.slot].view(rows[0].place * self._place_bytes, (len(rows), *self._clip))
        for index, row in enumerate(rows):
            if row.answer is None:
                clips[index] = 0  # a reader may have written a part before it failed
        return transfer.to_device(torch.from_numpy(clips), self.device)

    def _drawn(self, name: str, plans: list[Plan | VideoPlan | None]) -> torch.Tensor:
        """(B, F, ...): what the plans drew for one augmentation; a clip that is not there stays as it is."""
        rows = [plan.ops[name] if isinstance(plan, Plan) else self.spec.neutral(name) for plan in plans]
        return torch.from_numpy(np.stack(rows))
