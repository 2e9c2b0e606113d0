"""Bound the memory of the decoder sessions that DALI keeps on a GPU.

An NVDEC session fits one codec and one frame size. DALI 2.4 keeps each session for the life of the process, up to 100,
and has no call that releases them. Their memory lies outside PyTorch's allocator, so a list with many frame sizes would
fill the GPU in the middle of an epoch. `Sessions` therefore estimates the memory of each new frame size first, and
refuses a size that does not fit.
"""

from __future__ import annotations

import torch

from datasets.dali.pipeline import THREADS

#: Most sessions that DALI keeps.
MOST = 100
#: Surfaces of a session: the number that DALI uses if a stream names none, and two for output.
SURFACES = 20 + 2
#: Share of the GPU's memory that all sessions together may take.
SHARE = 1 / 4


class Sessions:
    """Decide which frame sizes are sent to DALI. The estimate is an upper bound, so it needs no GPU.

    Args:
        budget: bytes that all sessions may take; None sets no limit (on the CPU, where DALI keeps no sessions).
        at_once: clips that DALI decodes concurrently. It can open as many sessions of one size.
    """

    def __init__(self, budget: int | None, at_once: int = THREADS["mixed"]) -> None:
        self._budget, self._at_once = budget, at_once
        self._admitted: set[tuple[str, int, int]] = set()

    def refusal(self, codec: str, frame: tuple[int, int]) -> str | None:
        """Return why clips of this codec and (height, width) are decoded on the CPU; None if DALI decodes them.

        The answer for a size never changes.
        """
        size = (codec, *frame)
        if self._budget is None or size in self._admitted:
            return None
        # Sessions are never released, so the sizes admitted before still take their memory.
        if self._bytes({*self._admitted, size}) > self._budget:
            return f"decoders of one more frame size would take more than {self._budget >> 20} MiB of the GPU"
        self._admitted.add(size)
        return None

    def _bytes(self, sizes: set[tuple[str, int, int]]) -> int:
        """Return the most memory that sessions of these sizes can take while DALI keeps at most `MOST` of them."""
        each = sorted((session_bytes(height, width) for _, height, width in sizes), reverse=True)
        return sum([one for one in each for _ in range(self._at_once)][:MOST])


def session_bytes(height: int, width: int) -> int:
    """Return the bytes of one session: surfaces of whole 16x16 macroblocks at 12 bits per pixel (4:2:0)."""
    return SURFACES * (-(-height // 16) * 16) * (-(-width // 16) * 16) * 3 // 2


def of(device: torch.device) -> Sessions:
    """Return the sessions of this process on a device."""
    if device.type != "cuda":
        return Sessions(None)
    return Sessions(int(SHARE * torch.cuda.get_device_properties(device).total_memory))
