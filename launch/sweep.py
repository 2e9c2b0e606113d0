"""Run `python -m launch sweep NAME --exp EXP ... --grid KEY=A,B ... --verb train|eval --parallel 4 PARTITION N`.

A trial is one experiment folder (train) or one result (eval). The same command, run again, runs the missing trials: it
skips finished and live ones and retries failed ones. --retry runs only the failed ones. On SLURM, the trials of one
command are one job array. On `local` they run one after the other, or --parallel at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

from launch import attempts, grid, jobs, options, progress, scheduler, snapshot, verbs
from launch.grid import Sweep, Trial
from utils import cluster, config, files, processes
from utils.errors import UserError
from utils.options import Parser
from utils.signals import end_with_parent

LOOK = 30.0  # seconds between two progress lines of a trial that runs on this machine
STOPPED = 75  # exit code of a trial or sweep that a signal stopped; it resumes when started again
_NEW, _DONE, _LIVE, _FAILED, _STOPPED = "new", "done", "live", "failed", "stopped"
# The last line of a finished run, including runs of versions before 0.3
_FINISHED = re.compile(r"\] (?:INFO run: (?:finished|nothing_to_do)\b|finished: |nothing to do: this run finished)")


@dataclasses.dataclass(frozen=True)
class TrialState:
    """The state of a trial: new, done, live, failed or stopped; and the reason in words."""

    kind: str
    why: str = ""


def main(argv: Sequence[str]) -> int:
    """Create the trials and run the missing ones. Return 0 if all are done or submitted, 1 if one failed."""
    args, rest = _parser().parse_known_args(one_word_each(argv))
    options.check(args.verb, rest)
    folder = grid.folder_of(args.name, args.into)
    return run(_sweep_of(args, tuple(word for word in rest if word != "--"), folder), args)


def run(sweep: Sweep, args: argparse.Namespace) -> int:
    """Check all trials, then run the missing ones; `args` holds the options of `_parser`."""
    trials = sweep.trials()

    for trial in trials:  # check everything before anything is created
        cfg = config.load(trial.source, trial.overrides)
        if cfg.data.folds:
            raise UserError(f"{trial.source}: data.folds is set, and a sweep cannot run folds; set data.folds to null")
        config.check_files(cfg, ("val",) if sweep.verb == "eval" else ("train", "val"))

    states_of = states(sweep, trials)
    chosen = [
        trial
        for trial in trials
        if states_of[trial.name].kind in ((_FAILED,) if args.retry else (_NEW, _FAILED, _STOPPED))
    ]

    print(_summary(sweep, trials, states_of, chosen))
    if args.dry_run or not chosen:
        return 0

    # Only now: a dry run, or one with nothing to do, leaves no trace.
    sweep.write()
    for trial in chosen:
        if sweep.writes(trial):
            grid.make(sweep, trial)

    if args.partition == "local":
        return _Local(sweep, args.ranks, args.parallel or 1).run(chosen)
    return submit(sweep, chosen, args.partition, args.ranks, args.parallel or 4, vars(args))


def submit(
    sweep: Sweep, trials: Sequence[Trial], partition: str, ranks: int, parallel: int, flags: cluster.Values
) -> int:
    """Submit the trials, as one array if the scheduler has arrays. Record the job of each trial."""
    request = scheduler.request(sweep.verb, sweep.folder, partition, ranks, flags)
    code = snapshot.take(sweep.folder / "jobs" / "code")

    runs = [
        scheduler.task(
            request, str(sweep.exp_of(trial)), *sweep.commands(trial), sweep=str(sweep.folder), trial=trial.name
        )
        for trial in trials
    ]

    rows = scheduler.submit(request, runs, code, parallel=parallel, sweep=sweep.name)
    for trial, row in zip(trials, rows, strict=True):
        attempts.note(sweep.folder, trial.name, "submit", scheduler=row["scheduler"], job=row["job"])

    first = rows[0]["job"].partition("_")[0]  # of an array: ARRAY_TASK
    at_once = min(parallel, len(rows))
    print(f"submitted {len(rows)} trials to {partition} as job {first}, {at_once} at a time; their output:")
    print(f"  {request.folder}; {sweep.next_step}")
    return 0


def states(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, TrialState]:
    """Return the state of each trial."""
    rows = attempts.read(sweep.folder)
    # The last note of a trial counts, but the files of a finished trial override any note.
    last = {row["trial"]: row for row in rows if isinstance(row.get("trial"), str)}
    alive = jobs.states(row for row in last.values() if row.get("job"))

    states_of = {}
    for trial in trials:
        row = last.get(trial.name, {})
        job = row.get("job")
        if is_finished(sweep, trial):
            states_of[trial.name] = TrialState(_DONE)
        # The last note may come from another command, such as the training of a fold whose evaluation is missing.
        elif not row or (row["event"] == "end" and row["code"] == 0):
            states_of[trial.name] = TrialState(_NEW)
        elif row["event"] == "end":
            kind = _STOPPED if row["code"] == STOPPED else _FAILED
            states_of[trial.name] = TrialState(kind, reason(sweep, trial, row, row["code"]))
        elif job in alive:
            states_of[trial.name] = TrialState(_LIVE, f"job {job} {alive[job]}")
        elif "pid" in row and processes.lives(row["pid"], row["ticks"]):
            states_of[trial.name] = TrialState(_LIVE, f"process {row['pid']}")
        # The trial started and did not end, and neither its job nor its process is alive: it was killed.
        else:
            states_of[trial.name] = TrialState(_FAILED, reason(sweep, trial, row, None))

    return states_of


def is_finished(sweep: Sweep, trial: Trial) -> bool:
    """Return True if the trial's training has reached its last iteration, or its evaluation has written its summary."""
    return is_trained(sweep.exp_of(trial)) if sweep.verb == "train" else sweep.result_of(trial).is_file()


