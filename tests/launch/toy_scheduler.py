"""A scheduler in one file: a job is a folder below $TOY, whose files `end` and `again` end it and start it again."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from utils import processes
from utils.schedulers import JOB, RESTARTS, Request, Scheduler, Task


class Toy(Scheduler):
    """Starts everything at once, on this machine."""

    name = "toy"
    keepers: ClassVar[list[subprocess.Popen]] = []

    def submit(self, request: Request, tasks: Sequence[Task], code: Path, *, parallel: int | None = None) -> list[str]:
        ids = [f"toy-{uuid.uuid4().hex}" for _ in tasks]
        for job, task in zip(ids, tasks, strict=True):
            request.folder.mkdir(parents=True, exist_ok=True)
            folder(job).mkdir(parents=True)
            about = [task.command(), request.ranks, str(code), str(self.output(request.folder, job))]
            (folder(job) / "about.json").write_text(json.dumps(about))
            env = {**os.environ, "PYTHONPATH": str(code)}
            keeper = subprocess.Popen([sys.executable, __file__, job], env=env, start_new_session=True)
            (folder(job) / "keeper").write_text(f"{keeper.pid} {processes.start_ticks(keeper.pid)}")
            self.keepers.append(keeper)
        return ids

    def states(self, jobs: Iterable[str]) -> dict[str, str]:
        return {job: "RUNNING" for job in jobs if (folder(job) / "keeper").is_file() and lives(job)}

    def cancel(self, job: str) -> None:
        (folder(job) / "end").touch()

    def requeue(self, job: str) -> None:
        (folder(job) / "again").touch()


SCHEDULER = Toy()


def folder(job: str) -> Path:
    return Path(os.environ["TOY"]) / job


def lives(job: str) -> bool:
    pid, ticks = (int(word) for word in (folder(job) / "keeper").read_text().split())
    return bool(processes.lives(pid, ticks))


def keep(job: str) -> None:
    command, size, code, output_file = json.loads((folder(job) / "about.json").read_text())
    end, again = folder(job) / "end", folder(job) / "again"
    for restarts in itertools.count():
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
        env = {**os.environ, **meet, JOB: f"toy:{job}", RESTARTS: str(restarts), "WORLD_SIZE": str(size)}
        with open(output_file, "ab") as output:
            envs = [env | {"RANK": str(rank)} for rank in range(size)]
            ranks = [subprocess.Popen(command, cwd=code, env=variables, stdout=output) for variables in envs]
        while any(rank.poll() is None for rank in ranks):
            if end.exists() or again.exists():
                processes.send([rank.pid for rank in ranks if rank.poll() is None], signal.SIGTERM)
            time.sleep(0.2)
        if not again.exists():
            return
        again.unlink()


if __name__ == "__main__":
    keep(sys.argv[1])
