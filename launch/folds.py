"""Run `train.sh` and `eval.sh` of an experiment with `data.folds`: train and evaluate each fold (docs/folds.md).

The folds are the trials of a sweep in `EXP/folds`, so they start, stop, resume and are submitted like trials. A trial
runs main.py twice, first train and then eval. It is done when its result exists.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anal_tools import folds as pooled
from launch import options, sweep
from launch.grid import Sweep, Trial
from utils import config
from utils.errors import UserError
from utils.options import Parser


@dataclass(frozen=True)
class FoldSweep(Sweep):
    """The folds of one experiment.

    Attributes:
        sets: the `KEY=VALUE` overrides of `--set`.
        result: name of each fold's result and of the pooled result.
        evaluates: the user asked for an evaluation; untrained folds are trained first.
    """

    sets: tuple[str, ...] = ()
    result: str = pooled.RESULT
    evaluates: bool = False

    def trials(self) -> list[Trial]:
        """Return a trial for each fold; write the lists that do not exist yet."""
        (exp,) = self.exps
        cfg = config.load(exp, self.sets)
        # The keys data.fold* describe the split itself. A trial trains on one part of it, with plain lists.
        values = [tuple(text.removeprefix("common.").split("=", 1)) for text in self.sets]
        values = [(key, value) for key, value in values if not key.startswith("data.fold")]

        trials = []
        for fold in pooled.of(cfg, self.folder / "lists"):
            keys = {"train_source": fold.train, "val_source": fold.val}
            keys |= {"train_root": fold.root, "val_root": fold.root} if fold.root else {}
            keys |= {"data.class_names": name} if (name := config.class_names_file(cfg)) else {}

            # Quoted for YAML.
            texts = [(key, json.dumps(str(value), ensure_ascii=False)) for key, value in keys.items()]
            trials.append(Trial(fold.name, exp, (*values, ("data.folds", "null"), *texts)))

        return trials

    def exp_of(self, trial: Trial) -> Path:
        """Return the experiment folder of a fold."""
        return self.folder / trial.name

    def writes(self, trial: Trial) -> bool:
        """Return False for a trained fold that is only evaluated: it keeps the config that it was trained with."""
        folder = self.exp_of(trial)
        if not self.evaluates or not sweep.is_trained(folder):
            return True
        # If --set contradicts that config, writing the new one raises the error.
        return config.to_dict(config.load(folder, trial.overrides)) != config.to_dict(config.load(folder))

    def result_of(self, trial: Trial) -> Path:
        """Return the path of the summary that evaluating a fold writes."""
        return self.exp_of(trial) / "results" / f"{self.result}.json"

    def commands(self, trial: Trial) -> list[list[str]]:
        """Return the arguments for main.py: train the fold unless it is finished, then evaluate it."""
        exp = self.exp_of(trial)
        train = [] if sweep.is_trained(exp) else [["train", str(exp)]]
        return [*train, ["eval", str(exp), "--checkpoint", "latest", *self.options, "--name", self.result]]

    @property
    def next_step(self) -> str:
        """The user's next command once all folds are done."""
        return f"`python main.py folds {self.exps[0]} --name {self.result}` prints the table"


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run the missing folds; once all are done, pool their results and print the table.

    Args:
        args: the parsed arguments of `launch`.
        rest: `--parallel`, and arguments for main.py.
    """
    parser = Parser(prog=f"launch {args.verb}", allow_abbrev=False)
    parser.add_argument("--parallel", type=int)
    given, argv = parser.parse_known_args(rest)
    argv = [word for word in argv if word != "--"]
    options.check(args.verb, argv, near=["set", "time", "parallel"])
    exp = Path(os.path.abspath(args.exp))

    # A fold's result is part of a pooled number: training it again would silently mix two runs.
    if "--fresh" in argv:
        raise UserError(f"--fresh: move {exp / pooled.FOLDER} away instead; a fold is never trained twice")
    if args.ranks < 0 or (given.parallel is not None and given.parallel < 1):
        raise UserError("N must be 0 or more, and --parallel 1 or more")

    name, eval_argv = _evaluation(args.verb, argv)
    folds = FoldSweep(exp / pooled.FOLDER, "folds", (exp,), (), eval_argv, tuple(args.set), name, args.verb == "eval")
    # Check files once here, not in each fold's job.
    cfg = config.load(exp, args.set)
    config.check_files(cfg)
    for line in pooled.untrained(pooled.of(cfg, folds.folder / "lists"), cfg):
        print(line)

    code = sweep.run(folds, argparse.Namespace(**{**vars(args), "parallel": given.parallel, "retry": False}))
    # On a partition the jobs are only submitted: a later call finds their results and pools them.
    if code or args.dry_run or not all(folds.result_of(trial).is_file() for trial in folds.trials()):
        return code
    return pooled.main([str(exp), "--name", name])


def _evaluation(verb: str, argv: list[str]) -> tuple[str, tuple[str, ...]]:
    """Return the name of the result, and the arguments for `main.py eval`, none for `train`."""
    from anal_tools import evaluate

    if verb == "train":
        return pooled.RESULT, ()

    # Parsed here only to check which options are given; they are passed on unchanged.
    given, others = evaluate.parser().parse_known_args(["EXP", *argv])
    if given.checkpoint or given.list or given.set or others:
        raise UserError(
            "eval of folds: each fold scores its own list with its last checkpoint; give only views and sizes"
        )

    name = given.name or evaluate.result_name(Path("ckpt.pth.tar"), given)
    return evaluate.checked_name(name), tuple(argv)