def is_trained(exp: Path) -> bool:
    """Return True if the training in an experiment folder has reached its last iteration."""
    try:
        text = (exp / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False

    # A run that was extended has progress lines after its first end.
    end = max((match.start() for match in _FINISHED.finditer(text)), default=-1)
    return end > text.rfind("] Iter: [")


def reason(sweep: Sweep, trial: Trial, row: files.Row, code: int | None) -> str:
    """Return why a trial ended, in one line: its last `error:` line, else its last line."""
    ended = "it ended without an exit code (killed?)" if code is None else f"exit code {code}"
    try:
        lines = output(sweep, trial, row).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ended

    texts = [line.strip() for line in lines if line.strip()]
    errors = [line for line in texts if line.startswith("error: ")]
    if code is not None and code < 0 and not errors:
        return f"ended by {signal.Signals(-code).name}"  # its last line has nothing to do with it
    return f"{ended}: {(errors or texts)[-1][:300]}" if texts else ended


def output(sweep: Sweep, trial: Trial, row: files.Row) -> Path:
    """Return the file with the errors of a trial's last attempt; `row` is a note of that attempt."""
    if row.get("job"):
        return verbs.output(sweep.folder, row, end="err")
    return sweep.folder / "output" / f"{trial.name}.txt"


class _Local:
    """Runs trials on this machine, at most `parallel` at a time."""

    def __init__(self, sweep: Sweep, ranks: int, parallel: int) -> None:
        gpus = processes.gpu_count(os.environ)
        if gpus and ranks * parallel > gpus:
            raise UserError(
                f"--parallel {parallel} trials of {ranks} ranks need {ranks * parallel} GPUs, and there are {gpus} here"
            )

        self.sweep, self.ranks, self.gpus = sweep, ranks, gpus
        self.free = list(range(parallel))  # slots; a slot owns its share of the GPUs
        self.share = max(1, len(os.sched_getaffinity(0)) // (parallel * max(ranks, 1)))  # threads per rank
        # Process -> trial, slot, open output file, remaining commands.
        self.running: dict[subprocess.Popen[bytes], tuple[Trial, int, TextIO, list[list[str]]]] = {}
        self.signals: list[int] = []

    def run(self, trials: Sequence[Trial]) -> int:
        """Run the trials; return 0, 1 if a trial failed, 75 if a signal stopped the sweep."""
        before = {number: signal.signal(number, self._notice) for number in (signal.SIGINT, signal.SIGTERM)}
        waiting, failed = list(trials), []
        next_look = time.monotonic() + LOOK
        shown: dict[str, str] = {}  # trial -> its last progress line

        try:
            while self.running or (waiting and not self.signals):
                while waiting and self.free and not self.signals:
                    trial = waiting.pop(0)
                    file = output(self.sweep, trial, {})
                    file.parent.mkdir(parents=True, exist_ok=True)
                    self._start(trial, self.free.pop(0), file.open("w", encoding="utf-8"), self.sweep.commands(trial))
                    print(f"started {trial.name}; its output: {file}", flush=True)

                failed += self._collect()
                if time.monotonic() > next_look:
                    next_look = time.monotonic() + LOOK
                    for trial, *_ in self.running.values():
                        line = f"  {trial.name}: {progress.read(self.sweep.exp_of(trial)).sentence}"
                        if line != shown.get(trial.name):
                            print(line, flush=True)
                        shown[trial.name] = line
                time.sleep(0.1)
        finally:
            for process in self.running:  # only after an error in the sweep itself is any left
                process.terminate()
            for number, handler in before.items():
                signal.signal(number, handler)

        if self.signals:
            print("stopped; run the same command again to resume")
            return STOPPED

        for trial, why in failed:
            print(f"failed: {trial.name}: {why}")
        print(f"{len(trials) - len(failed)} of {len(trials)} trials done; {self.sweep.next_step}")
        return 1 if failed else 0

    def _start(self, trial: Trial, slot: int, stream: TextIO, commands: list[list[str]]) -> None:
        """Start the first command of a trial; `_collect` starts the next one after it has succeeded."""
        (verb, exp, *rest), *others = commands
        argv = [sys.executable, "-m", "launch", verb, exp, "local", str(self.ranks), *rest]

        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(grid.ROOT), os.environ.get("PYTHONPATH")])),
        }
        env.setdefault("OMP_NUM_THREADS", str(self.share))

        if self.gpus and self.ranks:
            visible = (
                os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else []
            )
            names = visible or [str(number) for number in range(self.gpus)]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(names[slot * self.ranks : (slot + 1) * self.ranks])

        # In a separate session, so that the terminal's Ctrl-C reaches only this process, which forwards it once.
        tie = end_with_parent(os.getpid(), signal.SIGTERM)
        process = subprocess.Popen(
            argv, cwd=grid.ROOT, env=env, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
            start_new_session=True, preexec_fn=tie,
        )  # fmt: skip

        attempts.note(self.sweep.folder, trial.name, "start", pid=process.pid, ticks=processes.start_ticks(process.pid))
        self.running[process] = (trial, slot, stream, others)

    def _collect(self) -> list[tuple[Trial, str]]:
        failed = []
        for process in [process for process in self.running if process.poll() is not None]:
            trial, slot, stream, others = self.running.pop(process)
            # If a fold's training finishes just as a signal arrives, its evaluation must not start.
            code = STOPPED if others and self.signals and not process.returncode else process.returncode
            if others and not code:
                self._start(trial, slot, stream, others)
                continue

            stream.close()
            self.free.append(slot)
            attempts.note(self.sweep.folder, trial.name, "end", code=code)
            if code not in (0, STOPPED):
                failed.append((trial, reason(self.sweep, trial, {}, code)))
            print(f"ended   {trial.name}: {'done' if code == 0 else f'exit code {code}'}", flush=True)

        return failed

    def _notice(self, number: int, frame: FrameType | None) -> None:
        """Stop at the first signal: running trials save and exit, and no more start. Kill them at the second signal."""
        self.signals.append(number)
        for process in self.running:
            if process.poll() is None:
                processes.send([process.pid], signal.SIGTERM if len(self.signals) == 1 else signal.SIGKILL)


