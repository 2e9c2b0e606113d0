"""Freed memory stays with a process that trains on the CPU."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiment import make
from utils import allocator

ROOT = Path(__file__).resolve().parents[2]
# Two steps that take blocks of 1 to 3 MiB and free them in the reverse order, as a backward pass does with activations:
# page faults of the second. Without huge pages (prctl 41), since a kernel that has some free counts one fault for 512
# pages.
STEPS = """
import ctypes, resource, sys, torch
from utils import allocator
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
print(allocator.keep_freed_memory() if sys.argv[1] == "kept" else None)
for step in range(2):
    blocks = [torch.empty(2**18 + k % 5 * 2**17).fill_(step) for k in range(100)]
    while blocks:
        blocks.pop()
    if step == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
# Takes and gives back blocks of 8 MiB, which malloc() hands back to the kernel: page faults, and kB in huge pages.
LARGE = """
import resource, sys, torch
import main
from pathlib import Path
if sys.argv[1] == "train":
    assert main.train(Path(sys.argv[2])) == 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = torch.empty(2**21).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")


def faults(how: str, **variables: str) -> tuple[str, int, int]:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    is_kept, count, peak = done.stdout.split()
    return is_kept, int(count), int(peak)


@pytest.mark.system
@on_glibc
def test_a_step_after_the_first_gets_no_new_pages_and_the_peak_stays() -> None:
    _, before, old_peak = faults("plain")
    is_kept, after, peak = faults("kept")
    assert is_kept == "True"
    pages = 100 * 2 * 2**20 // 4096
    assert before > pages / 2, "torch or glibc keeps freed memory by itself: the call is not needed any more"
    assert after < before / 10
    assert peak < old_peak + 10 * 1024


@pytest.mark.system
@on_glibc
def test_numbers_of_the_user_stay() -> None:
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
    assert faults("kept", GLIBC_TUNABLES="glibc.malloc.top_pad=131072")[0] == "False"


def large(*words: str | Path, **variables: str) -> tuple[int, int]:
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    argv = [sys.executable, "-c", LARGE, *map(str, words)]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    count, huge = done.stdout.split()[-2:]
    return int(count), int(huge)


@pytest.mark.system
@on_glibc
def test_a_training_on_the_cpu_takes_huge_pages(tmp_path: Path, motion_videos: Path) -> None:
    pages = allocator._HUGE_PAGES
    if not pages.is_file() or "[madvise]" not in pages.read_text():
        pytest.skip("this kernel gives no huge pages on request")
    if large("by hand", THP_MEM_ALLOC_ENABLE="1")[1] == 0:
        pytest.skip("the kernel has no huge page free")
    faults_without, none = large("plain")
    count, huge = large("train", make(tmp_path / "exp", motion_videos, steps=3))
    assert none == 0, "PyTorch asks for huge pages by itself: the call is not needed any more"
    assert huge > 0, "main.train sets the variable before PyTorch makes its first tensor"
    assert count < faults_without / 2


def test_the_variable_is_set_where_huge_pages_come_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # so that it is restored
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    monkeypatch.setattr(allocator, "_HUGE_PAGES", tmp_path / "enabled")
    for text in (None, "always madvise [never]", "[always] madvise never"):
        if text:
            (tmp_path / "enabled").write_text(text)
        allocator.use_huge_pages()
        assert "THP_MEM_ALLOC_ENABLE" not in os.environ
    (tmp_path / "enabled").write_text("always [madvise] never")
    allocator.use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    allocator.use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0", "a user's variable stays"
