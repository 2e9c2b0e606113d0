"""Choose how many views of an evaluation go through the network at once, by measuring memory.

The measure is memory, not time, so that the same evaluation takes the same chunks again and gives the same bits, even
after it was killed. On a CPU a chunk keeps the largest feature map in the caches; on a GPU it fills the memory. The
last bits of a view's scores depend on the number of views in its chunk, not on the other views, so a chunk that is not
full is padded. A chunk is halved when memory runs out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from utils.errors import UserError

MOST = 64  # views at once; no device that we know gains from more
GROUP = {"cpu": 4, "cuda": 32}  # views of several videos that are collected before they run
_CACHE = 2**24  # bytes of the largest feature map for each CPU thread: measured, docs/evaluation.md
_MEMORY_SHARE = 0.5  # share of a GPU's free memory that a chunk may take

# How PyTorch's allocators, oneDNN, cuDNN and cuBLAS report that memory ran out. cuDNN finds no engine if each needs
# more workspace than is left, and also for shapes that it does not support. A single view tells the two apart.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "could not create a memory",
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
)
_NOT_ONLY_MEMORY = "unable to find an engine"

CropViews = Callable[[int, int], Tensor]


class ViewBatcher:
    """Runs views through a network a chunk at a time.

    Args:
        forward: (n, T, h, w, C) uint8 on the device -> scores (n, K) float32.
        device: where it runs.
        size: views at once; None to measure it with the first view.
        net: the network whose feature maps are measured on a CPU.
        say: called with one sentence when memory ran out.

    Attributes:
        size: current number of views at once.
        group: views that are worth collecting from several videos before they run; the same on all ranks.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        size: int | None = None,
        net: nn.Module | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.forward, self.device, self.net, self.say = forward, device, net, say
        self.size, self.group = size or 1, size or GROUP.get(device.type, 32)
        self._unknown = size is None

    def run(self, crop_views: CropViews, views: int, full: int | None = None) -> Tensor:
        """Return the scores of all views.

        Args:
            crop_views: returns views start..stop-1 as (n, T, h, w, C) uint8 on the device; called once per chunk, so
                that not all views are in memory at once.
            views: V.
            full: the usual number of views, if fewer are left at the end of the list.

        Returns:
            (V, K) float32.

        Raises:
            UserError: not even one view fits into memory.
        """
        if self._unknown:
            self.size, self._unknown = self._measured(crop_views, full or views), False

        parts: list[Tensor] = []
        start = 0
        while start < views:
            stop = min(start + self.size, views)

            # The rest at the end of the list runs padded to the usual size, for the same bits.
            count = min(self.size, full) if full and views < full else 0
            try:
                parts.append(self._filled(crop_views(start, stop), count))
                start = stop
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(stop - start, error)

            # Not in the handler above: there the error still holds the tensors of the failed pass.
            if start < stop and self.device.type == "cuda":
                torch.cuda.empty_cache()

        return torch.cat(parts)

    def _filled(self, clips: Tensor, count: int) -> Tensor:
        """Return the scores of a chunk, which runs with at least `count` views."""
        missing = count - len(clips)
        if missing <= 0:
            return self.forward(clips)

        # Repeat the last clip and drop its scores: (count, T, h, w, C) -> (count, K) -> (n, K).
        return self.forward(torch.cat([clips, clips[-1:].expand(missing, *clips.shape[1:])]))[: len(clips)]

    def _measured(self, crop_views: CropViews, full: int) -> int:
        """Run the first view to measure its memory, and divide the usual number of views into equal chunks."""
        try:
            most = self._that_fit(crop_views(0, 1))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            most = 1  # `run` meets the same error and reports it

        return max(n for n in range(1, max(1, min(most, full, MOST)) + 1) if full % n == 0)

    def _that_fit(self, view: Tensor) -> int:
        if self.device.type == "cuda":
            # The difference between two views and one: workspaces of cuDNN and cuBLAS exist once, not for each view.
            one, two = (self._peak(views) for views in (view, torch.cat([view, view])))
            each = max(two - one, 1)

            held = torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - held
            return int((_MEMORY_SHARE * free - max(one - each, 0)) / each)

        with LargestMap(self.net) as largest:
            self.forward(view)
        return int(_CACHE * torch.get_num_threads() / max(largest.bytes, 1))

    def _peak(self, views: Tensor) -> int:
        """Return the bytes that a forward pass needs at its peak, beyond what was allocated before."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.forward(views)
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _halve(self, tried: int, error: Exception) -> None:
        if tried == 1 and _NOT_ONLY_MEMORY in str(error):  # a shape that cuDNN does not support
            raise error
        if tried == 1:
            raise UserError(
                f"one view alone does not fit into the memory of this {self.device.type} ({error}): use a smaller "
                "--crop-size, or fewer frames in a clip"
            ) from error

        self.size = max(1, tried // 2)
        self.say(f"memory ran out with {tried} views at once; continuing with {self.size}")


class LargestMap:
    """A context manager that notes the size of the largest tensor that any layer returns.

    Attributes:
        bytes: its size.
    """

    def __init__(self, net: nn.Module | None) -> None:
        self.net, self.bytes = net, 0

    def __enter__(self) -> LargestMap:
        layers = self.net.modules() if self.net is not None else ()
        self._hooks = [layer.register_forward_hook(self._note) for layer in layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, _layer: nn.Module, _arguments: object, answer: Tensor) -> None:
        if isinstance(answer, Tensor):
            self.bytes = max(self.bytes, answer.numel() * answer.element_size())


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Run float32 convolutions without TF32, which PyTorch allows by default.

    TF32 has 10 bits of mantissa: the scores of a view would depend on the kernel that cuDNN picks for the size of a
    chunk. All other settings of cuDNN keep their values.
    """
    # Not `cudnn.flags(allow_tf32=False)`: it switches off what it is not given, cuDNN itself included (torch 2.13).
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for the errors with which PyTorch and its libraries report that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def joined(pieces: Sequence[tuple[CropViews, int]]) -> tuple[CropViews, int]:
    """Return one `crop_views` over the views of several videos, and their number.

    Args:
        pieces: (crop_views, views) of each video.
    """
    if len(pieces) == 1:
        return pieces[0]

    starts = [0]
    for _, views in pieces:
        starts.append(starts[-1] + views)

    def crop_views(start: int, stop: int) -> Tensor:
        parts = []
        for (cut_video, views), first in zip(pieces, starts, strict=False):
            # The part of start..stop-1 that lies in this video, counted from the video's first view.
            low, high = max(start, first), min(stop, first + views)
            if low < high:
                parts.append(cut_video(low - first, high - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return crop_views, starts[-1]
