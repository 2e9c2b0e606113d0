"""Processes below one of ours, and the GPUs of this machine, as /proc and the driver show them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from utils.signals import start_ticks


def children(pid: int) -> list[int]:
    """Process ids whose parent is `pid`, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # it ended meanwhile
            if (
                int(stat.rpartition(")")[2].split()[1]) == pid
            ):  # "pid (name) state ppid ...", the name may hold anything
                found.append(int(entry.name))
    return sorted(found)


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, parents before their children."""
    found = []
    for child in children(pid):
        found += [child, *descendants(child)]
    return found


def send(pids: list[int], number: signal.Signals) -> None:
    """Signal each process that still exists."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def reap() -> None:
    """Take the exit codes of children that have ended, adopted ones too, so that no zombie is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def catches(pid: int, number: signal.Signals) -> bool:
    """True if the process has a handler of its own for this signal; False if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(masks) and bool(int(masks[0], 16) >> (number - 1) & 1)


def gpu_count(environment: Mapping[str, str]) -> int:
    """NVIDIA GPUs that a process started with this environment can use; 0 without a driver."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    present = _gpus_present()
    if visible is None or not present:
        return present
    listed = visible.split(",") if visible.strip() else []
    end = next((i for i, name in enumerate(listed) if name.strip() in ("-1", "")), len(listed))  # as CUDA reads it
    return min(end, present)


def _gpus_present() -> int:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
        if listing.returncode == 0:
            return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    except (OSError, subprocess.TimeoutExpired):
        pass
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def is_running(pid: object, ticks: object) -> bool:
    """True if the process that had this id at this start still runs on this machine."""
    return isinstance(pid, int) and isinstance(ticks, int) and ticks >= 0 and start_ticks(pid) == ticks
