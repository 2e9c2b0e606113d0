"""Inside a SLURM job: what every task does around `main.main`, and how the job asks for another turn.

submitit pickles a `Run` (paths and words only) when the job is submitted; each task unpickles it, from the job's copy
of the code, and calls it. What is special:

- A job that ends by itself is not requeued by SLURM, and an exit code cannot ask for it. So after a stop with
  everything saved (75) rank 0 calls `scontrol requeue`, and all ranks stay until SLURM ends them.
- Only a job that is RUNNING may be requeued so: one that was cancelled, or requeued by hand, is COMPLETING, and SLURM
  would obey and bring a cancelled job back.
- In an array the job's own id can be that of the whole array: cells are requeued by ARRAY_TASK.
- Until main installs its own handlers (imports, model, data: seconds to minutes) there is nothing to save: rank 0 asks
  for another turn at once, the others go on, because a step needs rank 0.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import progress
from utils import faults, signals
from utils.log import utc_stamp

STOPPED = 75  # what main returns when a signal stopped it and its state is saved (utils/run.py)
RESTARTS = "restarts.jsonl"
_OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
ASKED_BY_SLURM = tuple(number for number in signals.ASKS_TO_STOP if number not in _OF_A_TERMINAL)
KILLED_WITHIN = 600.0  # seconds that a requeued job waits for its end


class Run:
    """One task of a job. It holds paths and words only, because it is pickled.

    Args:
        exp: experiment folder, absolute.
        words: what main.py is called with: verb, experiment, options.
        max_restarts: give up after so many restarts of this job.
        max_stalled: give up after so many restarts in a row without progress.
        old_run: what `mark_of_run` gave when the job was submitted with --fresh.
    """

    def __init__(
        self, exp: str, words: Sequence[str], *, max_restarts: int, max_stalled: int, old_run: list[int] | None = None
    ) -> None:
        self.exp, self.words, self.old_run = exp, list(words), old_run
        self.max_restarts, self.max_stalled = max_restarts, max_stalled

    def __call__(self) -> None:
        """Run main in this process; leaves with its exit code, and after a stop not before SLURM ends it."""
        signals.follow_launcher()
        is_main = faults.rank_from_environment() == 0
        for number in ASKED_BY_SLURM:
            signal.signal(number, _requeue_at_once if is_main else _note)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        if is_main and restarts:
            reason = self.note_restart(restarts)
            if reason:
                print(f"error: {reason}", file=sys.stderr, flush=True)
                sys.exit(1)
        import main

        words = self.words_of_this_start(restarts)
        sys.argv = ["main.py", *words]  # for the log
        code = faults.finish(lambda: main.main(words))
        for number in ASKED_BY_SLURM:  # from here on only SLURM's SIGKILL ends a task before its time
            signal.signal(number, signal.SIG_IGN)
        if code == STOPPED:
            requeue_and_wait(is_main)
        if code:
            sys.exit(code)

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """What submitit's own handler asks for in the moment before ours: the same task again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def words_of_this_start(self, restarts: int) -> list[str]:
        """The words for main: --fresh only until the old run has been moved away."""
        if not restarts or (self.old_run is not None and mark_of_run(Path(self.exp)) == self.old_run):
            return self.words
        return [word for word in self.words if word != "--fresh"]

    def note_restart(self, restarts: int) -> str | None:
        """Count this restart in log.txt and jobs/restarts.jsonl; returns why the job has to give up, if it has to."""
        exp, job = Path(self.exp), job_id(os.environ)
        file = exp / "jobs" / RESTARTS
        now = progress.mark(exp)
        earlier = [row for row in progress.read_rows(file) if row.get("job") == job]
        stalled = 0
        for row in reversed(earlier):
            if row.get("progress") != now:
                break
            stalled += 1
        row = {"job": job, "restart": restarts, "progress": now, "time": utc_stamp(), "host": socket.gethostname()}
        progress.append_row(file, row)
        reason = None
        if restarts > self.max_restarts:
            reason = f"job {job} was restarted {restarts} times, more than max_restarts = {self.max_restarts} allows"
        elif stalled >= self.max_stalled:
            reason = f"job {job} was restarted {stalled + 1} times in a row without progress"
            reason += f" (max_stalled = {self.max_stalled})"
        text = f"restart {restarts} of job {job} on {os.environ.get('SLURM_JOB_NODELIST', socket.gethostname())}"
        advice = "; it gives up. See its log, then start it anew with train.sh or eval.sh"
        _log(exp / "log.txt", text)
        if reason:
            reason += advice
            _log(exp / "log.txt", reason)
        return reason


def job_id(env: Mapping[str, str]) -> str:
    """The id by which this job can be requeued without touching its neighbours in an array."""
    if env.get("SLURM_ARRAY_JOB_ID") and env.get("SLURM_ARRAY_TASK_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID", "")


def mark_of_run(exp: Path) -> list[int] | None:
    """What tells the run in a folder from a later one: --fresh moves the latest checkpoint away as the last file."""
    try:
        stat = (exp / "ckpt.pth.tar").stat()
    except OSError:
        return None
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def requeue_and_wait(is_main: bool) -> None:
    """Rank 0 asks SLURM to start this job again; every rank then waits for its end."""
    job = job_id(os.environ)
    if is_main:
        state = _state(job)
        if state != "RUNNING":
            print(f"job {job} is {state}: not asked to start again", flush=True)
        else:
            problem = _scontrol("requeue", job)[1]
            if problem:
                print(
                    f"error: everything is saved, but job {job} cannot be started again ({problem}); "
                    "the same train.sh or eval.sh continues it",
                    file=sys.stderr,
                    flush=True,
                )
                sys.exit(STOPPED)
            print(f"job {job} will be started again and go on from here", flush=True)
    end = time.monotonic() + KILLED_WITHIN
    while time.monotonic() < end:
        time.sleep(1.0)
    sys.exit(STOPPED)


def _requeue_at_once(number: int, frame: object) -> None:
    if signals.StopFlag.was_used:  # main is on its way out with an exit code of its own, perhaps an error
        return
    for ignored in ASKED_BY_SLURM:
        signal.signal(ignored, signal.SIG_IGN)
    print(f"{signal.Signals(number).name} before the first step: nothing to save", flush=True)
    requeue_and_wait(is_main=True)


def _note(number: int, frame: object) -> None:
    if signals.StopFlag.was_used:
        return
    print(f"{signal.Signals(number).name} before the first step: rank 0 decides", flush=True)


def _state(job: str) -> str:
    """The job's state as SLURM says it; RUNNING if it cannot be asked (then the requeue will say why)."""
    answer, problem = _scontrol("show", "job", "-o", job)
    for word in answer.split() if not problem else ():
        if word.startswith("JobState="):
            return word.partition("=")[2]
    return "RUNNING"


def _scontrol(*words: str) -> tuple[str, str]:
    """(answer, problem) of one scontrol command."""
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        return "", str(error)
    return done.stdout, (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""


def _log(file: Path, text: str) -> None:
    """One line into log.txt, in the form of utils/log.py."""
    with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"[{utc_stamp()}] {text}\n")
