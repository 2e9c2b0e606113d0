from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import chunks
from utils.faults import UserError

CPU = torch.device("cpu")
VIEWS = torch.arange(30 * 6, dtype=torch.uint8).reshape(30, 1, 1, 2, 3)


def cut(start: int, stop: int) -> torch.Tensor:
    return VIEWS[start:stop]


def total(clips: torch.Tensor) -> torch.Tensor:
    return clips.float().sum((1, 2, 3, 4)).unsqueeze(1)  # (n, 1)


@pytest.mark.parametrize("size", [1, 7, 30, 64, None])
def test_every_view_once_and_in_order(size: int | None) -> None:
    seen: list[int] = []

    def forward(clips: torch.Tensor) -> torch.Tensor:
        seen.append(len(clips))
        return total(clips)

    scores = chunks.Chunks(forward, CPU, size=size).run(cut, 30)
    assert torch.equal(scores, total(VIEWS))
    assert sum(seen) == 30
    assert max(seen) <= (size or chunks.MOST)


def test_several_videos_share_a_chunk() -> None:
    pieces = [
        (lambda a, b: VIEWS[a:b], 4),
        (lambda a, b: VIEWS[4 + a : 4 + b], 1),
        (lambda a, b: VIEWS[5 + a : 5 + b], 9),
    ]
    joined, views = chunks.joined(pieces)
    assert views == 14
    for size in (1, 3, 5, 14):
        assert torch.equal(chunks.Chunks(total, CPU, size=size).run(joined, views), total(VIEWS[:14]))


def test_a_size_is_found_by_measuring() -> None:
    def best_at_four(clips: torch.Tensor) -> torch.Tensor:
        work = {1: 4, 2: 2, 4: 1}.get(len(clips), 8)  # units of work for each view
        for _ in range(work * len(clips)):
            torch.ones(400, 400) @ torch.ones(400, 400)
        return total(clips)

    runner = chunks.Chunks(best_at_four, CPU)
    for _ in range(2):
        runner.run(cut, 30)
    assert runner.size == 4


def too_large(most: int):
    """A network whose feature maps fit for `most` views only: beyond, the allocator really refuses."""

    def forward(clips: torch.Tensor) -> torch.Tensor:
        if len(clips) > most:
            torch.empty(2**60, dtype=torch.uint8)
        return total(clips)

    return forward


def test_memory_runs_out_and_the_run_goes_on() -> None:
    said: list[str] = []
    runner = chunks.Chunks(too_large(3), CPU, size=24, say=said.append)
    assert torch.equal(runner.run(cut, 30), total(VIEWS))
    assert runner.size == 3
    assert said == [f"memory ran out with {n} views at once; going on with {n // 2}" for n in (24, 12, 6)]
    measured = chunks.Chunks(too_large(2), CPU, say=said.append)
    assert torch.equal(measured.run(cut, 30), total(VIEWS))
    assert measured.size <= 2


def test_one_view_that_does_not_fit_is_an_error_with_advice() -> None:
    with pytest.raises(UserError, match="one view alone does not fit .* --crop-size"):
        chunks.Chunks(too_large(0), CPU, size=8, say=lambda text: None).run(cut, 30)


def test_other_errors_are_not_hidden() -> None:
    def forward(clips: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        chunks.Chunks(forward, CPU, size=8).run(cut, 30)


LIMITED = """
import resource, torch
torch.set_num_threads(1)
from utils import chunks
net = torch.nn.Conv3d(3, 64, 3, padding=1).eval()
def forward(clips):
    return net(clips.permute(0, 4, 1, 2, 3).float()).mean((2, 3, 4))
views = torch.randint(0, 256, (16, 8, 64, 64, 3), dtype=torch.uint8)
with torch.inference_mode():
    expected = torch.cat([forward(view[None]) for view in views])
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, -1))  # a view takes 8 MiB here, 16 views 128
    runner = chunks.Chunks(forward, torch.device("cpu"), size=16)
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
