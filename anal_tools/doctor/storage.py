"""Check the disks: room and speed below the experiment and below the data."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from anal_tools.doctor.finding import AVERAGES, NONE, Finding, Subject, ok, size, warning
from anal_tools.doctor.finding import error as bad
from datasets.lists import first_look

WRITTEN, READ = 32 << 20, 8 << 20  # bytes: in all, and of each file
SECONDS = 1.0  # longest time of each measurement
SLOW = 10e6  # bytes per second
CHECKPOINTS = 4  # latest, previous, best, and the one that is being written
ROOM = 1e9  # bytes that must be free if the size of a checkpoint is not known
_FULL = (errno.ENOSPC, errno.EDQUOT)


def disk(subject: Subject) -> Iterator[Finding]:
    """Write a few megabytes next to the experiment, and compare the free space with the size of its checkpoints."""
    # Without an experiment: where a new one would be made
    folder = subject.exp if subject.exp is not None and subject.exp.is_dir() else Path.cwd()
    try:
        speed = write_speed(folder)
    except OSError as error:
        full = error.errno in _FULL
        advice = "make room, or raise the quota" if full else "choose a folder that can be written, or its permissions"
        yield bad(f"{folder} cannot be written ({error.strerror})", advice)
        return

    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    # Weights, the averages of the optimiser, and perhaps that of the weights: float32
    copies = 1 + AVERAGES[subject.cfg.optimizer.type] + bool(subject.cfg.ema) if subject.cfg else 2
    required = 4 * subject.parameters * copies * CHECKPOINTS or ROOM  # without a model there are no parameters

    if free < required:
        what = f"{CHECKPOINTS} checkpoints take {size(required)}" if subject.parameters else "checkpoints need more"
        yield bad(f"{folder}: {size(free)} free, and {what}", "make room: `main.py clean EXP` frees old runs")
    elif status.f_files and status.f_favail < 1000:
        yield warning(f"{folder}: only {status.f_favail} more files can be made", "remove files: inodes run out")
    elif speed < SLOW:
        text = f"{folder} writes {size(speed)}/s: a checkpoint takes a long time"
        yield warning(text, "place the experiment on another disk, or raise common.save_minutes")
    else:
        yield ok(f"{folder}: {size(free)} free, writes {size(speed)}/s")


def write_speed(folder: Path) -> float:
    """Return how many bytes per second reach the disk. Leave no file. Raises OSError."""
    # Random bytes: some file systems compress
    chunk = os.urandom(1 << 20)
    began, count = time.perf_counter(), 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        while count < WRITTEN and time.perf_counter() - began < SECONDS:
            count += file.write(chunk)
        os.fsync(file.fileno())  # else the page cache would be measured
    return count / (time.perf_counter() - began)


def data(subject: Subject) -> Iterator[Finding]:
    """Read a few files of each list, past the page cache of this machine if that can be emptied."""
    for split, records in subject.lists.items():
        paths = [Path(records.full_path(i)) for i in first_look.chosen(len(records))]
        # A folder is a video as image files: eight of them are enough
        files = [file for path in paths for file in (sorted(path.iterdir())[:8] if path.is_dir() else [path])]
        files = [file for file in files if file.is_file()]
        if not files:
            continue  # the check `files` reports it

        try:
            speed = read_speed(files)
        except OSError as error:
            yield bad(f"{error.filename} cannot be read ({error.strerror})", "look at its permissions, and at the disk")
            continue

        if speed < SLOW:
            text = f"{records.root} delivers {size(speed)}/s ({split} list)"
            yield warning(text, "copy the data to a faster disk, or use `main.py preload`")
        else:
            yield ok(f"{records.root}: {size(speed)}/s ({split} list)")

    if not subject.lists:
        yield ok(NONE)


def read_speed(files: list[Path]) -> float:
    """Return how many bytes per second can be read from the files."""
    began, count = time.perf_counter(), 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # Drop the file from the page cache, else memory would be measured
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            count += len(os.read(descriptor, READ))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error  # `os.read` does not name the file
        finally:
            os.close(descriptor)
        if time.perf_counter() - began > SECONDS:
            break
    return count / (time.perf_counter() - began)
