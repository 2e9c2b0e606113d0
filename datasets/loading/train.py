"""Load training clips by global position: plans -> reader processes -> micro-batches on the device.

Which clips come out depends only on the seed and the positions. The number of workers, ranks and prefetched steps does
not matter, nor does anything that was read before.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch

from datasets.lists.records import Records
from datasets.loading.bad_media import MAX_SUBSTITUTES, BadEvent, Ledger, Substitutes, printable
from datasets.loading.base import Loader, LoaderOptions
from datasets.loading.messages import Answer, ReadClip
from datasets.loading.workers import Setup
from datasets.plan import order as orders
from datasets.plan.train import Plan, TrainSpec
from utils import transfer
from utils.errors import UserError
from utils.shards import ShardPlan


@dataclasses.dataclass
class Batch:
    """One micro-batch: B clips of T frames. F is 1 (one row for a clip) or T.

    Attributes:
        clips: (B, T, H, W, 3) uint8 RGB. On the CPU a view of shared memory that is valid until the next step is
            requested.
        labels: (B,) int64; for multi-label lists (B, K) float32, 1 at each label.
        weights: (B,) float32, 0 for a clip that could not be read (its pixels are 0).
        samples: records that are shown; for a substitute its own index.
        drawn: name of an augmentation -> (B, F, ...) rows as in `Plan.ops`, in the order of application. On the
            CPU, where they are read.
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
        """Which clips are mirrored: (B,) bool on the CPU."""
        return (
            self.drawn["flip"].flatten() if "flip" in self.drawn else torch.zeros(len(self.samples), dtype=torch.bool)
        )


@dataclasses.dataclass
class _Row:
    """One clip that is being read."""

    position: int
    turn: orders.Turn
    asked: int  # the sample that is read: that of `turn`, or a substitute
    place: int  # index in the slot
    tries: int = 0  # substitutes that were tried
    answer: Answer | None = None  # None if it is not yet read, or skipped
    others: Sequence[_Row] = ()  # further views, read in the same task


@dataclasses.dataclass
class _Step:
    """One global step: this rank's clips in the order of the micro-batches. `open` counts those still to be read."""

    step: int
    slot: int
    rows: list[_Row]
    open: int


