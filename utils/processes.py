"""Look at other processes of this machine: their state, their children, and whether one is still the same."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import psutil

Answer = TypeVar("Answer")


def children(pid: int) -> list[int]:
    """Return the ids of the processes whose parent is `pid`, oldest first."""
    return _asked(pid, lambda process: sorted(child.pid for child in process.children()), [])


def descendants(pid: int) -> list[int]:
    """Return the ids of the processes below `pid`, parents before their children."""
    return _asked(pid, lambda process: [child.pid for child in process.children(recursive=True)], [])


def command(pid: int) -> str:
    """Return the name of a process's program; empty if there is no such process."""
    return _asked(pid, lambda process: process.name(), "")


def parent(pid: int) -> int:
    """Return the id of a process's parent; 0 if there is no such process."""
    return _asked(pid, lambda process: process.ppid(), 0)


def argv_of(pid: int) -> list[str]:
    """Return the command line of a process as a list; empty if it does not exist or is not visible to us."""
    return _asked(pid, lambda process: process.cmdline(), [])


def _asked(pid: int, question: Callable[[psutil.Process], Answer], otherwise: Answer) -> Answer:
    """Return psutil's answer about a process, or `otherwise` if it has ended or is not visible to us."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return question(psutil.Process(pid))

    return otherwise


def send(pids: list[int], number: signal.Signals) -> None:
    """Signal each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def reap() -> None:
    """Collect the exit codes of children that have ended, adopted ones too, so that no zombie is left."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def catches(pid: int, number: signal.Signals) -> bool:
    """Return True if the process has its own handler for this signal; False if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False

    masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(masks) and bool(int(masks[0], 16) >> (number - 1) & 1)  # bit 0 is signal 1


def start_ticks(pid: int) -> int:
    """Return the start of a process in clock ticks since boot; -1 if it does not exist or is a zombie.

    psutil does not offer this number: its creation time adds the boot time, which moves when the clock is set.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return -1

    fields = text.rpartition(")")[2].split()  # "pid (name) state ppid ...", the name may contain anything
    # Z and X: a zombie and a dead process. Field 19 after the name is starttime, see proc(5).
    return -1 if fields[0] in "ZX" else int(fields[19])


def machine() -> str:
    """Return an id of this boot and pid namespace: only within it does a pid mean the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def lives(pid: int, ticks: int) -> bool | None:
    """Return whether the process with this id and start time still runs; None if it is not visible to us."""
    now = start_ticks(pid)
    if now != -1:
        return now == ticks

    # -1: it has ended, is a zombie, or /proc hides it. A signal tells these apart.
    try:
        os.kill(pid, 0)
    except PermissionError:
        return None  # another user's process, and /proc shows only our own (hidepid)
    except (OSError, OverflowError):
        return False
    return False  # a zombie


def gpu_count(environment: Mapping[str, str]) -> int:
    """Return how many NVIDIA GPUs a process with this environment can use; 0 without a driver."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")

    present = _gpus_present()
    if visible is None or not present:
        return present
    listed = visible.split(",") if visible.strip() else []
    end = next((i for i, name in enumerate(listed) if name.strip() in ("-1", "")), len(listed))  # CUDA stops there
    return min(end, present)


def _gpus_present() -> int:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
        if listing.returncode == 0:
            return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    except (OSError, subprocess.TimeoutExpired):
        pass
    # The driver lists its cards even if nvidia-smi is missing, as in some containers.
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0
