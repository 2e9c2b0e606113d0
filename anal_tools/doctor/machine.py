"""Check the machine: Python, packages, threads, limits, shared memory, clock."""

from __future__ import annotations

import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from anal_tools.doctor.finding import NONE, ROOT, Finding, Subject, cores, cpu_quota, ok, size, warning
from anal_tools.doctor.finding import error as bad

OPEN_FILES = 1024  # fewer are not enough for readers, sockets and logs
SHARED_BYTES = 256e6  # room that NCCL and PyTorch need in /dev/shm
CLOCK_SECONDS = 5.0  # tolerated difference between clocks


def python(subject: Subject, project: Path = ROOT / "pyproject.toml") -> Iterator[Finding]:
    """Check the version of Python and of every package that `pyproject.toml` requires."""
    from packaging.requirements import Requirement

    # Regular expressions, because Python 3.10 has no tomllib
    text = project.read_text("utf-8")
    least = tuple(map(int, re.findall(r'requires-python = ">=(\d+)\.(\d+)"', text)[0]))
    here = f"Python {sys.version.split()[0]}"
    if sys.version_info[:2] < least:
        yield bad(f"{here} is too old", f"use Python {least[0]}.{least[1]} or newer")

    required = re.findall(r'^ {4}"([^"]+)",', text.partition("\ndependencies = [")[2].partition("\n]")[0], re.MULTILINE)
    unfit = []
    for requirement in map(Requirement, required):
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = ""
        if not installed or not requirement.specifier.contains(installed, prereleases=True):
            unfit.append(str(requirement))
            problem = f"{requirement.name} {installed} does not fit" if installed else f"{requirement.name} is missing"
            yield bad(f"{problem} (needed: {requirement})", f"{sys.executable} -m pip install '{requirement}'")
    if not unfit:
        yield ok(f"{here}, {len(required)} packages as required")


def threads(subject: Subject) -> Iterator[Finding]:
    """Compare the CPU threads of a run with the cores that are free."""
    import torch

    quota, threads = cpu_quota(), torch.get_num_threads()
    # A container sees all cores of its host, and libraries start a thread for each
    if quota is not None and quota + 0.5 < len(os.sched_getaffinity(0)):
        allowed = len(os.sched_getaffinity(0))
        text = f"this container may use {quota:g} of the {allowed} cores that it sees"
        yield warning(text, f"export OMP_NUM_THREADS={cores()}, and keep workers at {cores()} or fewer")

    load = os.getloadavg()[0]
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if threads > cores() or (asked.isdecimal() and int(asked) > cores()):
        count = max(threads, int(asked) if asked.isdecimal() else 0)
        text = f"{count} threads on {cores()} cores wait for one another"
        yield warning(text, f"export OMP_NUM_THREADS={cores()} or fewer")
    elif load > 1.5 * cores() and threads > 1:
        # Other processes keep some threads of a step waiting
        text = f"load {load:.1f} on {cores()} cores: a step waits for the slowest of its {threads} threads"
        yield warning(text, "export OMP_NUM_THREADS=1 (on 2 cores at load 15 a step took 1.5 s with it, 8 s without)")
    else:
        yield ok(f"{threads} threads, {cores()} cores, load {load:.1f}")

    if subject.cfg is not None and subject.cfg.workers > cores():
        text = f"workers: {subject.cfg.workers} reader processes per rank, on {cores()} cores"
        yield warning(text, f"set common.workers to {cores()} or fewer")


def limits(subject: Subject) -> Iterator[Finding]:
    """Check the limits of this process (`ulimit -a`) that stop a run."""

    def soft(kind: int) -> float:
        value = resource.getrlimit(kind)[0]
        return float("inf") if value == resource.RLIM_INFINITY else value

    # Allow 32 descriptors for each reader: pipes, memfds and open videos
    needed = OPEN_FILES + (32 * subject.cfg.workers if subject.cfg else 0)
    findings = []

    files = soft(resource.RLIMIT_NOFILE)
    if files < needed:
        findings.append(warning(f"only {files:.0f} files may be open at a time", f"ulimit -n {2 * needed}"))

    largest = soft(resource.RLIMIT_FSIZE)
    if largest < float("inf"):
        text = f"no file may be larger than {size(largest)}: a larger checkpoint ends the run"
        findings.append((bad if largest < 1e9 else warning)(text, "ulimit -f unlimited"))
    # Address space: CUDA maps far more than it uses
    space = soft(resource.RLIMIT_AS)
    if space < float("inf"):
        findings.append(
            warning(f"a process may address only {size(space)}, and CUDA reserves more", "ulimit -v unlimited")
        )
    # Threads count as processes
    processes, processes_needed = soft(resource.RLIMIT_NPROC), 64 + 8 * cores()
    if processes < float("inf") and processes - _own_tasks() < processes_needed:
        text = f"this user may run {processes:.0f} processes and threads, and {_own_tasks()} are running"
        findings.append(warning(text, f"ulimit -u {_own_tasks() + 4 * processes_needed}"))

    yield from findings or [ok(f"{files:.0f} open files, no limit of file size")]


def _own_tasks() -> int:
    """Return how many processes and threads this user runs."""
    import psutil

    me = os.getuid()
    tasks = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        tasks += (process.info["num_threads"] or 1) if uids and uids.real == me else 0
    return tasks


def shared_memory(subject: Subject, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Check the room in /dev/shm for buffers of NCCL and PyTorch. Our readers use memfds and need none of it."""
    try:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    except OSError as error:
        yield warning(f"{folder}: {error.strerror}", "mount a tmpfs there: NCCL on several GPUs needs it")
        return
    if free < SHARED_BYTES:
        text = f"{folder} has {size(free)} left, and NCCL on several GPUs needs more"
        yield warning(text, "remove what old processes left there, or start the container with --shm-size=2g")
    else:
        yield ok(f"{folder}: {size(free)} left")


def clock(subject: Subject, code: Path = ROOT / "main.py") -> Iterator[Finding]:
    """Compare this machine's clock with the file system's: locks and heartbeats rely on both."""
    # The experiment's disk may belong to a file server with its own clock
    folder = subject.exp if subject.exp is not None and os.access(subject.exp, os.W_OK) else None
    with tempfile.TemporaryFile(dir=folder) as file:
        before = time.time()
        file.write(b"now")
        file.flush()
        ahead = os.fstat(file.fileno()).st_mtime - before

    where = folder or tempfile.gettempdir()
    if abs(ahead) > CLOCK_SECONDS:
        order = "ahead of" if ahead > 0 else "behind"
        text = f"the clock of the file system of {where} is {abs(ahead):.0f} s {order} this machine's"
        yield warning(text, "let NTP set both clocks: a live run may look dead to another machine")
    elif code.stat().st_mtime > time.time() + 60:
        late = code.stat().st_mtime - time.time()
        yield warning(f"this machine's clock is {late:.0f} s behind the files of the code", "let NTP set the clock")
    else:
        yield ok(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC, the same as the file system's clock")


def extras(subject: Subject) -> Iterator[Finding]:
    """Check the optional packages that this experiment asks for."""
    packages = {name: name for name in subject.cfg.loggers} if subject.cfg else {}
    if subject.cfg and subject.cfg.data.reader == "dali":
        packages["dali"] = "nvidia-dali-cuda130"

    for name, package in packages.items():
        try:
            yield ok(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            yield bad(f"{package} is missing, and the config needs it", f"{sys.executable} -m pip install '.[{name}]'")

    if not packages:
        yield ok(NONE)
