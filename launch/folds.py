"""Run `train.sh` and `eval.sh` of an experiment with `data.folds`: train and evaluate each fold (docs/folds.md).

The folds are the cells of a sweep in `EXP/folds`, so that they start, stop, resume and are submitted like cells. A cell
is two calls of main.py, train and then eval; it is done when its result exists.
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
from launch.grid import Cell, Sweep
from utils import config
from utils.errors import UserError
from utils.options import Parser


@dataclass(frozen=True)
class FoldSweep(Sweep):
    """The folds of one experiment.

    Attributes:
        sets: `--set` texts.
        result: name of the result of each fold, and of the pooled result.
    """

    sets: tuple[str, ...] = ()
    result: str = pooled.RESULT

    def cells(self) -> list[Cell]:
        """Return a cell for each fold; write the lists that do not exist yet."""
        (exp,) = self.exps
        cfg = config.load(exp, self.sets)
        # The keys data.fold* describe the split itself. A cell trains on one part of it, with plain lists.
        values = [tuple(text.removeprefix("common.").split("=", 1)) for text in self.sets]
        values = [(key, value) for key, value in values if not key.startswith("data.fold")]

        cells = []
        for fold in pooled.of(cfg, self.folder / "lists"):
            keys = {"train_source": fold.train, "val_source": fold.val}
            keys |= {"train_root": fold.root, "val_root": fold.root} if fold.root else {}
            keys |= {"data.class_names": name} if (name := config.class_names_file(cfg)) else {}

            # Quoted for YAML.
            texts = [(key, json.dumps(str(value), ensure_ascii=False)) for key, value in keys.items()]
            cells.append(Cell(fold.name, exp, (*values, ("data.folds", "null"), *texts)))

        return cells

    def exp_of(self, cell: Cell) -> Path:
        """Return the experiment folder of a fold."""
        return self.folder / cell.name

    def result_of(self, cell: Cell) -> Path:
        """Return the summary that an evaluated fold leaves."""
        return self.exp_of(cell) / "results" / f"{self.result}.json"

    def commands(self, cell: Cell) -> list[list[str]]:
        """Return the words for main.py: the training of a fold, unless it is finished, and its evaluation."""
        exp = self.exp_of(cell)
        train = [] if sweep.is_trained(exp) else [["train", str(exp)]]
        return [*train, ["eval", str(exp), "--checkpoint", "latest", *self.options, "--name", self.result]]

    @property
    def next_step(self) -> str:
        """The user's next command once all folds are done."""
        return f"`python main.py folds {self.exps[0]} --name {self.result}` makes the table"


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run the missing folds; once all are done, pool their results and print the table.

    Args:
        args: the parsed arguments of `launch`.
        rest: `--parallel`, and words for main.py.
    """
    parser = Parser(prog=f"launch {args.verb}", allow_abbrev=False)
    parser.add_argument("--parallel", type=int)
    given, words = parser.parse_known_args(rest)
    words = [word for word in words if word != "--"]
    options.check(args.verb, words, near=["set", "time", "parallel"])
    exp = Path(os.path.abspath(args.exp))

    # A fold's result is part of a pooled number: training it again silently would mix two runs.
    if "--fresh" in words:
        raise UserError(f"--fresh: move {exp / pooled.FOLDER} away instead; a fold never runs twice")
    if args.ranks < 0 or (given.parallel is not None and given.parallel < 1):
        raise UserError("N must be 0 or more, and --parallel 1 or more")

    name, eval_words = _evaluation(args.verb, words)
    folds = FoldSweep(exp / pooled.FOLDER, "folds", (exp,), (), eval_words, tuple(args.set), name)
    # Check files once here, not in each fold's job.
    cfg = config.load(exp, args.set)
    config.check_files(cfg)
    for line in pooled.untrained(pooled.of(cfg, folds.folder / "lists"), cfg):
        print(line)

    code = sweep.run(folds, argparse.Namespace(**{**vars(args), "parallel": given.parallel, "retry": False}))
    # On a partition the jobs are only submitted: a later call finds their results and pools them.
    if code or args.dry_run or not all(folds.result_of(cell).is_file() for cell in folds.cells()):
        return code
    return pooled.main([str(exp), "--name", name])


def _evaluation(verb: str, words: list[str]) -> tuple[str, tuple[str, ...]]:
    """Return the name of the result, and the words for `main.py eval`; with `train` there are no such words."""
    from anal_tools import evaluate

    if verb == "train":
        return pooled.RESULT, ()

    # Parsed here only to see which options are given; they are passed on unchanged.
    given, others = evaluate.parser().parse_known_args(["EXP", *words])
    if given.checkpoint or given.list or given.set or others:
        raise UserError(
            "eval of folds: each fold scores its own list with its last checkpoint; give views and sizes only"
        )

    name = given.name or evaluate.result_name(Path("ckpt.pth.tar"), given)
    return evaluate.checked_name(name), tuple(words)
