"""Inside a job: what every rank does around `main.main`, and how the job asks to be started again.

A `Run` (paths and words only) is made when the job is submitted. Each rank calls it, from the job's copy of the code:
unpickled by submitit, or as `python -m launch.job`. Traps:

- A job that ends by itself is not requeued by SLURM, and an exit code cannot ask for it. So after a stop with
  everything saved (75) rank 0 calls the scheduler's `requeue`, and all ranks stay until it ends them.
- Only a job that is RUNNING may be requeued so: one that was cancelled, or requeued by hand, is COMPLETING, and SLURM
  would obey and bring a cancelled job back.
- Until main installs its own handlers (imports, model, data: seconds to minutes) there is nothing to save: rank 0
  requeues the job at once, the others continue, because a step needs rank 0.
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
from utils import faults, files, schedulers, signals
from utils.faults import UserError
from utils.log import utc_stamp
from utils.schedulers import Place, Scheduler

STOPPED = 75  # what main returns when a signal stopped it and its state is saved (utils/engine/run.py)
RESTARTS = "restarts.jsonl"
_OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
ASKED_BY_SCHEDULER = tuple(number for number in signals.ASKS_TO_STOP if number not in _OF_A_TERMINAL)
KILLED_WITHIN = 600.0  # seconds that a requeued job waits for its end


class Run:
    """One rank of a job, a `schedulers.Task`. It holds paths and words only, because it is pickled.

    Args:
        exp: experiment folder, absolute.
        words: what main.py is called with: verb, experiment, options.
        max_restarts: give up after so many restarts of this job.
        max_stalled: give up after so many restarts in a row without progress.
        old_run: what `mark_of_run` gave when the job was submitted with --fresh.
        sweep, cell: folder of the sweep and name of the cell that this is; "" outside one.
        then: words for further calls of main.py, each after the one before has ended well.
    """

    def __init__(
        self,
        exp: str,
        words: Sequence[str],
        *,
        max_restarts: int,
        max_stalled: int,
        old_run: list[int] | None = None,
        sweep: str = "",
        cell: str = "",
        then: Sequence[Sequence[str]] = (),
    ) -> None:
        self.then = [list(words) for words in then]
        self.exp, self.words, self.old_run = exp, list(words), old_run
        self.max_restarts, self.max_stalled = max_restarts, max_stalled
        self.sweep, self.cell = sweep, cell

    def __call__(self) -> None:
        """Run main in this process; leave with its exit code, after a stop not before the scheduler ends the rank."""
        signals.follow_launcher()
        place, is_main = schedulers.here() or Place(""), faults.rank_from_environment() == 0
        if not self.sweep:
            self._run(place, is_main)
        elif not attempts.has_ended_well(Path(self.sweep), self.cell, place.job):
            with attempts.noted(Path(self.sweep), self.cell, place, is_main=is_main):
                self._run(place, is_main)

    def _run(self, place: Place, is_main: bool) -> None:
        for number in ASKED_BY_SCHEDULER:
            signal.signal(number, _requeue_at_once if is_main else _note)
        if is_main and place.restarts:
            reason = self.note_restart(place)
            if reason:
                print(f"error: {reason}", file=sys.stderr, flush=True)
                sys.exit(1)
        import main

        words = self.words_of_this_start(place.restarts)
        sys.argv = ["main.py", *words]  # for the log
        code = faults.finish(lambda: main.main(words))
        for number in ASKED_BY_SCHEDULER:  # from here on only a SIGKILL ends a task before its time
            signal.signal(number, signal.SIG_IGN)
        if code == STOPPED:
            requeue_and_wait(is_main)
        if code:
            sys.exit(code)
        if self.then:
            self._become_next()

    def _become_next(self) -> None:
        """Replace this process by the next call of main.py, whose ranks meet at a port of their own.

        Every rank does so, and none is left in the middle: the first call has ended well on all of them.
        """
        following = Run(**{**vars(self), "words": self.then[0], "then": self.then[1:]})
        if "MASTER_PORT" in os.environ:
            os.environ["MASTER_PORT"] = str(schedulers.port_after(int(os.environ["MASTER_PORT"])))
        sys.stdout.flush()
        sys.stderr.flush()
        argv = following.command()
        os.execv(argv[0], argv)

    def checkpoint(self, *_: Any, **__: Any) -> Any:
        """What submitit's own handler asks for in the moment before ours: the same task again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def words_of_this_start(self, restarts: int) -> list[str]:
        """The words for main: --fresh only until the old run has been moved away."""
        if not restarts or (self.old_run is not None and mark_of_run(Path(self.exp)) == self.old_run):
            return self.words
        return [word for word in self.words if word != "--fresh"]

    def command(self) -> list[str]:
        """Return the command that calls this."""
        return [sys.executable, "-m", "launch.job", json.dumps(vars(self))]

    def on_this_machine(self, ranks: int) -> list[str]:
        """Return the command that starts all ranks below torchrun."""
        if self.then:
            raise UserError("folds do not run on a partition with scheduler: local; take PARTITION = local")
        verb, exp, *options = self.words
        return [sys.executable, "-m", "launch", verb, exp, "local", str(ranks), *options]

    def note_restart(self, place: Place) -> str | None:
        """Count this restart in log.txt and jobs/restarts.jsonl; return why the job has to give up, if it has to."""
        exp, job, restarts = Path(self.exp), place.job, place.restarts
        file = exp / "jobs" / RESTARTS
        now = progress.mark(exp)
        earlier = [row for row in files.read_rows(file) if row.get("job") == job]
        if any(row.get("restart") == restarts for row in earlier):
            return None  # counted by the call of main.py before this one
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
        text = f"restart {restarts} of job {job} on {place.nodes or socket.gethostname()}"
        advice = "; it gives up. See its log, then start it anew with train.sh or eval.sh"
        _log(exp / "log.txt", text)
        if reason:
            reason += advice
            _log(exp / "log.txt", reason)
        return reason


