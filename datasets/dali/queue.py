"""Runs of DALI in the order in which they were asked for, and what happens when one of them fails.

A failure ends DALI's pipeline and says nothing of the clip that caused it. So all that was under way is started again
in a fresh pipeline, the clips of the failed run one by one: every clip that decodes is delivered, the others are named.
"""

from __future__ import annotations

import collections
import dataclasses

import torch

from datasets.dali.pipeline import FAILURES, Clip, Decoder, reason_of
from datasets.pool import Answer
from datasets.slots import Slot


@dataclasses.dataclass
class Job:
    """Clips of one form and shape, and where they go.

    Attributes:
        clips: what to decode.
        out: (B, T, h, w, 3) uint8 on the device.
        at: row of `out` for each clip.
    """

    clips: list[Clip]
    out: torch.Tensor
    at: list[int]


def clip_of(answer: Answer, slot: Slot, offset: int) -> Clip:
    """What an answer's clip is decoded from; its bytes lie in the slot one behind the other."""
    files, start = [], offset
    for length in answer["files"]:
        files.append(slot.view(start, (length,)))
        start += length
    rows = torch.tensor(answer["rows"], dtype=torch.int32).numpy()
    x1, y1, x2, y2 = answer["box"]
    return Clip(answer["form"], files, rows, (x1, y1, x2, y2), (answer["size"][0], answer["size"][1]))


class Queue:
    """Jobs of one form. `collect` gives them back oldest first.

    Args:
        decoder: runs the jobs.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._jobs: collections.deque[Job] = collections.deque()

    def submit(self, job: Job) -> None:
        """Start a job."""
        self._jobs.append(job)
        self._decoder.submit(job.clips)

    def collect(self) -> list[tuple[int, str]]:
        """Finish the oldest job: fill its rows of `out`.

        Returns:
            (row of `out`, reason) of each clip that could not be decoded.
        """
        job = self._jobs.popleft()
        try:
            self._copy(job.out, job.at)
            return []
        except FAILURES as error:
            failed = [(row, reason_of(error)) for row in job.at]
        self._decoder.restart()
        if len(job.clips) > 1:
            pairs = zip(job.clips, job.at, strict=True)
            failed = [trouble for clip, row in pairs for trouble in self._alone(clip, row, job.out)]
        for waiting in self._jobs:
            self._decoder.submit(waiting.clips)
        return failed

    def close(self) -> None:
        """End the pipeline."""
        self._jobs.clear()
        self._decoder.close()

    def _alone(self, clip: Clip, row: int, out: torch.Tensor) -> list[tuple[int, str]]:
        try:
            self._decoder.submit([clip])
            self._copy(out, [row])
            return []
        except FAILURES as error:
            self._decoder.restart()
            return [(row, reason_of(error))]

    def _copy(self, out: torch.Tensor, at: list[int]) -> None:
        with torch.cuda.stream(self._decoder.stream), self._decoder.oldest() as pixels:  # type: ignore[arg-type]
            if len(at) == len(out):
                out.copy_(pixels)
            else:
                out[torch.tensor(at, device=out.device)] = pixels
