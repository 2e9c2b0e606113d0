"""How media are read, and what the training and the evaluation loader share: slots, workers, answers."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from datasets.lists.records import Records
from datasets.loading.bad_media import printable
from datasets.loading.messages import Answer, AsStored
from datasets.loading.pool import Inline, Pool, Service
from datasets.loading.slots import Slot
from datasets.loading.workers import Setup
from datasets.memcached.report import Traffic
from datasets.readers.spec import ReaderSpec
from utils.config.schema import Data
from utils.faults import UserError

if TYPE_CHECKING:
    from typing_extensions import Self


_DEFAULTS = Data()


@dataclasses.dataclass(frozen=True)
class Reading:
    """How media are read; the same for training and evaluation.

    Attributes:
        reader: which reader.
        workers: reader processes; 0 = inline.
        prefetch: steps (training) or videos (evaluation) that are read ahead.
        deadline: seconds one sample may take (not enforced inline).
        on_bad: "error", "skip" or "substitute"; an evaluation never substitutes.
        bad_budget: largest share of unreadable videos.

    Defaults are those of the config keys, which `utils/config/schema.py` alone knows.
    """

    reader: ReaderSpec
    workers: int = 0
    prefetch: int = _DEFAULTS.prefetch
    deadline: float = _DEFAULTS.deadline_seconds
    on_bad: str = _DEFAULTS.on_bad
    bad_budget: float = _DEFAULTS.bad_budget


class Loader(abc.ABC):
    """Shared by both loaders: slots, the service that reads, and the answers that came early."""

    _wish: Callable[[int], AsStored | None] | None = None  # which sample shall come as stored bytes

    def __init__(
        self,
        setup: Setup,
        records: Records,
        reading: Reading,
        *,
        slots: int,
        slot_bytes: int,
        device: torch.device | str,
    ) -> None:
        self.records = records
        self.reading = reading
        self.device = torch.device(device)
        #: Time that the consumer spent waiting for data, in seconds.
        self.seconds_waiting = 0.0
        #: What readers that count have counted.
        self.traffic = Traffic(counts=reading.reader.kind == "memcached")
        self._slots = [Slot.create("zoetrope-clips", slot_bytes) for _ in range(slots)]
        self._shorter: dict[int, int] = {}  # sample -> frames at its end that do not decode
        self._reported = 0  # digits of the number of such videos in the last note
        self._number = 0  # of the last task
        self._closed = False
        try:
            #: `service.trouble` says why the run should stop and start again: reader processes that do not start.
            self.service: Service = (
                Pool(setup, records, self._slots, reading.workers, reading.deadline, stand_in=True)
                if reading.workers
                else Inline(setup, records, self._slots)
            )
        except BaseException:
            self._close_slots()
            raise

    def close(self) -> None:
        """Stop the reader processes and give the memory back; tensors that were handed out stay valid."""
        if not self._closed:
            self._closed = True
            self.service.close()
            self._close_slots()

    def notes(self) -> list[str]:
        """Return lines for the log since the last call: what the reader reports, other than bad samples."""
        count = len(self._shorter)
        if not count or len(str(count)) == self._reported:
            return []
        self._reported = len(str(count))  # at the first such video, then at ten, at a hundred
        first = min(self._shorter)
        number = "1 video is" if count == 1 else f"{count} videos are"
        path = printable(self.records.path(first))
        return [
            f"shorter: {number} used without the last frames, which do not decode ({path}: the last "
            f"{self._shorter[first]}); main.py scan lists all of them"
        ]

    def being_read(self) -> list[str]:
        """Samples that are being read at this moment, for the watchdog; any thread may ask."""
        samples = [sample for sample in map(self._sample_of, self.service.busy()) if sample is not None]
        return [f"sample {sample}: {self.records.path(sample)}" for sample in samples]

    def _reason(self, sample: int, answer: Answer) -> str:
        """Return why a video could not be read; of a missing one also where it was looked for."""
        full = self.records.full_path(sample)
        missing = not answer.timeout and not os.path.exists(full)
        return f"{answer.reason} (there is no {printable(full)})" if missing else answer.reason

    @abc.abstractmethod
    def _sample_of(self, request: int) -> int | None:
        """The record that a request is about; None if it was answered meanwhile."""

    def _begin(self) -> None:
        """Fill the slots; what was started is stopped if that fails."""
        try:
            self._ask_ahead()
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _ask_ahead(self) -> None:
        """Ask for what the slots have room for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_slots(self) -> None:
        for slot in self._slots:
            slot.close()

    def _answers(self, *, wait: bool = True) -> list[Answer]:
        """Return the answers that are there, at least one with `wait`; raise what is not the media's fault."""
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
