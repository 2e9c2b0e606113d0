"""The work of a scan, spread over reader processes with a deadline for each file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from datasets.lists.records import Records
from datasets.loading.pool import Pool
from datasets.loading.workers import Setup
from datasets.readers.spec import ReaderSpec
from datasets.scan.journal import Found, Journal
from utils.faults import UserError

_AHEAD = 4  # requests per process that are under way


def examine(
    records: Records, spec: ReaderSpec, journal: Journal, *, level: str, workers: int, deadline: float
) -> list[Found]:
    """Look at every file of a list that the journal does not know.

    Returns:
        What there is to say of each record, in the order of the list (records of one file share it).
    """
    owners: dict[tuple[str, int], list[int]] = {}
    for i in range(len(records)):
        owners.setdefault((os.path.abspath(records.full_path(i)), int(records.starts[i])), []).append(i)
    found: list[Found] = [{}] * len(records)
    requests = [{"sample": own[0], "what": level, "known": journal.stamp(*key, level)} for key, own in owners.items()]
    progress = Progress(Path(records.list_file).name, len(requests))
    keys = {own[0]: key for key, own in owners.items()}
    for sample, answer in ask(records, spec, requests, workers, deadline):
        if "same" in answer:
            answer = journal.known[keys[sample]]
        else:
            journal.add(*keys[sample], {"level": level, "stamp": None, **answer})
        for i in owners[keys[sample]]:
            found[i] = answer
        progress.advance(bool(answer["bad"]))
    return found


def ask(
    records: Records, spec: ReaderSpec, requests: list[Found], workers: int, deadline: float
) -> Iterator[tuple[int, Found]]:
    """(sample, answer) of each request in the order in which they are done; a process that fails is an answer too."""
    if not requests:
        return
    told, records.frames = records.frames, np.full(len(records), -1, np.int32)  # the readers count for themselves
    try:
        setup = Setup(reader=spec.to_json(), train="", eval="", seed=0)
        pool = Pool(setup, records, [], min(workers, len(requests)), deadline)
    finally:
        records.frames = told
    ahead = iter(enumerate(requests, start=1))
    try:
        under_way: dict[int, int] = {}
        while True:
            while len(under_way) < _AHEAD * workers and (following := next(ahead, None)) is not None:
                under_way[following[0]] = following[1]["sample"]
                pool.submit({"id": following[0], "kind": "scan", **following[1]})
            if not under_way:
                return
            for answer in pool.answers():
                yield under_way.pop(answer["id"]), _plain(answer)
    finally:
        pool.close()


def _plain(answer: Found) -> Found:
    """What the pool says of a file that hung or crashed becomes a reason; such a file is tried again next time."""
    if answer["ok"]:
        return {name: value for name, value in answer.items() if name not in ("id", "ok", "counters")}
    if "user" in answer:
        raise UserError(answer["user"])
    reason = answer["reason"] if "reason" in answer else f"not expected: {answer['bug'].strip().splitlines()[-1]}"
    return {"bad": reason, "notes": [], "again": True}


class Progress:
    """One line `train.txt 320/1440  22%  3 bad  ETA 9 s` on stderr: rewritten on a terminal, a few lines in a file."""

    def __init__(self, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self.total, self.clock = what, total, clock
        self.done = self.bad = 0
        self.began = clock()
        self._shown = self.began
        self._pause = 0.5 if sys.stderr.isatty() else 30.0

    def advance(self, bad: bool) -> None:
        """Count one file and show the line where it is time."""
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
        print(f"{line:<70}", end=end, file=sys.stderr, flush=True)
