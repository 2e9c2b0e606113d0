"""Run DALI's jobs in the order of their submission, and recover when a run fails.

A failure ends DALI's pipeline and does not name the clip that caused it. So a new pipeline decodes the clips of the
failed run one by one, then all runs under way start again. Clips that decode are delivered, and the others are named.
If no clip of a codec can be decoded, this would build a pipeline for each clip: a `Breaker` gives up on the codec.
"""

from __future__ import annotations

import collections
import dataclasses

import torch

from datasets.dali.pipeline import FAILURES, Clip, Decoder, reason_of
from datasets.dali.sessions import Sessions
from datasets.loading.messages import Answer
from datasets.loading.slots import Slot
from utils.errors import UserError

#: Texts by which DALI and the driver report that the memory of the GPU is exhausted.
_OUT_OF_MEMORY = ("out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation", "std::bad_alloc")


@dataclasses.dataclass
class Job:
    """Clips of one form, and where they go.

    Attributes:
        clips: the clips to decode.
        outs: (T, h, w, 3) uint8 on the device, for each clip.
        names: the caller's number for each clip.
    """

    clips: list[Clip]
    outs: list[torch.Tensor]
    names: list[int]


def clip_of(answer: Answer, slot: Slot, offset: int) -> Clip:
    """Return the clip that an answer describes; its files lie in the slot one after the other."""
    stored = answer.stored
    assert stored is not None
    assert answer.plan is not None

    files, start = [], offset
    for length in stored.files:
        files.append(slot.view(start, (length,)))
        start += length

    return Clip(
        stored.form, files, stored.rows, stored.box, answer.plan.size, stored.codec, stored.matrix, stored.frame
    )


class Breaker:
    """Count decoded and failed clips by codec. DALI gets no more clips of a codec with failures and no success.

    Attributes:
        lines: messages for the log; the loader takes them out.
    """

    AFTER = 8  # failures without a success
    IN_A_RUN = 2  # clips of a failed run that are tried alone for a codec without a success: each costs a pipeline

    def __init__(self) -> None:
        self._decoded: collections.Counter[str] = collections.Counter()
        self._failed: collections.Counter[str] = collections.Counter()
        self._closed: set[str] = set()
        self.lines: list[str] = []

    def note(self, codec: str, *, decoded: bool, reason: str = "") -> None:
        """Count one clip. Give up on its codec after `AFTER` failures without a success."""
        (self._decoded if decoded else self._failed)[codec] += 1
        if not self._decoded[codec] and self._failed[codec] >= self.AFTER:
            self.give_up(codec, f"none of the first {self._failed[codec]} clips was decoded ({reason})")

    def give_up(self, codec: str, reason: str) -> None:
        """Send no clip of this codec to DALI from now on."""
        if codec not in self._closed:
            self._closed.add(codec)
            self.lines.append(f"dali: {codec} is decoded on the CPU from here on, {reason}")

    def has_decoded(self, codec: str) -> bool:
        """Return True if a clip of this codec has been decoded."""
        return self._decoded[codec] > 0

    @property
    def closed(self) -> list[str]:
        """Codecs that DALI no longer gets."""
        return sorted(self._closed)


class Queue:
    """Jobs of one form. `collect` returns them oldest first.

    Args:
        decoder: runs the jobs.
        breaker, sessions: shared by all queues of a loader.
    """

    def __init__(self, decoder: Decoder, breaker: Breaker, sessions: Sessions | None = None) -> None:
        self._decoder, self._breaker = decoder, breaker
        self._sessions = sessions or Sessions(None)
        # Each job, with the reasons of the clips that DALI does not get, by their number.
        self._jobs: collections.deque[tuple[Job, dict[int, str]]] = collections.deque()

    def submit(self, job: Job) -> None:
        """Start a job."""
        self._jobs.append((job, self._start(job)))

    def collect(self) -> list[tuple[int, str]]:
        """Finish the oldest job: write its clips into their places.

        Returns:
            (name, reason) of each clip that could not be decoded.

        Raises:
            UserError: the GPU has no memory left.
        """
        job, refused = self._jobs.popleft()
        left_out = [(job.names[i], reason) for i, reason in refused.items()]
        given = [i for i in range(len(job.clips)) if i not in refused]
        if not given:
            return left_out

        try:
            self._deliver(job, given)
            return left_out
        except FAILURES as error:
            failed = self._one_by_one(job, given, self._reason(error))

        # The failure ended the pipeline, and with it the runs of all later jobs.
        self._jobs = collections.deque((waiting, self._start(waiting)) for waiting, _ in self._jobs)
        return left_out + failed

    def close(self) -> None:
        """End the pipeline."""
        self._jobs.clear()
        self._decoder.close()

    def _start(self, job: Job) -> dict[int, str]:
        """Give DALI the clips that it decodes. Return the reason for each other clip, by its number in the job."""
        refused = {i: reason for i, clip in enumerate(job.clips) if (reason := self._refusal(clip))}
        given = [clip for i, clip in enumerate(job.clips) if i not in refused]
        if given:
            self._decoder.submit(given)
        return refused

    def _refusal(self, clip: Clip) -> str | None:
        """Return why DALI does not get a clip, or None if it does."""
        if clip.codec in self._breaker.closed:
            return "DALI does not decode such clips here"
        # JPEG images need no session.
        return self._sessions.refusal(clip.codec, clip.frame) if clip.form == "video" else None

    def _deliver(self, job: Job, given: list[int]) -> None:
        self._decoder.deliver([job.outs[i] for i in given])
        for i in given:
            self._breaker.note(job.clips[i].codec, decoded=True)

    def _one_by_one(self, job: Job, given: list[int], reason: str) -> list[tuple[int, str]]:
        """Decode the clips of a failed run one by one. Return (name, reason) of those that fail again."""
        self._decoder.restart()
        failed: list[tuple[int, str]] = []

        # A run of one clip is named already: no need to try it again.
        if len(given) == 1:
            self._breaker.note(job.clips[given[0]].codec, decoded=False, reason=reason)
            return [(job.names[given[0]], reason)]

        tried: collections.Counter[str] = collections.Counter()
        for i in given:
            codec = job.clips[i].codec
            # A codec that has never worked gets few tries, since each failure costs another pipeline.
            if tried[codec] < Breaker.IN_A_RUN or self._breaker.has_decoded(codec):
                try:
                    self._decoder.submit([job.clips[i]])
                    self._deliver(job, [i])
                    continue
                except FAILURES as error:
                    reason = self._reason(error)
                    self._decoder.restart()
                    tried[codec] += 1

            self._breaker.note(codec, decoded=False, reason=reason)
            failed.append((job.names[i], reason))
        return failed

    def _reason(self, error: BaseException) -> str:
        # No retry helps against a full GPU memory, so the user has to change a setting.
        if any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise UserError(
                "data.reader: dali: the decoder ran out of memory, which holds the whole frames of a batch next to the "
                f"model ({reason_of(error)}): lower common.batch_size or data.prefetch, dump smaller videos, or set "
                "data.reader: video"
            ) from error
        return reason_of(error)
