"""Move tensors between host and GPU without making the host wait.

A copy from ordinary memory, and every copy back that is read at once, makes the host wait until the GPU has finished
all queued work. Then the GPU is idle while the host queues the next work. On a CPU all functions are the identity.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device. The copy is queued on the current stream, from pinned memory."""
    if device.type == "cpu":
        return tensor
    # torch keeps a pinned block until the copies from it have finished.
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


@functools.cache
def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the tuple `values` as a tensor, the same object in each call. Never change it in place."""
    with torch.inference_mode(False):  # it outlives the caller, so it must be usable in training too
        tensor = to_device(torch.tensor(values, dtype=dtype), device)
    if tensor.is_cuda:
        torch.cuda.current_stream(device).synchronize()  # once, so that every stream may read it
    return tensor


class Readback:
    """A device tensor on its way to the host. It is copied once earlier work is done, in parallel with later work.

    Args:
        tensor: do not change it until `read`.
        work: a collective that fills the tensor; its `wait` must queue a wait on the current stream.
    """

    def __init__(self, tensor: Tensor, work: torch.distributed.Work | None = None) -> None:
        self._tensor, self._work = tensor, work
        self._copied: torch.cuda.Event | None = None

        if not tensor.is_cuda:
            return

        # A second stream: on the current one the copy would wait behind work that is queued later.
        side = _side_stream(tensor.device)
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            if work is not None:
                work.wait()
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(side)
        # The allocator must not reuse the memory before the copy on the side stream has finished.

        tensor.record_stream(side)

    def read(self) -> Tensor:
        """Wait for this copy only, not for later work; return the tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
            return self._host

        if self._work is not None:
            self._work.wait()
        return self._tensor


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Copy a tensor to the host. On a GPU this waits for work that was queued before, but not for later work."""
    return Readback(tensor).read().numpy()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class CopyStream:
    """A stream for the copies of batches, parallel to the computation on the current stream.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Queue the copies inside the block on this stream."""
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event:
        """Return an event that is reached when all copies so far are done."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Let the current stream use tensors that were copied on this one."""
        current = torch.cuda.current_stream(self.device)
        # The current stream waits, not the host.
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)


class PinnedPages:
    """Memory of other owners (shared with reader processes), pinned in place: the GPU copies straight from it."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def add(self, array: np.ndarray) -> bool:
        """Pin the pages of an array. Return False if the system refuses, because of a limit on locked memory."""
        # 0 is cudaHostRegisterDefault.
        code = _cuda_runtime().cudaHostRegister(array.ctypes.data, array.nbytes, 0)
        if int(code) == 0:
            self._arrays.append(array)
        return int(code) == 0

    def release(self, *, after_error: bool) -> None:
        """Unpin all pages.

        Args:
            after_error: keep them pinned and mapped until the process ends. Unpinning waits for the GPU, and after an
                error on one rank the GPU may wait for collectives that never end.
        """
        for array in self._arrays:
            if after_error:
                _kept_until_the_end.append(array)
            else:
                _cuda_runtime().cudaHostUnregister(array.ctypes.data)
        self._arrays.clear()


# References that keep the pages mapped for as long as they are pinned.
_kept_until_the_end: list[np.ndarray] = []


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()
