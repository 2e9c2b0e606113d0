"""Evaluate video by video. Each video is read once on one rank: its distinct frames at test scale, and its views."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterator

import torch

from datasets.lists.records import Records
from datasets.loading.bad_media import BadEvent, Ledger, printable
from datasets.loading.base import Loader, LoaderOptions
from datasets.loading.messages import Answer, ReadVideo
from datasets.loading.workers import Setup
from datasets.plan.views import EvalSpec, VideoPlan
from utils import transfer, transforms
from utils.errors import AgreedError

CropViews = Callable[[int, int], torch.Tensor]  # (start, stop) -> these views of a video


@dataclasses.dataclass
class VideoItem:
    """One video of an evaluation, or padding (sample = -1) that gives all ranks the same number of rounds.

    Attributes:
        sample: index of the record, -1 for padding.
        label: its label, -1 for padding.
        frames: (F, H, W, 3) uint8 distinct frames at test scale; None for padding and failures. On the CPU a view of
            shared memory that is valid until the next item is requested.
        plan: frames and boxes of the views; None if frames is None.
        failure: why the video could not be read, else None.
        repaired: what is wrong with a video that was read nevertheless, else "".
    """

    sample: int
    label: int
    frames: torch.Tensor | None
    plan: VideoPlan | None
    failure: str | None
    repaired: str = ""


class EvalLoader(Loader):
    """Iterate over VideoItems: rank r takes videos r, r+W, ... Every rank yields the same number of items.

    Args:
        records: the list.
        spec: clips and crops of each video.
        options: how media are read. A video that cannot be read is yielded as an item with a failure. With `on_bad:
            substitute`, a video that lacks a few frames shows neighbouring frames instead and is marked (`repaired`).
        rank, world: this rank and the number of ranks.
        device: target device of the frames.
        skip: samples to leave out; the same on every rank.
    """

    def __init__(
        self,
        records: Records,
        spec: EvalSpec,
        options: LoaderOptions,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        skip: Collection[int] = (),
    ) -> None:
        self.spec = spec

        samples = [sample for sample in range(len(records)) if sample not in skip]
        # Ceil: ranks with one video fewer pad, so that all ranks take part in every collective.
        self.rounds = -(-len(samples) // world)
        # A budget of 1.0 never stops an evaluation: its caller counts unreadable videos as wrong.
        self.ledger = Ledger(len(records), 1.0, "error" if options.on_bad == "error" else "skip")

        self._mine = samples[rank::world]
        self._round = 0  # that is yielded next
        self._asked = 0  # rounds that were submitted
        self._where: dict[int, int] = {}  # request id -> round
        self._ready: dict[int, Answer] = {}  # round -> answer
        self._slot_of: dict[int, int] = {}  # round -> slot
        self._free = list(range(max(1, options.prefetch) + 1))  # one more: the consumer holds one slot
        self._held: int | None = None  # slot whose frames the consumer has

        setup = Setup(options.reader, eval=spec, repair=options.on_bad == "substitute")
        super().__init__(setup, records, options, slots=len(self._free), slot_bytes=0, device=device)
        self._begin()

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[VideoItem]:
        return self

    def __next__(self) -> VideoItem:
        """Return the next video. On the CPU this invalidates the frames of the previous one."""
        if self._held is not None:
            self._free.append(self._held)
            self._held = None
        self._ask_ahead()

        if self._round >= self.rounds:
            raise StopIteration
        index = self._round
        self._round += 1
        if index >= len(self._mine):
            return VideoItem(-1, -1, None, None, None)

        began = time.perf_counter()
        self._finish(index)
        self.seconds_waiting += time.perf_counter() - began

        self._held = self._slot_of.pop(index)
        return self._item(self._mine[index], self._ready.pop(index))

    def _finish(self, index: int) -> None:
        """Wait until the video of a round has been read."""
        while index not in self._ready:
            for answer in self._answers():
                self._ready[self._where.pop(answer.id)] = answer

    def _ask_ahead(self) -> None:
        while self._free and self._asked < len(self._mine):
            self._slot_of[self._asked] = self._free.pop()
            self._ask(self._asked)
            self._asked += 1

    def _ask(self, index: int) -> None:
        """Submit the video of a round."""
        self._number += 1
        self._where[self._number] = index
        sample = self._mine[index]
        stored = self._wish(sample) if self._wish else None
        self.service.submit(self._number, ReadVideo(sample, self._slot_of[index], stored))

    def _sample_of(self, request: int) -> int | None:
        number = self._where.get(request)
        return None if number is None else self._mine[number]

    def _item(self, sample: int, answer: Answer) -> VideoItem:
        label = int(self.records.labels[sample])
        if not answer.ok:
            path, reason = printable(answer.path or self.records.path(sample)), self._reason(sample, answer)
            # Position -1: an evaluation has no global positions.
            event = BadEvent(-1, sample, path, reason, "counts as wrong", True, answer.timeout, answer.crashed)
            self.ledger.add(event)
            return VideoItem(sample, label, None, None, f"{path}: {reason}")

        assert isinstance(answer.plan, VideoPlan)
        assert self._held is not None
        return VideoItem(sample, label, self._frames(self._held, answer.plan), answer.plan, None, answer.repaired)

    def _frames(self, slot: int, plan: VideoPlan) -> torch.Tensor:
        """Return the frames of the video in a slot, on the device: (F, H, W, 3) uint8."""
        shape = (len(plan.frames), *plan.size, 3)
        return transfer.to_device(torch.from_numpy(self._slots[slot].view(0, shape)), self.device)


def rounds(loader: EvalLoader, views: int) -> Iterator[list[tuple[VideoItem, CropViews | None]]]:
    """Yield groups of videos, each with a function that crops its views. A group has about `views` views in total.

    The number of groups is the same on every rank, even if some videos could not be read. Views are (n, T, h, w, C)
    uint8. They are cropped on request, so that not all views of a video are in memory. If several videos share a group,
    they are cropped at once, because frames are valid only until the next item.
    """
    size = max(1, views // loader.spec.views)
    held: list[tuple[VideoItem, CropViews | None]] = []

    # Count padding too, so that every rank yields at the same items.
    for number, item in enumerate(loader, start=1):
        if item.sample >= 0:
            held.append((item, _crop_views(item, now=size > 1)))
        if number % size == 0 or number == len(loader):
            yield held
            held = []


def _crop_views(item: VideoItem, *, now: bool) -> CropViews | None:
    frames, plan = item.frames, item.plan

    if frames is None or plan is None:
        return None

    def crop_views(start: int, stop: int) -> torch.Tensor:
        views = slice(start, stop)
        return transforms.crop_views(frames, plan.clip_rows[views], plan.boxes[views], plan.flips[views])

    if not now:
        return crop_views
    whole = crop_views(0, len(plan.boxes))
    return lambda start, stop: whole[start:stop]


def read_nothing(result: dict[str, float]) -> bool:
    """Return True if no video of an evaluation could be read. Its numbers then say nothing about the model."""
    return result["num_videos"] > 0 and result["failed"] == result["num_videos"]


def none_readable(loader: EvalLoader) -> AgreedError:
    """Return the error that every rank raises after such an evaluation: the first file, and what to check."""
    records, first = loader.records, min(loader.ledger.samples, default=0)
    path, met = records.full_path(first), loader.ledger.samples.get(first)

    # If the file exists, suspect the reader first; if it does not, suspect the root folder.
    root = f"the root, {records.root} (common.val_root; eval --root)"
    reader = f"data.reader, {loader.options.reader.kind}"
    check = f"{reader}, does it fit these files" if os.path.exists(path) else f"{root}, is it the folder of this list"
    also = root if os.path.exists(path) else reader

    return AgreedError(
        f"none of the {len(records)} videos of {records.list_file} can be read; the first is {printable(path)}: "
        f"{met[0].reason if met else 'see the other ranks'}. Check {check}? Else {also}. Nothing was kept: correct it "
        "and run the same command again"
    )