def mark_of_run(exp: Path) -> list[int] | None:
    """What tells the run in a folder from a later one: --fresh moves the latest checkpoint away as the last file."""
    try:
        stat = (exp / "ckpt.pth.tar").stat()
    except OSError:
        return None
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def requeue_and_wait(is_main: bool) -> None:
    """Let rank 0 ask the scheduler to start this job again; every rank then waits for its end."""
    place = schedulers.here()
    if place is None:  # nothing would end the ranks
        sys.exit(STOPPED)
    if is_main:
        scheduler, job = schedulers.named(place.scheduler), place.job
        try:
            state = scheduler.states([job]).get(job, "ended")
        except UserError:
            state = "RUNNING"  # then the requeue will say why
        if state != "RUNNING":
            print(f"job {job} is {state}: not asked to start again", flush=True)
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
            "the same train.sh or eval.sh continues it",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(STOPPED)
    print(f"job {job} will be started again and resume from here", flush=True)


def _requeue_at_once(number: int, frame: object) -> None:
    if signals.StopFlag.was_used:  # main is on its way out with an exit code of its own, perhaps an error
        return
    for ignored in ASKED_BY_SCHEDULER:
        signal.signal(ignored, signal.SIG_IGN)
    print(f"{signal.Signals(number).name} before the first step: nothing to save", flush=True)
    requeue_and_wait(is_main=True)


def _note(number: int, frame: object) -> None:
    if signals.StopFlag.was_used:
        return
    print(f"{signal.Signals(number).name} before the first step: rank 0 decides", flush=True)


def _log(file: Path, text: str) -> None:
    """One line into log.txt, in the form of utils/log.py."""
    with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(f"[{utc_stamp()}] {text}\n")


if __name__ == "__main__":
    Run(**json.loads(sys.argv[1]))()
