"""Check an experiment and start its ranks, `python -m launch train|eval EXP PARTITION N`; run verbs for jobs.

Mistakes in the config or its list files are reported here, before anything starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import collect, jobs, local, memcached, options, scheduler, snapshot, sweep, verbs
from launch.job import RankTask
from utils import config, errors
from utils.cluster import minutes
from utils.errors import UserError, did_you_mean
from utils.options import Parser
from utils.schedulers import Request

STARTS = ("train", "eval")
VERBS = {**verbs.VERBS, "sweep": sweep.main, "collect": collect.main}
SWITCHES = {
    "dry_run": "print the script, a task's command and the resolved config; submit nothing",
    "follow": "print the log until the job has ended",
    "force": "submit even if a job of this experiment is pending or running",
}


def main(argv: Sequence[str]) -> int:
    """Run one verb; print a `UserError` as one message on stderr and return exit code 2."""
    verb = VERBS.get(argv[0]) if argv else None
    return errors.run_cli(lambda: verb(argv[1:]) if verb else launch(argv))


def launch(argv: Sequence[str]) -> int:
    """Check the request and hand it to the launcher of its partition; return the ranks' exit code."""
    args, rest = _parser().parse_known_args(argv)
    if args.verb not in STARTS:
        near = did_you_mean(args.verb, (*STARTS, *VERBS))
        raise UserError(f"no verb called {args.verb!r}{near}; choose one of {', '.join((*STARTS, *VERBS))}")

    if config.load(args.exp, args.set).data.folds:
        from launch import folds  # imports numpy, which other starts do not need

        return folds.run(args, rest)

    # Options that the launcher does not define go to the verb, so the verb's parser must accept them.
    options.check(args.verb, rest, near=["set", "time", *scheduler.FLAGS, *SWITCHES])
    if args.ranks < 0:
        raise UserError(f"N must be 0 or more, not {args.ranks}")

    sets = [word for override in args.set for word in ("--set", override)]
    exp = os.path.abspath(args.exp)
    main_argv = [args.verb, exp, *sets, *(word for word in rest if word != "--")]
    flags = {name: getattr(args, name) for name in ("time", *scheduler.FLAGS)}

    # On this machine: this process becomes the rank, or waits for torchrun.
    if args.partition == "local":
        given = [name for name in (*flags, *SWITCHES) if getattr(args, name)]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} is for a partition of cluster.yaml, not for `local`")

        megabytes = memcached.server_megabytes(_load(args, rest))

        if megabytes:
            os.environ.update(memcached.start_here(megabytes))
        return local.run(main_argv, args.ranks)

    # On a partition: everything is checked, then one job is submitted.
    request = scheduler.request(args.verb, args.exp, args.partition, args.ranks, flags, ask=not args.dry_run)
    cfg = _load(args, rest)
    request = dataclasses.replace(request, servers=scheduler.server_lines(request, memcached.server_megabytes(cfg)))
    task = scheduler.task(request, exp, main_argv)

    if args.dry_run:
        from utils.config.verb import as_yaml

        print(scheduler.preview(request, task), f"# the resolved config\n{as_yaml(cfg)}", sep="\n\n")
        return 0

    return _submit(request, task, force=args.force, follow=args.follow)


def _submit(request: Request, task: RankTask, *, force: bool, follow: bool) -> int:
    """Submit one job and record it in the experiment's list."""
    exp = Path(task.exp)
    is_training = task.argv[0] == "train"
    # Evaluations write files of their own, so any number of them may run.
    for job, row in jobs.live(exp, "train").items() if is_training and not force else ():
        raise UserError(
            f"{exp}: job {job} of this experiment is {row['state']}; two would write the same checkpoint. "
            f"`python -m launch cancel {exp}` ends it, --force submits anyway"
        )

    code = snapshot.take(exp / "jobs" / "code")
    (row,) = scheduler.submit(request, [task], code)

    shape = f"{request.nodes} node(s) x {request.tasks} rank(s)"
    print(f"submitted job {row['job']} to {request.partition}: {shape}; its log: {verbs.output(exp, row)}")

    if follow:
        return verbs.follow(exp, row)
    print(f"python -m launch status|log|cancel|requeue {exp}")
    return 0


def _load(args: argparse.Namespace, rest: Sequence[str]) -> config.Config:
    cfg = config.load(args.exp, args.set)
    own_list = any(word.split("=")[0] == "--list" for word in rest)  # eval with a different list than the config's
    config.check_files(cfg, ("train", "val") if args.verb == "train" else () if own_list else ("val",))
    return cfg


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch",
        description="Start the training or evaluation of an experiment.",
        epilog="Other options are passed to the verb unchanged: see `python main.py train --help` and `eval --help`. "
        f"Other verbs: {', '.join(VERBS)} (each with --help).",
        allow_abbrev=False,
    )
    parser.add_argument("verb", metavar="train|eval")

    parser.add_argument("exp", type=Path, help="experiment folder with a config.yaml")
    parser.add_argument("partition", metavar="PARTITION", help="local = this machine, else a partition of cluster.yaml")
    parser.add_argument(
        "ranks", metavar="N", type=int, help="processes, one per GPU; local 0 = one process without a GPU"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")

    group = parser.add_argument_group("on a partition of cluster.yaml")
    group.add_argument("--time", type=minutes, help="time limit, such as 90 (minutes), 12:00:00 or 3-00:00")
    for name in scheduler.FLAGS:
        group.add_argument(f"--{name}", help=f"sbatch's --{name}")
    for name, text in SWITCHES.items():
        group.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)

    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