def one_word_each(argv: Sequence[str]) -> list[str]:
    """Rewrite `--grid A=1 B=2 local 1` as `--grid=A=1 --grid=B=2 local 1`: the values end at a word without a `=`.

    argparse would take PARTITION and N, which follow, as values too.
    """
    words: list[str] = []
    inside = False
    for word in argv:
        inside = word == "--grid" or (inside and "=" in word and not word.startswith("-"))
        if word != "--grid":
            words.append(f"--grid={word}" if inside else word)

    return words


def _sweep_of(args: argparse.Namespace, rest: tuple[str, ...], folder: Path) -> Sweep:
    """Return the sweep that the command line defines, or without --exp the one that is stored in the folder."""
    if args.ranks < 0 or (args.parallel is not None and args.parallel < 1):
        raise UserError("N must be 0 or more, and --parallel 1 or more")

    if not args.exp:
        return grid.read(folder)

    exps = tuple(dict.fromkeys(Path(os.path.abspath(exp)) for exp in args.exp))
    sweep = Sweep(folder, args.verb, exps, tuple(text for texts in args.grid for text in texts), rest)
    # Trials of both kinds in one folder would share names.
    if (folder / grid.FILE).is_file() and grid.read(folder).verb != sweep.verb:
        raise UserError(f"{folder}: this sweep runs {grid.read(folder).verb}; choose another NAME")
    return sweep


