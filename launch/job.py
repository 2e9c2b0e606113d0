"""Run one rank of a job: the steps around `main.main`, and the request to requeue the job.

A `RankTask` (paths and texts only) is created when the job is submitted. Each rank calls it, from the job's copy of the
code: unpickled by submitit, or as `python -m launch.job`. Traps:

- SLURM does not requeue a job that ends by itself, and an exit code cannot request it. So after a stop with everything
  saved (75) rank 0 calls the scheduler's `requeue`, and all ranks wait until the scheduler ends them.
- Only a job that is RUNNING may be requeued in this way. A job that was cancelled, or requeued by hand, is COMPLETING:
  SLURM would obey and bring a cancelled job back.
- Until main installs its own handlers (imports, model, data: seconds to minutes) there is nothing to save. Rank 0 then
  requeues the job at once, and the others continue, because a step needs rank 0.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import attempts, progress
from utils import errors, files, schedulers, signals
from utils.errors import UserError
from utils.log import format_event, utc_stamp
from utils.schedulers import Place, Scheduler

STOPPED = 75  # main's code after a signal stopped it and its state was saved (utils/engine/run.py)
RESTARTS = "restarts.jsonl"
_OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
ASKED_BY_SCHEDULER = tuple(number for number in signals.ASKS_TO_STOP if number not in _OF_A_TERMINAL)
KILLED_WITHIN = 600.0  # seconds that a requeued job waits for the scheduler to end it


class RankTask:
    """One rank of a job, a `schedulers.Task`. It holds paths and texts only, because it is pickled.

    Args:
        exp: experiment folder, absolute.
        argv: the arguments of main.py: verb, experiment, options.
        max_restarts: number of restarts of this job after which it gives up.
        max_stalled: number of restarts in a row without progress after which it gives up.
        old_run: the result of `mark_of_run` when the job was submitted with --fresh.
        sweep, trial: folder of the sweep and name of the trial; "" outside a sweep.
        then: arguments of further calls of main.py, each after the previous one has succeeded.
    """

    def __init__(
        self,
        exp: str,
        argv: Sequence[str],
        *,
        max_restarts: int,
        max_stalled: int,
        old_run: list[int] | None = None,
        sweep: str = "",
        trial: str = "",
        then: Sequence[Sequence[str]] = (),
    ) -> None:
        self.then = [list(argv) for argv in then]
        self.exp, self.argv, self.old_run = exp, list(argv), old_run
        self.max_restarts, self.max_stalled = max_restarts, max_stalled
        self.sweep, self.trial = sweep, trial

    def __call__(self) -> None:
        """Run main in this process and leave with its exit code; after a stop wait until the scheduler ends it."""
        # Do this first: the launcher may die during the imports below.
        signals.follow_launcher()
        place, is_main = schedulers.here() or Place(""), errors.rank_from_environment() == 0

        if not self.sweep:
            self._run(place, is_main)
        elif not attempts.has_ended_well(Path(self.sweep), self.trial, place.job):
            with attempts.noted(Path(self.sweep), self.trial, place, is_main=is_main):
                self._run(place, is_main)

    def _run(self, place: Place, is_main: bool) -> None:
        for number in ASKED_BY_SCHEDULER:
            signal.signal(number, _requeue_at_once if is_main else _note)

        # A restart counts even if it fails before main runs.
        if is_main and place.restarts:
            reason = self.note_restart(place)
            if reason:
                print(f"error: {reason}", file=sys.stderr, flush=True)
                sys.exit(1)

        # Import only now that the handlers are installed: it takes seconds, and a signal may arrive.
        import main

        argv = self.argv_of_this_start(place.restarts)
        sys.argv = ["main.py", *argv]  # for the log
        code = errors.finish(lambda: main.main(argv))

        for number in ASKED_BY_SCHEDULER:  # from here on only a SIGKILL ends a rank early
            signal.signal(number, signal.SIG_IGN)

        if code == STOPPED:
            requeue_and_wait(is_main)
        if code:
            sys.exit(code)
        if self.then:
            self._become_next()

    def _become_next(self) -> None:
        """Replace this process with the next call of main.py, whose ranks meet on another port.

        Every rank does so. None is still in the first call: it has succeeded on all of them.
        """
        following = RankTask(**{**vars(self), "argv": self.then[0], "then": self.then[1:]})
        if "MASTER_PORT" in os.environ:
            os.environ["MASTER_PORT"] = str(schedulers.port_after(int(os.environ["MASTER_PORT"])))

        # `execv` discards buffered output.
        sys.stdout.flush()
        sys.stderr.flush()
        argv = following.command()
        os.execv(argv[0], argv)

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """Return the same task again, for submitit's own handler, which may run just before ours."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def argv_of_this_start(self, restarts: int) -> list[str]:
        """Return the arguments for main: --fresh only until the old run has been moved away."""
        if not restarts or (self.old_run is not None and mark_of_run(Path(self.exp)) == self.old_run):
            return self.argv
        return [word for word in self.argv if word != "--fresh"]

    def command(self) -> list[str]:
        """Return the command that runs this object."""
        return [sys.executable, "-m", "launch.job", json.dumps(vars(self))]

    def on_this_machine(self, ranks: int) -> list[str]:
        """Return the command that starts all ranks with torchrun."""
        if self.then:
            raise UserError("folds do not run on a partition with scheduler: local; use PARTITION = local")
        verb, exp, *options = self.argv
        return [sys.executable, "-m", "launch", verb, exp, "local", str(ranks), *options]

    def note_restart(self, place: Place) -> str | None:
        """Count this restart in log.txt and jobs/restarts.jsonl; return the reason if the job must give up."""
        exp, job, restarts = Path(self.exp), place.job, place.restarts
        file = exp / "jobs" / RESTARTS
        now = progress.mark(exp)

        earlier = [row for row in files.read_rows(file) if row.get("job") == job]
        if any(row.get("restart") == restarts for row in earlier):
            return None  # the previous call of main.py in this start has counted it

        # Count the consecutive earlier restarts at which the run had made no progress.
        stalled = 0
        for row in reversed(earlier):
            if row.get("progress") != now:
                break
            stalled += 1

        row = {"job": job, "restart": restarts, "progress": now, "time": utc_stamp(), "host": socket.gethostname()}
        files.append_row(file, row)

        reason = None
        if restarts > self.max_restarts:
            reason = f"job {job} was restarted {restarts} times, more than max_restarts = {self.max_restarts} allows"
        elif stalled >= self.max_stalled:
            reason = f"job {job} was restarted {stalled + 1} times in a row without progress"
            reason += f" (max_stalled = {self.max_stalled})"

        text = format_event("job", "restart", number=restarts, job=job, nodes=place.nodes or socket.gethostname())
        advice = "; it gives up. See its log, then start it again with train.sh or eval.sh"

        _log(exp / "log.txt", text)
        if reason:
            reason += advice
            _log(exp / "log.txt", format_event("job", "given_up", "ERROR", message=reason))
        return reason


