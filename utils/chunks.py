"""How many views of an evaluation go through the network at once: found by measuring, halved when memory runs out.

On a CPU few views are fastest, because their feature maps stay in its caches; on a GPU many are. What is measured is
the evaluation itself: sizes 1, 2, 4, ... take their turn with the first views, as long as a larger one is worth it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.faults import UserError

MOST = 64  # views at once; no device that we know gains from more
GROUP = {"cpu": 4, "cuda": 32}  # views of several videos that are collected before they are run
_WORTH = 0.97  # a larger size is kept if a view then takes less than this share of the time
_MEMORY_SHARE = 0.8  # of a GPU's free memory that a chunk may be expected to take


class Chunks:
    """Runs views through a network a chunk at a time.

    Args:
        forward: (n, T, h, w, C) uint8 on the device -> scores (n, K) float32.
        device: where it runs.
        size: views at once; None to find it by measuring.
        most: upper limit while measuring.
        say: where to tell that memory ran out.

    Attributes:
        size: views at once now.
        group: views that are worth collecting from several videos before they are run; the same on all ranks.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        size: int | None = None,
        most: int = MOST,
        say: Callable[[str], None] = print,
    ) -> None:
        self.forward, self.device, self.say = forward, device, say
        self.size, self.group = size or 1, size or GROUP.get(device.type, 32)
        self._most = size or most
        self._measuring = size is None
        self._warm = False
        self._best = float("inf")  # seconds per view at the size before
        self._used = 0.0  # bytes per view, on a GPU

    def run(self, cut: Callable[[int, int], Tensor], views: int) -> Tensor:
        """Scores of all views.

        Args:
            cut: gives views start..stop-1 as (n, T, h, w, C) uint8 on the device; called once per chunk, so that not
                all views are in memory at once.
            views: V.

        Returns:
            (V, K) float32.

        Raises:
            UserError: not even one view fits into memory.
        """
        parts: list[Tensor] = []
        start = 0
        while start < views:
            stop = min(start + self.size, views)
            try:
                parts.append(self._timed(cut, start, stop) if self._measuring else self.forward(cut(start, stop)))
                start = stop
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(stop - start, error)
            if start < stop and self.device.type == "cuda":
                torch.cuda.empty_cache()  # out here, since the error holds on to the tensors of the failed pass
        return torch.cat(parts)

    def _timed(self, cut: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
        """Run a chunk; after it take the next larger size, or settle for the best one."""
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self._begin_memory()
        began = clock()
        scores = self.forward(cut(start, stop))
        self._wait()
        count = stop - start
        seconds = (clock() - began) / count
        if count < self.size:  # the end of a video says nothing about a full chunk
            return scores
        if not self._warm:  # the first pass prepares the weights and the allocator
            self._warm = True
        elif seconds > _WORTH * self._best:
            self._settle(max(1, self.size // 2))
        elif 2 * self.size > self._most or not self._has_room(count):
            self._settle(self.size)
        else:
            self._best, self.size = seconds, 2 * self.size
        return scores

    def _settle(self, size: int) -> None:
        self.size, self._measuring = size, False

    def _halve(self, tried: int, error: Exception) -> None:
        if tried == 1:
            raise UserError(
                f"one view alone does not fit into the memory of this {self.device.type} ({error}): take a smaller "
                "--crop-size, or fewer frames in a clip"
            ) from error
        self._settle(max(1, tried // 2))
        self.say(f"memory ran out with {tried} views at once; going on with {self.size}")

    def _begin_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._used = float(torch.cuda.memory_allocated(self.device))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _has_room(self, count: int) -> bool:
        """Whether twice as many views can be expected to fit."""
        if self.device.type != "cuda":
            return True
        used = torch.cuda.max_memory_allocated(self.device) - self._used
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - self._used
        return 2 * used < _MEMORY_SHARE * free


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors with which PyTorch and oneDNN say that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("DefaultCPUAllocator", "std::bad_alloc", "could not create a memory", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def joined(pieces: Sequence[tuple[Callable[[int, int], Tensor], int]]) -> tuple[Callable[[int, int], Tensor], int]:
    """One `cut` over the views of several videos, and their number.

    Args:
        pieces: (cut, views) of each video.
    """
    if len(pieces) == 1:
        return pieces[0]
    starts = [0]
    for _, views in pieces:
        starts.append(starts[-1] + views)

    def cut(start: int, stop: int) -> Tensor:
        parts = []
        for (own, views), first in zip(pieces, starts, strict=False):
            low, high = max(start, first), min(stop, first + views)
            if low < high:
                parts.append(own(low - first, high - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return cut, starts[-1]
