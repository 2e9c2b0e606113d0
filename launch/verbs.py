"""Look after submitted jobs: `python -m launch status|log|cancel|requeue EXP` and `launch list`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from anal_tools import history
from launch import jobs, progress
from utils import files
from utils.errors import UserError
from utils.options import Parser

NEXT_LOOK = 5.0  # seconds between two queries to the scheduler while following a job


def status(argv: Sequence[str]) -> int:
    """Print the jobs of one experiment and its progress."""
    parser = _parser("status", "show the jobs of an experiment, and its last iteration and top-1")
    parser.add_argument("-n", type=int, default=5, help="how many jobs, newest last")
    parser.add_argument("--json", action="store_true", help="print one JSON object: docs/cluster.md has its keys")
    args = parser.parse_args(argv)

    exp, rows = _jobs_of(args.exp)
    states = jobs.states(rows)

    if args.json:
        print(json.dumps(as_json(exp, rows, states)))
        return 0

    for row in rows[-args.n :]:
        # The queue lists only pending and running jobs; the others come from the accounting.
        state = states.get(row["job"]) or jobs.scheduler_of(row).outcome(row["job"]).text
        code = f"code {row.get('revision', '?')}"
        where = f"{row.get('partition')} {row.get('ranks')}"
        print(f"{row['job']:>9}  {row.get('verb', '?'):5}  {state:24}  {where}  {code}  {row.get('time')}")

    print(_reached(progress.read(exp)))
    return 0


def as_json(exp: Path, rows: Sequence[Mapping[str, object]], states: Mapping[str, str]) -> dict[str, object]:
    """Return all jobs of an experiment and its run's history. `schema` increases when the meaning of a key changes."""
    names = ("job", "verb", "scheduler", "partition", "ranks", "nodes", "time", "revision")
    listed = [
        {**{name: row.get(name) for name in names}, "state": states.get(str(row["job"]), "ended")} for row in rows
    ]

    run = dataclasses.asdict(history.read(exp))
    del run["lines"]  # the text of the log, which would be most of the output
    return {"schema": 1, "experiment": str(exp.resolve()), "jobs": listed, "run": run}


def log(argv: Sequence[str]) -> int:
    """Print the output of the newest job."""
    parser = _parser("log", "print the end of the newest job's output")
    parser.add_argument("-n", type=int, default=40, help="lines of each file")
    parser.add_argument("--job", help="job id (default: the newest)")
    parser.add_argument("--rank", type=int, default=0, help="rank whose output to show (default: 0)")
    parser.add_argument("--follow", "-f", action="store_true", help="follow the output until the job has ended")
    args = parser.parse_args(argv)

    exp, rows = _jobs_of(args.exp)
    row = _chosen(exp, rows, args.job)
    out, errors = (output(exp, row, args.rank, end) for end in ("out", "err"))

    for file in (errors, out):  # the errors first: they would scroll away after a long output
        if file.is_file() and file.stat().st_size:
            print(f"==> {file}")
            print("\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-args.n :]))

    if not out.is_file():
        print(f"job {row['job']} has not written anything yet: {out}")

    return follow(exp, row, at_end=True, rank=args.rank) if args.follow else 0


def cancel(argv: Sequence[str]) -> int:
    """End running and pending jobs; a training run saves first."""
    args = _parser("cancel", "end the experiment's jobs; a run that is training saves first").parse_args(argv)
    exp, _ = _jobs_of(args.exp)
    live = jobs.live(exp)

    for job, row in live.items():
        jobs.scheduler_of(row).cancel(job)
        print(f"cancelled {job} ({row['state']})")

    if not live:
        print("no job of this experiment is pending or running")
    return 0


def requeue(argv: Sequence[str]) -> int:
    """Start the newest job again, as a scheduler does after a preemption."""
    parser = _parser("requeue", "start the newest job again, with the code that it was submitted with")
    parser.add_argument("--job", help="job id (default: the newest)")
    args = parser.parse_args(argv)

    exp, rows = _jobs_of(args.exp)
    row = _chosen(exp, rows, args.job)
    job = row["job"]

    # Two trainings would write the same checkpoint.
    others = [other for other in jobs.live(exp, "train") if other != job]
    if others and row.get("verb") == "train":
        raise UserError(f"{exp}: job {others[0]} is training here; cancel it first")

    try:
        jobs.scheduler_of(row).requeue(job)
    except UserError as error:
        raise UserError(
            f"job {job} cannot be started again ({error}); use train.sh or eval.sh to resume the run"
        ) from error

    print(f"job {job} will start again")
    return 0


def list_(argv: Sequence[str]) -> int:
    """Print all experiments with jobs: newest job, last iteration, top-1."""
    parser = Parser(prog="launch list", description="all experiments with live or past jobs")
    parser.add_argument(
        "folder", nargs="*", type=Path, help="look only here (default: exps/ and the jobs you submitted)"
    )
    args = parser.parse_args(argv)

    listed = [(exp, jobs.submitted(exp)) for exp in jobs.experiments(args.folder)]
    listed = [(exp, rows) for exp, rows in listed if rows]

    try:
        states = jobs.states(row for _, rows in listed for row in rows)
    except UserError as error:  # on a machine without the scheduler the rest is still useful
        print(f"note: {error}", file=sys.stderr)
        states = {}

    for exp, rows in listed:
        # A live job is more interesting than a newer one that has ended.
        alive = [row["job"] for row in rows if row["job"] in states]
        job = alive[-1] if alive else rows[-1]["job"]
        evaluated = history.in_words(history.read(exp))[2]
        shown = f"{progress.read(exp)}  {evaluated}" if evaluated else str(progress.read(exp))
        print(f"{job:>9}  {states.get(job, 'ended'):24}  {shown}  {exp}")

    if not listed:
        print("no experiment with jobs")
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "status": status,
    "log": log,
    "cancel": cancel,
    "requeue": requeue,
    "list": list_,
}