class TrainLoader(Loader):
    """Iterate over (step, [Batch, ...]): this rank's micro-batches of each global step from `start` on.

    Args:
        records: the list.
        spec: what is drawn for each clip.
        options: how media are read.
        seed: of the run.
        shards: positions of this rank.
        start: first step.
        stop: number of steps of the run; None = no limit.
        device: target device of the batches. A GPU receives them by asynchronous copies from the readers' memory.
        replay: (position, sample) pairs that were given up before a resume although the file was not at fault. They
            fail again without being read.
        order: "shuffled" or "class_balanced".
        num_sample: views of each video in a shard; `batch_size` is a multiple of it.
    """

    _reads_views_together = True  # the DALI loader decodes each view by itself

    def __init__(
        self,
        records: Records,
        spec: TrainSpec,
        options: LoaderOptions,
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
        self.shards = shards
        self._micro_batches = shards.micro_batches

        self.ledger = Ledger(len(records), options.bad_budget, options.on_bad)
        self._replay = set(replay)
        self._turn_at = orders.Order(order, seed, records, batch_size=shards.batch_size, num_sample=num_sample)
        self._tasks = shards.batch_size // (num_sample if self._reads_views_together else 1)  # of a shard
        self._substitutes = Substitutes(records.labels)
        self._next, self._stop = start, stop

        self._steps: collections.deque[_Step] = collections.deque()
        self._where: dict[int, tuple[_Step, _Row]] = {}  # request id -> clip
        # One slot more than steps read ahead: the consumer holds one.
        self._free = list(range(options.prefetch + 1))
        self._held: int | None = None  # slot whose clips the consumer has

        self._clip = (spec.sampling.frames_per_clip, spec.input_size, spec.input_size, 3)
        self._place_bytes = self._room(int(np.prod(self._clip)))
        clips = sum(len(shard_list) for shard_list in shards.micro_batches) * shards.batch_size

        setup = Setup(options.reader, train=spec, seed=seed)
        size = clips * self._place_bytes
        super().__init__(setup, records, options, slots=len(self._free), slot_bytes=size, device=device)

        # Copies and pinned pages need the slots, which the base class has made.
        self._copies = transfer.CopyStream(self.device) if self._copies_from_slots() else None
        self._pages = transfer.PinnedPages()
        self._copied: tuple[_Step, list[Batch]] | None = None  # the next step, on its way to the device
        self._leaving: collections.deque[tuple[torch.cuda.Event, int]] = collections.deque()  # slots being copied
        if self._copies is not None:
            self._pin_slots(size)
        # Last, because reading starts here and uses all of the above.
        self._begin()

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        return self

    def __next__(self) -> tuple[int, list[Batch]]:
        """Return the next step. On the CPU this invalidates the clips of the step before."""
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
        """Start to copy the next step's clips to a GPU if they have been read. Return at once; do nothing on a CPU."""
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
            # Unpin before the slots are unmapped. After an error the GPU may hang, and unpinning would wait for it.
            self._pages.release(after_error=sys.exc_info()[0] is not None)
        super().close()

    def _copies_from_slots(self) -> bool:
        """Return True if clips are copied from the slots to the device."""
        return self.device.type == "cuda"

    def _pin_slots(self, size: int) -> None:
        """Let the GPU read the slots directly. If the system refuses, each clip goes through a pinned copy."""
        for slot in self._slots:
            if not self._pages.add(slot.view(0, (size,))):
                break

    def _handed_over(self, copies: transfer.CopyStream) -> tuple[int, list[Batch]]:
        """Return the next step on a GPU, ready for the current stream."""
        if self._copied is None:
            if not self._steps:
                if not self._leaving:
                    raise StopIteration
                self._leaving[0][0].synchronize()  # a single slot: its copy must end before it is refilled
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
        """Return the bytes that one clip occupies in a slot."""
        return clip_bytes

    def _finish(self, step: _Step) -> None:
        """Wait until all clips of a step have been read."""
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
                        turn = self._turn_at(position)
                        rows.append(_Row(position, turn, turn.sample, len(rows)))

                    # A shard lists view 0 of all its videos, then view 1, ...; one task reads all views of a video.
                    shard_rows = rows[-self.shards.batch_size :]
                    for number, row in enumerate(shard_rows[: self._tasks]):
                        row.others = shard_rows[number + self._tasks :: self._tasks]
                        tasks.append(row)

            step = _Step(self._next, self._free.pop(), rows, len(tasks))
            self._steps.append(step)
            self._next += 1
            # After the step is complete: a task of `replay` fails at once, which changes the step.
            for row in tasks:
                self._ask(step, row)

    def _ask(self, step: _Step, row: _Row) -> None:
        if (row.position, row.asked) in self._replay:
            reason = "was given up before the resume, because it was late or ended its reader process"
            self._failed(step, row, Answer(0, reason=reason, timeout=True))
            return

        self._number += 1
        self._where[self._number] = (step, row)

        task = ReadClip(
            row.asked,
            row.turn.epoch,
            row.position,
            step.slot,
            # Rows of a step lie in the slot in their order, so that a micro-batch is one contiguous array.
            row.place * self._place_bytes,
            self._wish(row.asked),
            frames_of=row.turn.first,
            views=tuple((other.position, other.place * self._place_bytes) for other in row.others),
        )
        self.service.submit(self._number, task)

    def _sample_of(self, request: int) -> int | None:
        entry = self._where.get(request)
        return None if entry is None else entry[1].asked

    def _take(self, answer: Answer) -> None:
        step, row = self._where.pop(answer.id)
        if answer.plan is not None:
            row.answer = answer
            for other, plan in zip(row.others, answer.views, strict=True):
                # All views come from one decoded file, so they share everything but the plan.
                other.asked, other.answer = row.asked, dataclasses.replace(answer, plan=plan)
            step.open -= 1
        else:
            self._failed(step, row, answer)

    def _failed(self, step: _Step, row: _Row, answer: Answer) -> None:
        """Record a clip that could not be read. Request its substitute, or leave its place empty."""
        path = printable(answer.path or self.records.path(row.asked))

        following = None
        if self.options.on_bad == "substitute" and row.tries < MAX_SUBSTITUTES:
            following = self._substitutes.after(row.asked)
            if following == row.turn.sample:  # back at the start: all of the label were tried
                following = None

        action = "skipped (weight 0)" if following is None else f"replaced by sample {following}"
        action = "the run stops" if self.options.on_bad == "error" else action
        new, reason = row.asked not in self.ledger.samples, self._reason(row.asked, answer)
        event = BadEvent(row.position, row.asked, path, reason, action, new, answer.timeout, answer.crashed)
        # Before the substitute is submitted: this raises if the budget is used up.
        self.ledger.add(event)

        if following is None:
            step.open -= 1
        else:
            row.asked, row.tries = following, row.tries + 1
            self._ask(step, row)

    def _batches(self, step: _Step) -> list[Batch]:
        batches, first = [], 0
        for shards in self._micro_batches:
            rows = step.rows[first : first + len(shards) * self.shards.batch_size]
            first += len(rows)

            plans = [row.answer.plan if row.answer else None for row in rows]
            # A substitute shows its own labels.
            samples = [row.asked if row.answer else row.turn.sample for row in rows]

            if self.records.multi_label:
                labels = torch.from_numpy(np.stack([self.records.multi_hot(sample) for sample in samples]))
            else:
                labels = torch.from_numpy(self.records.labels[samples].astype(np.int64))
            weights = torch.tensor([float(row.answer is not None) for row in rows])

            drawn = {  # (B, F, ...) for each augmentation; a missing clip gets the neutral row
                name: np.stack(
                    [plan.ops[name] if isinstance(plan, Plan) else self.spec.neutral(name) for plan in plans]
                )
                for name in self.spec.ops
            }

            batches.append(
                Batch(
                    clips=self._clips(step, rows),
                    labels=transfer.to_device(labels, self.device),
                    weights=transfer.to_device(weights, self.device),
                    samples=samples,
                    drawn={name: torch.from_numpy(rows) for name, rows in drawn.items()},
                    shards=shards,
                    positions=[row.position for row in rows],
                )
            )
        return batches

    def _clips(self, step: _Step, rows: list[_Row]) -> torch.Tensor:
        """Return the clips of a micro-batch on the device: (B, T, H, W, 3) uint8."""
        clips = self._slots[step.slot].view(rows[0].place * self._place_bytes, (len(rows), *self._clip))
        for index, row in enumerate(rows):
            if row.answer is None:
                clips[index] = 0  # a reader may have written a part of it before it failed
        return transfer.to_device(torch.from_numpy(clips), self.device)
