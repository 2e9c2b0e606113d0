"""This machine as a scheduler: a job is a process in the background with a keeper, and no job has to wait.

A partition of `cluster.yaml` with `scheduler: local` submits here. The keeper passes signals on, records the exit code
and restarts the job when it is requeued. The state of a job is one file in the user's state folder. There is no time
limit, and options of the partition that only a cluster has are ignored.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils import files, processes
from utils.errors import UserError
from utils.schedulers import JOB, RESTARTS, Outcome, Request, Scheduler, Task

ROOT = Path(__file__).resolve().parents[2]


class Local(Scheduler):
    """Jobs of this user on this machine; their ids are local-1, local-2 ..."""

    name = "local"

    def check(self, request: Request) -> None:
        """Refuse requests for several nodes."""
        if request.nodes > 1:
            raise UserError(f"{request.ranks} ranks need {request.nodes} nodes, and {request.partition} is one machine")

    def on_each_node(self, nodes: int) -> str:
        """Return no words: the command that starts the ranks starts their servers too."""
        return ""

    def submit(self, request: Request, tasks: Sequence[Task], code: Path, *, parallel: int | None = None) -> list[str]:
        """Start a keeper for each task."""
        if parallel is not None and parallel < len(tasks):
            raise UserError(f"{request.partition} starts {len(tasks)} jobs at once: --parallel {len(tasks)}")
        request.folder.mkdir(parents=True, exist_ok=True)
        return [self._start(request, task, code) for task in tasks]

    def _start(self, request: Request, task: Task, code: Path) -> str:
        # The file exists before the keeper does: the job's number is in the names of its outputs
        about = {"command": task.on_this_machine(request.ranks), "cwd": str(code)}
        job = _new_job(about | {"environment": dict(request.settings.environment)})
        outputs = [str(self.output(request.folder, job, end=end)) for end in ("out", "err")]
        files.write_text(_file(job), json.dumps(_read(job) | {"outputs": outputs}))
        _start_keeper(job)
        return job

    def states(self, jobs: Iterable[str]) -> dict[str, str]:
        """Return RUNNING for each job whose keeper is alive."""
        return {job: "RUNNING" for job in jobs if self.is_alive(job)}

    def outcome(self, job: str) -> Outcome:
        """Return the exit code that the keeper recorded."""
        code = _read(job).get("code", 1)
        return Outcome("COMPLETED" if code == 0 else f"FAILED code {code}", code)

    def cancel(self, job: str) -> None:
        """Signal the keeper to end the job."""
        self._signal(job, signal.SIGTERM)

    def requeue(self, job: str) -> None:
        """Signal the keeper to restart the job; give a job that has ended a new keeper."""
        if self.is_alive(job):
            self._signal(job, signal.SIGUSR1)
        elif _read(job):
            _start_keeper(job)
        else:
            raise UserError(f"there is no job {job} on this machine")

    def _signal(self, job: str, number: signal.Signals) -> None:
        if not self.is_alive(job):
            raise UserError(f"job {job} is not running on this machine")
        os.kill(_read(job)["pid"], number)

    def is_alive(self, job: str) -> bool | None:
        """Return whether the keeper is alive; None for a job of another machine that shares the user's folder."""
        about = _read(job)
        if about.get("machine", "") not in ("", processes.machine()):
            return None
        return "pid" in about and processes.lives(about["pid"], about["ticks"])


SCHEDULER = Local()
_keepers: list[subprocess.Popen[bytes]] = []  # keepers outlive this process; Popen would warn if it were collected


def keep(job: str) -> int:
    """Run a job until it ends for good: pass SIGTERM on, restart it after SIGUSR1, record its exit code."""
    # The handlers only note a signal: the loop below acts on it
    about, asked = _read(job), []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: asked.append(number))

    # Process id and start time together identify this keeper: the system reuses ids
    mine = {"machine": processes.machine(), "pid": os.getpid(), "ticks": processes.start_ticks(os.getpid())}
    about.pop("code", None)

    while True:
        restarts = about.get("restarts", -1) + 1
        about |= {**mine, "restarts": restarts}
        files.write_text(_file(job), json.dumps(about))

        with open(about["outputs"][0], "ab") as out, open(about["outputs"][1], "ab") as errors:
            env = {**os.environ, "PYTHONPATH": about["cwd"], JOB: f"{SCHEDULER.name}:{job}", RESTARTS: str(restarts)}
            process = subprocess.Popen(about["command"], cwd=about["cwd"], env=env, stdout=out, stderr=errors)

            # A requeue ends the job in the same way as a cancellation, so that it saves
            passed = 0
            while process.poll() is None:
                if len(asked) > passed:
                    process.send_signal(signal.SIGTERM)
                passed = len(asked)
                time.sleep(0.1)

        # The last signal decides between an end and a restart. Only what was looked at is forgotten: another one may
        # arrive at any moment, and must reach the next round.
        seen = len(asked)
        if not seen or asked[seen - 1] != signal.SIGUSR1:
            break
        del asked[:seen]

    files.write_text(_file(job), json.dumps(about | {"code": process.returncode}))
    return process.returncode


def _start_keeper(job: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **_read(job)["environment"]}
    # A session of its own: the keeper outlives the terminal
    keeper = subprocess.Popen(
        [sys.executable, "-m", "utils.schedulers.local", job], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    _keepers[:] = [other for other in _keepers if other.poll() is None] + [keeper]
    # Return once the keeper has signed the file, so that `is_alive` is right from the start
    while keeper.poll() is None and _read(job).get("pid") != keeper.pid:
        time.sleep(0.02)


def _file(job: str) -> Path:
    folder = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(folder).expanduser() / "zoetrope" / "jobs" / f"{job}.json"


def _new_job(about: files.Row) -> str:
    """Write the file of a job under the next free number."""
    _file("").parent.mkdir(parents=True, exist_ok=True)
    # "x" fails if the file exists: two submissions at a time get two numbers
    for number in itertools.count(1):
        job = f"local-{number}"
        with contextlib.suppress(FileExistsError), _file(job).open("x", encoding="utf-8") as file:
            json.dump(about, file)
            return job
    raise AssertionError("there is always a next number")


def _read(job: str) -> files.Row:
    """Return the file of a job as a dict; an empty one if there is none."""
    try:
        return json.loads(_file(job).read_text(encoding="utf-8")) if job.startswith("local-") else {}
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1]))
