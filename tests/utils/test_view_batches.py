from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import view_batches
from utils.errors import UserError

CPU = torch.device("cpu")
VIEWS = torch.arange(30 * 6, dtype=torch.uint8).reshape(30, 1, 1, 2, 3)


def crop_views(start: int, stop: int) -> torch.Tensor:
    return VIEWS[start:stop]


def total(clips: torch.Tensor) -> torch.Tensor:
    return clips.float().sum((1, 2, 3, 4)).unsqueeze(1)  # (n, 1)


@pytest.mark.parametrize("size", [1, 7, 30, 64, None])
def test_every_view_once_and_in_order(size: int | None) -> None:
    seen: list[int] = []

    def forward(clips: torch.Tensor) -> torch.Tensor:
        seen.append(len(clips))
        return total(clips)

    scores = view_batches.ViewBatcher(forward, CPU, size=size).run(crop_views, 30)
    assert torch.equal(scores, total(VIEWS))
    assert sum(seen) == 30 + (size is None), "the view that is measured is run once more"
    assert max(seen) <= (size or view_batches.MOST)


def test_several_videos_share_a_chunk() -> None:
    pieces = [
        (lambda a, b: VIEWS[a:b], 4),
        (lambda a, b: VIEWS[4 + a : 4 + b], 1),
        (lambda a, b: VIEWS[5 + a : 5 + b], 9),
    ]
    joined, views = view_batches.joined(pieces)
    assert views == 14
    for size in (1, 3, 5, 14):
        assert torch.equal(view_batches.ViewBatcher(total, CPU, size=size).run(joined, views), total(VIEWS[:14]))


def test_a_size_is_found_by_measuring() -> None:
    """The largest chunk whose maps stay in the cache, of those that divide the views evenly; one view more is run."""
    seen: list[int] = []
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 2**20), torch.nn.Linear(2**20, 1))  # 4 MiB a view

    def forward(clips: torch.Tensor) -> torch.Tensor:
        seen.append(len(clips))
        return net(clips.float())

    before = torch.get_num_threads()
    try:
        for threads, size in ((1, 3), (2, 6)):  # 4 and 8 would fit
            torch.set_num_threads(threads)
            seen.clear()
            runner = view_batches.ViewBatcher(forward, CPU, net=net)
            runner.run(crop_views, 30)
            assert runner.size == size
            assert seen == [1] + [size] * (30 // size)
    finally:
        torch.set_num_threads(before)
    assert not any(layer._forward_hooks for layer in net.modules())


def test_the_end_of_a_list_is_filled_up() -> None:
    seen: list[int] = []

    def forward(clips: torch.Tensor) -> torch.Tensor:
        seen.append(len(clips))
        return total(clips)

    runner = view_batches.ViewBatcher(forward, CPU, size=4)
    assert torch.equal(runner.run(crop_views, 6, 8), total(VIEWS[:6]))
    assert torch.equal(runner.run(crop_views, 1, 8), total(VIEWS[:1]))
    assert torch.equal(runner.run(crop_views, 3, 3), total(VIEWS[:3]))
    assert seen == [4, 4, 4, 3]


def test_bits_do_not_depend_on_the_neighbours() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv3d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv3d(16, 8, (1, 3, 3))).eval()
    views = torch.randint(0, 256, (8, 4, 20, 20, 3), dtype=torch.uint8)

    def forward(clips: torch.Tensor) -> torch.Tensor:
        return net(clips.permute(0, 4, 1, 2, 3).float()).mean((2, 3, 4))

    with torch.inference_mode():
        runner = view_batches.ViewBatcher(forward, CPU, size=4)
        whole = runner.run(lambda start, stop: views[start:stop], 8)
        for first in range(8):
            rest = runner.run(lambda start, stop, first=first: views[first + start : first + stop], 8 - first, 8)
            assert torch.equal(rest, whole[first:])


def too_large(most: int):
    """A network whose feature maps fit for `most` views only: beyond, the allocator really refuses."""

    def forward(clips: torch.Tensor) -> torch.Tensor:
        if len(clips) > most:
            torch.empty(2**60, dtype=torch.uint8)
        return total(clips)

    return forward


def test_memory_runs_out_and_the_run_goes_on() -> None:
    messages: list[str] = []
    runner = view_batches.ViewBatcher(too_large(3), CPU, size=24, say=messages.append)
    assert torch.equal(runner.run(crop_views, 30), total(VIEWS))
    assert runner.size == 3
    assert messages == [f"memory ran out with {n} views at once; continuing with {n // 2}" for n in (24, 12, 6)]


def test_one_view_that_does_not_fit_is_an_error_with_advice() -> None:
    with pytest.raises(UserError, match="one view alone does not fit .* --crop-size"):
        view_batches.ViewBatcher(too_large(0), CPU, size=8, say=lambda text: None).run(crop_views, 30)


def test_other_errors_are_not_hidden() -> None:
    def forward(clips: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        view_batches.ViewBatcher(forward, CPU, size=8).run(crop_views, 30)


LIMITED = """
import resource, torch
torch.set_num_threads(1)
from utils import view_batches
net = torch.nn.Conv3d(3, 64, 3, padding=1).eval()
def forward(clips):
    return net(clips.permute(0, 4, 1, 2, 3).float()).mean((2, 3, 4))
views = torch.randint(0, 256, (16, 8, 64, 64, 3), dtype=torch.uint8)
with torch.inference_mode():
    expected = torch.cat([forward(view[None]) for view in views])
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, -1))  # a view takes 8 MiB here, 16 views 128
    runner = view_batches.ViewBatcher(forward, torch.device("cpu"), size=16)
    scores = runner.run(lambda a, b: views[a:b], 16)
assert runner.size < 16, runner.size
print(((scores - expected).abs().max() / expected.abs().max()).item(), runner.size)
"""


def test_a_process_at_its_limit_of_memory(repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=repo_root, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "memory ran out with 16 views at once" in done.stdout
    assert float(done.stdout.splitlines()[-1].split()[0]) <= 1e-6


def test_full_precision_switches_tf32_off_and_nothing_else() -> None:
    """Not so `cudnn.flags(allow_tf32=False)`, which switches cuDNN off with it."""
    backend = torch.backends.cudnn
    benchmark = backend.benchmark
    backend.benchmark = True
    try:
        with view_batches.full_precision():
            assert (backend.enabled, backend.benchmark, backend.allow_tf32) == (True, True, False)
        assert (backend.enabled, backend.benchmark, backend.allow_tf32) == (True, True, True)
        with pytest.raises(ValueError, match="inside"), view_batches.full_precision():
            raise ValueError("inside")
        assert backend.allow_tf32
    finally:
        backend.benchmark = benchmark


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("FIND was unable to find an engine to execute this computation", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory", True),
        ("could not create a memory object", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False),
        ("Expected all tensors to be on the same device", False),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED", False),
    ],
)
def test_memory_that_ran_out_is_known_by_its_texts(text: str, expected: bool) -> None:
    assert view_batches.is_out_of_memory(RuntimeError(text)) is expected


def test_no_engine_for_one_view_is_no_matter_of_memory() -> None:
    def forward(clips: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    messages: list[str] = []
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        view_batches.ViewBatcher(forward, CPU, size=4, say=messages.append).run(crop_views, 4)
    assert len(messages) == 2  # 4, 2, then 1 and the error itself