def mark_of_run(exp: Path) -> list[int] | None:
    """Return a mark of the run in a folder. It describes the latest checkpoint, which --fresh moves away last."""
    try:
        stat = (exp / "ckpt.pth.tar").stat()
    except OSError:
        return None
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def requeue_and_wait(is_main: bool) -> None:
    """Let rank 0 ask the scheduler to start this job again; then wait on every rank for the end."""
    place = schedulers.here()
    if place is None:  # no scheduler that would end the ranks
        sys.exit(STOPPED)

    if is_main:
        scheduler, job = schedulers.named(place.scheduler), place.job
        try:
            state = scheduler.states([job]).get(job, "ended")
        except UserError:
            state = "RUNNING"  # if the scheduler is down, the requeue below reports it
        if state != "RUNNING":  # cancelled, or requeued already: see the module docstring
            print(f"job {job} is {state}, so it is not requeued", flush=True)
        else:
            _requeue(scheduler, job)

    end = time.monotonic() + KILLED_WITHIN
    while time.monotonic() < end:
        time.sleep(1.0)
    sys.exit(STOPPED)


def _requeue(scheduler: Scheduler, job: str) -> None:
    try:
        scheduler.requeue(job)
    except UserError as error:
        print(
            f"error: everything is saved, but job {job} cannot be started again ({error}); "
            "run the same train.sh or eval.sh to resume",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(STOPPED)

    print(f"job {job} will be started again and resume from here", flush=True)


def _requeue_at_once(number: int, frame: object) -> None:
    if signals.StopFlag.was_used:  # main is about to leave with its own exit code, perhaps an error
        return

    for ignored in ASKED_BY_SCHEDULER:  # schedulers repeat their signals
        signal.signal(ignored, signal.SIG_IGN)
    print(f"{signal.Signals(number).name} before the first step: nothing to save", flush=True)
    requeue_and_wait(is_main=True)


def _note(number: int, frame: object) -> None:
    if signals.StopFlag.was_used:
        return
    print(f"{signal.Signals(number).name} before the first step: rank 0 decides", flush=True)


def _log(file: Path, text: str) -> None:
    """Append one line to log.txt, in the format of utils/log.py."""
    with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"[{utc_stamp()}] {text}\n")


if __name__ == "__main__":
    RankTask(**json.loads(sys.argv[1]))()
