"""Define how media are read, and what both loaders share: slots, reader processes and answers."""

from __future__ import annotations

import abc
import dataclasses
import os
from typing import TYPE_CHECKING

import torch

from datasets.lists.records import Records
from datasets.loading.bad_media import printable
from datasets.loading.messages import Answer, AsStored
from datasets.loading.pool import Inline, Pool, Service
from datasets.loading.slots import Slot
from datasets.loading.workers import Setup
from datasets.memcached.report import MemcachedTraffic
from datasets.readers.spec import ReaderSpec
from utils.config.schema import Data
from utils.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self


_DEFAULTS = Data()


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """Define how media are read, for training and for evaluation.

    Attributes:
        reader: kind and options of the reader.
        workers: reader processes; 0 = inline.
        prefetch: steps (training) or videos (evaluation) that are read ahead.
        deadline: seconds that one sample may take (not enforced inline).
        on_bad: "error", "skip" or "substitute"; an evaluation never substitutes.
        bad_budget: largest share of unreadable videos.

    The defaults are those of the config keys in `utils/config/schema.py`.
    """

    reader: ReaderSpec
    workers: int = 0
    prefetch: int = _DEFAULTS.prefetch
    deadline: float = _DEFAULTS.deadline_seconds
    on_bad: str = _DEFAULTS.on_bad
    bad_budget: float = _DEFAULTS.bad_budget


class Loader(abc.ABC):
    """Base of both loaders: the slots, the service that reads, and the answers."""

    def __init__(
        self,
        setup: Setup,
        records: Records,
        options: LoaderOptions,
        *,
        slots: int,
        slot_bytes: int,
        device: torch.device | str,
    ) -> None:
        self.records = records
        self.options = options
        self.device = torch.device(device)
        #: Seconds that the consumer has waited for data.
        self.seconds_waiting = 0.0
        #: Counters of the memcached reader; other readers do not count.
        self.traffic = MemcachedTraffic(counts=options.reader.kind == "memcached")

        self._slots = [Slot.create("zoetrope-clips", slot_bytes) for _ in range(slots)]
        self._shorter: dict[int, int] = {}  # sample -> number of frames at its end that do not decode
        self._reported = 0  # number of digits of that count of videos in the last note
        self._number = 0  # id of the last task
        self._closed = False

        try:
            #: `service.trouble` is the reason why the run should stop and restart: its reader processes do not start.
            self.service: Service = (
                Pool(setup, records, self._slots, options.workers, options.deadline, stand_in=True)
                if options.workers
                else Inline(setup, records, self._slots)
            )
        except BaseException:
            # A memfd slot outlives a failed constructor unless it is closed here.
            self._close_slots()
            raise

    def close(self) -> None:
        """Stop the reader processes and release the memory. Tensors that were handed out stay valid."""
        if not self._closed:
            self._closed = True
            self.service.close()
            self._close_slots()

    def notes(self) -> list[str]:
        """Return log lines since the last call about the reader, other than bad samples."""
        count = len(self._shorter)
        if not count or len(str(count)) == self._reported:
            return []
        # Report at the first such video, then at ten, at a hundred, ...: one line per order of magnitude.
        self._reported = len(str(count))

        first = min(self._shorter)
        number = "1 video is" if count == 1 else f"{count} videos are"
        path = printable(self.records.path(first))

        return [
            f"shorter: {number} used without the last frames, which do not decode ({path}: the last "
            f"{self._shorter[first]}); main.py scan lists all of them"
        ]

    def _wish(self, sample: int) -> AsStored | None:
        """Return the request of a sample for stored bytes, or None for pixels; DALI's loaders have such requests."""
        return None

    def being_read(self) -> list[str]:
        """Return the samples that are being read now, for the watchdog. Safe from any thread."""
        samples = [sample for sample in map(self._sample_of, self.service.busy()) if sample is not None]
        return [f"sample {sample}: {self.records.path(sample)}" for sample in samples]

    def _reason(self, sample: int, answer: Answer) -> str:
        """Return why a video could not be read. For a missing file, add the full path that was tried."""
        full = self.records.full_path(sample)
        missing = not answer.timeout and not os.path.exists(full)
        return f"{answer.reason} (there is no {printable(full)})" if missing else answer.reason

    @abc.abstractmethod
    def _sample_of(self, request: int) -> int | None:
        """Return the record of a request, or None if the request has been answered."""

    def _begin(self) -> None:
        """Fill the slots. If that fails, stop the reader processes that were started."""
        try:
            self._ask_ahead()
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _ask_ahead(self) -> None:
        """Submit tasks until all slots are in use."""

    def __enter__(self) -> Self:
        return self  # `with` closes the loader, so that an exception leaves no reader process behind

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_slots(self) -> None:
        for slot in self._slots:
            slot.close()

    def _answers(self, *, wait: bool = True) -> list[Answer]:
        """Return the answers that have arrived, at least one with `wait`. Raise errors that no media file caused."""
        answers = self.service.answers() if wait else self.service.ready()
        if wait and not answers:
            raise RuntimeError("the loader waits for a clip that no process reads")

        for answer in answers:
            if answer.counters:
                self.traffic.add(answer.counters)
            if answer.missing and answer.plan is not None:
                self._shorter[answer.plan.sample] = answer.missing
            if answer.user:
                raise UserError(answer.user)
            if answer.bug:
                raise RuntimeError(f"reading failed in a way that is not the file's fault:\n{answer.bug}")
        return answers
