"""`python -m launch train|eval EXP PARTITION N`: check the experiment, then start its ranks.

What is wrong with the config or its list files is said here, before anything is started.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import local
from utils import config
from utils.faults import UserError, did_you_mean

VERBS = ("train", "eval")


def main(argv: Sequence[str]) -> int:
    """Start one verb; a `UserError` becomes one text on stderr and exit code 2."""
    try:
        return launch(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def launch(argv: Sequence[str]) -> int:
    """Check the request and hand it to the launcher of its partition; returns the ranks' exit code."""
    parser = argparse.ArgumentParser(
        prog="launch",
        description="Start training or evaluation of an experiment folder.",
        epilog="All other options go to the verb as they are: see `python main.py train --help` and `eval --help`.",
        allow_abbrev=False,
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("exp", type=Path, help="experiment folder, holds config.yaml")
    parser.add_argument("partition", metavar="PARTITION", help="where to run: local = this machine")
    parser.add_argument("ranks", metavar="N", type=int, help="processes, one per GPU; 0 = one process without a GPU")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    args, rest = parser.parse_known_args(argv)
    if args.ranks < 0:
        raise UserError(f"N must be 0 or more, not {args.ranks}")
    if args.partition != "local":
        raise UserError(_elsewhere(args.partition, args.verb, args.exp, args.ranks))
    cfg = config.load(args.exp, args.set)
    own_list = any(word.split("=")[0] == "--list" for word in rest)  # eval on another list than the config's
    config.check_files(cfg, ("train", "val") if args.verb == "train" else () if own_list else ("val",))
    sets = [word for override in args.set for word in ("--set", override)]
    exp = os.path.abspath(args.exp)
    return local.run([args.verb, exp, *sets, *(word for word in rest if word != "--")], args.ranks)


def _elsewhere(partition: str, verb: str, exp: Path, ranks: int) -> str:
    near = did_you_mean(partition, ["local"])
    return (
        f"no partition called {partition}{near}: this version starts runs on this machine only (PARTITION = local). "
        "Inside a SLURM job main.py joins the ranks that srun starts: "
        f"srun -p {partition} -n {max(ranks, 1)} --ntasks-per-node=GPUS_PER_NODE --gres=gpu:GPUS_PER_NODE "
        f"--kill-on-bad-exit=1 python {local.ROOT / 'main.py'} {verb} {exp}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
