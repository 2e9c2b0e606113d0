"""Memory of a step on the CPU: freed tensors stay with the process, so that the next step gets no new pages.

glibc hands a large block back to the kernel when it is freed, and the kernel clears each page that it gives out again.
A step allocates and frees all its activations: for MobileNetV2 that was half of the CPU time. Blocks of 4 MiB and more
still go back: if kept, they break into pieces that fit nothing, and the peak rises by a fifth. The end of
the heap goes back too when more than 256 MiB of it are free. Otherwise blocks of 4 MiB and more move into the heap step
by step, and the peak rises by a tenth.

What is handed back comes in huge pages (2 MiB) where the kernel gives them on request: one page fault instead of 512.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

# Numbers of <malloc.h>, and values below 2^31, since mallopt() takes an int.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_CHOSEN = ((_TRIM_THRESHOLD, 256 * 2**20), (_TOP_PAD, 2**20), (_MMAP_THRESHOLD, 4 * 2**20))
_USERS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Let PyTorch ask the kernel for huge pages. Call this before the first tensor: PyTorch reads the variable there.

    A variable that the user has set stays. A kernel that gives no pages on request would make PyTorch warn.
    """
    with contextlib.suppress(OSError):  # no such file, or a container that hides it
        if "[madvise]" in _HUGE_PAGES.read_text():
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Let malloc() of this process keep what is freed.

    Returns:
        False if nothing was changed: no glibc, or the user has chosen an allocator or its numbers.
    """
    if any(os.environ.get(name) for name in _USERS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  musl has a mallopt() too, with different numbers
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in _CHOSEN)