def _summary(sweep: Sweep, trials: Sequence[Trial], states_of: dict[str, TrialState], chosen: Sequence[Trial]) -> str:

    kinds = [states_of[trial.name].kind for trial in trials]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))

    lines = [f"sweep {sweep.name}: {len(trials)} trials ({counts}), {len(chosen)} to run, in {sweep.folder}"]
    notable = [trial for trial in trials if states_of[trial.name].kind in (_FAILED, _LIVE)]
    lines += [f"  {states_of[trial.name].kind}: {trial.name}: {states_of[trial.name].why}" for trial in notable]
    lines += [f"  runs: {trial.name}" for trial in chosen]

    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch sweep",
        description="Run experiments with every combination of values. Run it again for the missing trials only.",
        epilog="Other options are passed to the verb unchanged. Without --exp, the sweep resumes as defined before.",
        allow_abbrev=False,
    )

    parser.add_argument("name", metavar="NAME", help="name of the sweep; its folder is sweeps/NAME")
    parser.add_argument("partition", metavar="PARTITION", help="local = this machine, else a partition of cluster.yaml")
    parser.add_argument(
        "ranks", metavar="N", type=int, help="ranks of each trial, one per GPU; local 0 = one without a GPU"
    )
    parser.add_argument("--exp", nargs="+", default=[], metavar="EXP", help="experiment folders")
    parser.add_argument(
        "--grid", nargs="+", action="append", default=[], metavar="KEY=A,B", help="values of a key; [a, b] is one value"
    )

    parser.add_argument("--verb", choices=("train", "eval"), default="train")
    parser.add_argument("--parallel", type=int, help="how many trials run at a time (default: 4 on SLURM, 1 on local)")
    parser.add_argument("--retry", action="store_true", help="run the failed trials only")
    parser.add_argument("--into", type=Path, default=grid.SWEEPS, help="folder of the sweeps (default: sweeps/)")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and their states")

    group = parser.add_argument_group("on a partition of cluster.yaml")
    group.add_argument("--time", type=cluster.minutes, help="time limit of a trial, such as 90 (minutes) or 12:00:00")
    for name in scheduler.FLAGS:
        group.add_argument(f"--{name}", help=f"sbatch's --{name}")

    return parser
