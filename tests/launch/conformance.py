"""What every scheduler must do, whatever it is: tests that take a `case` and run on all of them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from utils.cluster import PartitionSettings
from utils.errors import UserError
from utils.run_dir import RunDir
from utils.schedulers import Request, Scheduler

RANK = Path(__file__).with_name("scheduled_rank.py")


@dataclass(frozen=True)
class RankTask:
    """The task of the jobs: `scheduled_rank.py` with its words."""

    argv: tuple[str, ...]

    def __call__(self) -> None:
        os.execv(sys.executable, self.command())

    def command(self) -> list[str]:
        return [sys.executable, str(RANK), *self.argv]

    def on_this_machine(self, ranks: int) -> list[str]:
        program = "import sys; from pathlib import Path; from launch import local;"
        program += "sys.exit(local.run(sys.argv[3:], int(sys.argv[1]), script=Path(sys.argv[2])))"
        return [sys.executable, "-c", program, str(ranks), str(RANK), *self.argv]

    def checkpoint(self, *_: object, **__: object) -> object:
        """What submitit asks for at a signal that comes before the rank's own handler."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass
class Case:
    """A scheduler and how to ask it.

    Attributes:
        code: the folder that the ranks run in.
        folder: for the output and the files of the ranks; all nodes see it.
        seconds: within which a step of a test happens.
    """

    scheduler: Scheduler
    partition: str
    code: Path
    folder: Path
    nodes: int = 1
    seconds: float = 60.0
    jobs: list[str] = field(default_factory=list)

    def submit(self, *modes: str, ranks: int = 1, parallel: int | None = None) -> list[str]:
        """One job for each mode; its ranks write to the folder FOLDER/NUMBER of its place in `modes`."""
        folders = [self.folder / str(number) for number in range(len(modes))]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        tasks = [RankTask((str(folder), mode)) for folder, mode in zip(folders, modes, strict=True)]
        nodes = self.nodes if ranks > 1 else 1
        settings = PartitionSettings(cpus_per_gpu=1, time=10, signal_seconds=30)
        request = Request("conformance", self.folder / "jobs", self.partition, nodes, ranks // nodes, settings)
        self.scheduler.check(request)
        self.jobs += (ids := self.scheduler.submit(request, tasks, self.code, parallel=parallel))
        return ids

    def read(self, name: str, number: int = 0) -> dict[str, object]:
        """What a rank wrote, once it has."""
        file = self.folder / str(number) / name
        self.until(file.is_file)
        return json.loads(file.read_text()) if file.suffix == ".json" else {}

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + self.seconds
        while not condition():
            assert time.monotonic() < end, self.output()
            time.sleep(0.2)

    def until_gone(self, job: str) -> None:
        self.until(lambda: self.scheduler.states([job]) == {} and not self.scheduler.is_alive(job))

    def output(self) -> str:
        files = sorted((self.folder / "jobs").glob("*_log.*"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in files)

    def close(self) -> None:
        for job in self.scheduler.states(self.jobs):
            self.scheduler.cancel(job)
            self.until_gone(job)


def test_ranks_meet_and_know_their_job(case: Case) -> None:
    (job,) = case.submit("meet", ranks=2)
    for rank in (0, 1):
        about = case.read(f"0.{rank}.json")
        assert (about["size"], about["total"]) == (2, 3.0)
        assert (about["scheduler"], about["job"], about["restarts"]) == (case.scheduler.name, job, 0)
    case.until_gone(job)
    assert case.scheduler.outcome(job).code == 0, case.output()
    assert case.scheduler.output(case.folder / "jobs", job).is_file()


def test_a_cancelled_job_can_save_and_is_dead(case: Case) -> None:
    (job,) = case.submit("wait")
    case.read("0.0.json")
    assert case.scheduler.states([job, "77777777"]) == {job: "RUNNING"}
    assert case.scheduler.is_alive(job)
    case.scheduler.cancel(job)
    case.read("0.0.saved")
    case.until_gone(job)


def test_a_requeued_job_keeps_its_id_and_counts_its_starts(case: Case) -> None:
    (job,) = case.submit("wait")
    case.read("0.0.json")
    case.scheduler.requeue(job)
    assert (about := case.read("1.0.json"))["job"] == job, about
    assert about["restarts"] == 1
    assert case.scheduler.states([job]) == {job: "RUNNING"}


def test_several_jobs_of_one_submission_are_jobs_of_their_own(case: Case) -> None:
    first, second = case.submit("wait", "wait", parallel=2)
    assert case.read("0.0.json", 0)["job"] == first
    assert case.read("0.0.json", 1)["job"] == second
    case.scheduler.cancel(first)
    case.until_gone(first)
    assert case.scheduler.states([first, second]) == {second: "RUNNING"}


def test_the_lock_asks_who_lives(case: Case, tmp_path: Path) -> None:
    (job,) = case.submit("wait")
    case.read("0.0.json")
    (tmp_path / "config.yaml").touch()
    lock = tmp_path / "jobs" / "lock.json"
    lock.parent.mkdir()
    holder = {"token": "0" * 32, "host": "elsewhere", "scheduler": case.scheduler.name, "job": job}
    lock.write_text(json.dumps(holder))
    os.utime(lock, (1, 1))  # the heartbeat says the opposite, here and below
    with pytest.raises(UserError, match=f"job {job}"):
        RunDir.open(tmp_path)
    case.scheduler.cancel(job)
    case.until_gone(job)
    os.utime(lock)
    RunDir.open(tmp_path).close()