def output(exp: Path, row: files.Row, rank: int = 0, end: str = "out") -> Path:
    """Return the file with the output of a job's rank; restarts append to it."""
    scheduler = jobs.scheduler_of(row)
    return scheduler.output(exp / "jobs" / scheduler.name, row["job"], rank, end)


def follow(exp: Path, row: files.Row, *, at_end: bool = False, rank: int = 0) -> int:
    """Print a rank's output as it grows, until the job has left the queue; Ctrl-C ends the printing, not the job.

    Returns:
        The job's exit code; 130 after Ctrl-C.
    """
    job, file = row["job"], output(exp, row, rank)
    where = file.stat().st_size if at_end and file.is_file() else 0  # bytes that have been printed
    look = 0.0

    try:
        while True:
            # Ask before reading: output written in between is then read in this round.
            ended = time.monotonic() > look and not jobs.states([row])
            look = time.monotonic() + NEXT_LOOK if time.monotonic() > look else look

            if file.is_file():
                with file.open("rb") as stream:
                    stream.seek(where)
                    sys.stdout.write(stream.read().decode("utf-8", errors="replace"))
                    where = stream.tell()
                sys.stdout.flush()

            if ended:
                break
            time.sleep(0.5)
    except KeyboardInterrupt:
        print(f"\njob {job} keeps running; `python -m launch log {exp} --follow` follows it again", file=sys.stderr)
        return 130

    outcome = jobs.scheduler_of(row).outcome(job)
    print(f"job {job}: {outcome.text}")
    return outcome.code


def _parser(verb: str, text: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"launch {verb}", description=text)
    parser.add_argument("exp", type=Path, help="experiment folder")
    return parser


def _jobs_of(exp: Path) -> tuple[Path, list[files.Row]]:
    rows = jobs.submitted(exp)
    if not rows:
        raise UserError(f"{exp}: no job was submitted from here (no {jobs.FILE})")
    return exp, rows


def _chosen(exp: Path, rows: Sequence[files.Row], job: str | None) -> files.Row:
    """Return the row of a job, by default the newest."""
    row = next((row for row in reversed(rows) if job in (None, row["job"])), None)
    if row is None:
        raise UserError(f"{exp}: job {job} is not one of its jobs; `launch status {exp}` lists them")
    return row


def _reached(reached: progress.RunProgress) -> str:
    step = "no iteration yet" if reached.step is None else f"iteration {reached.step} of {reached.last or '?'}"
    return step + ("" if reached.best is None else f", best {reached.criterion} so far {reached.best:.2f}")
