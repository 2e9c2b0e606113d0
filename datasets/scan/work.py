"""Spread the work of a scan over reader processes, with a deadline for each file."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from datasets.lists.records import Records
from datasets.loading.messages import Look
from datasets.loading.pool import each
from datasets.loading.workers import Setup
from datasets.readers.spec import ReaderSpec
from datasets.scan.journal import Journal, ScanEntry


def examine(
    records: Records, spec: ReaderSpec, journal: Journal, *, level: str, workers: int, deadline: float
) -> list[ScanEntry]:
    """Examine every file of a list that the journal does not know.

    Returns:
        The result of each record, in the order of the list; records of one file share it.
    """
    # A file is examined once for each start, since a part of a folder has different frames.
    owners: dict[tuple[str, int], list[int]] = {}
    for i in range(len(records)):
        owners.setdefault((os.path.abspath(records.full_path(i)), int(records.starts[i])), []).append(i)

    answers: list[ScanEntry] = [{}] * len(records)
    tasks = [Look(indices[0], level, journal.stamp(*key, level)) for key, indices in owners.items()]
    progress = ScanProgress(Path(records.list_file).name, len(tasks))
    keys = {indices[0]: key for key, indices in owners.items()}

    for sample, answer in ask(records, spec, tasks, workers, deadline):
        if "same" in answer:
            answer = journal.known[keys[sample]]
        else:
            # Written at once, so that a scan that is killed loses only the files under way.
            journal.add(*keys[sample], {"level": level, "stamp": None, **answer})
        for i in owners[keys[sample]]:
            answers[i] = answer
        progress.advance(bool(answer["bad"]))

    return answers


def ask(
    records: Records, spec: ReaderSpec, tasks: list[Look], workers: int, deadline: float
) -> Iterator[tuple[int, ScanEntry]]:
    """Yield (sample, answer) of each task as it is done. A process that fails counts as an answer, too."""
    listed_frames = records.frames
    records.frames = np.full(len(records), -1, np.int32)  # makes the readers count the frames themselves
    done = each(Setup(spec), records, tasks, workers, deadline)
    try:
        first = next(done, None)  # starts the processes, which get the records as they are now
    finally:
        records.frames = listed_frames

    for task, answer in done if first is None else itertools.chain([first], done):
        # A file that hung or crashed is examined again next time.
        yield task.sample, answer.result if answer.ok else {"bad": answer.why, "notes": [], "again": True}


class ScanProgress:
    """Show one line `train.txt 320/1440  22%  3 bad  ETA 9 s` on stderr, rewritten on a terminal, a few in a file."""

    def __init__(self, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self.total, self.clock = what, total, clock
        self.done = self.bad = 0
        self.began = clock()
        self._shown = self.began
        self._pause = 0.5 if sys.stderr.isatty() else 30.0  # seconds between two lines

    def advance(self, bad: bool) -> None:
        """Count one file, and show the line if it is time."""
        self.done += 1
        self.bad += bad

        now = self.clock()
        if now - self._shown < self._pause and self.done < self.total:
            return
        self._shown = now

        left = (now - self.began) / self.done * (self.total - self.done)
        share = 100 * self.done // max(1, self.total)
        line = f"{self.what} {self.done}/{self.total} {share:3d}%  {self.bad} bad  ETA {left:.0f} s"
        end = "\n" if not sys.stderr.isatty() or self.done == self.total else "\r"
        # Padded, so that a shorter line covers all of the one before.
        print(f"{line:<70}", end=end, file=sys.stderr, flush=True)
