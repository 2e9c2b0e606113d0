"""`python main.py folds EXP`: print the table of a cross-validation, and pool all held-out videos in one result.

The pooled result is an ordinary one, `EXP/results/NAME`, so that every reader of results works on it. Its list is
`EXP/folds/held_out.txt`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from anal_tools import intervals
from anal_tools.evaluate import result_parts, scoring
from anal_tools.evaluate.results import Results, Summary
from anal_tools.text import columns, shown
from datasets.lists.folds import list_text, of, untrained
from datasets.lists.records import Records
from utils import files, metrics
from utils.errors import UserError
from utils.options import Parser

__all__ = ["FOLDER", "RESULT", "of", "untrained"]

FOLDER, RESULT = "folds", "latest"
LIST = "held_out.txt"


def main(argv: Sequence[str]) -> int:
    """Print the table; return 1 while folds are missing."""
    parser = Parser(prog="main.py folds", description="Pool the folds of an experiment.")
    parser.add_argument("exp", type=Path, help="experiment folder whose config has data.folds")
    parser.add_argument("--name", default=RESULT, help="name of the results of the folds (default: %(default)s)")
    args = parser.parse_args(argv)

    results_of, missing = evaluated(args.exp, args.name)
    results = None if missing else pool(args.exp, results_of, args.name)
    print("\n".join(table(results_of, results)))
    if missing:
        print(f"not evaluated yet: {', '.join(missing)}; {args.exp / 'train.sh'} PARTITION N runs what is missing")
        return 1
    print(f"results: {args.exp / 'results' / args.name}  (next: python main.py report {args.exp})")
    return 0


def evaluated(exp: Path, name: str) -> tuple[dict[str, Results], list[str]]:
    """Return the result of each fold that has one, and the names of the folds without one.

    Raises:
        UserError: the experiment has no folds yet.
    """
    # Folds are numbered; `lists` is next to them
    folders = [path.parent for path in (exp / FOLDER).glob("*/config.yaml") if re.fullmatch(r"\d+", path.parent.name)]
    if not folders:
        raise UserError(f"{exp / FOLDER}: there are no folds; set data.folds, and start {exp / 'train.sh'} PARTITION N")
    # The lists are complete: the folder of a fold may have been moved away.
    listed = {path.stem[4:-4] for path in (exp / FOLDER / "lists").glob("fold*_val.txt")}
    names = sorted({folder.name for folder in folders} | listed, key=int)

    there = [fold for fold in names if (exp / FOLDER / fold / "results" / f"{name}.json").is_file()]
    return (
        {fold: Results.load(exp / FOLDER / fold, name) for fold in there},
        [fold for fold in names if fold not in there],
    )


def pool(exp: Path, results_of: dict[str, Results], name: str) -> Results:
    """Write the results of all folds as one result of the experiment, unless it exists.

    Raises:
        UserError: the folds were evaluated in different ways, or a list has changed since.
    """
    # Nothing to do if the same results are pooled already
    _check_alike(results_of)
    digest = _digest(results_of.values())
    folder = exp / "results" / name
    if result_parts.summary_file(folder).is_file() and Results.load(exp, name).summary.get("weights_hash") == digest:
        return Results.load(exp, name)

    # One list of all held-out videos, and the summary of the result
    first = next(iter(results_of.values()))
    held_out = exp / FOLDER / LIST
    rows = [row for one in results_of.values() for row in _rows(one)]
    layout = str(first.summary.get("config", {}).get("data", {}).get("list_layout", "auto"))  # pyright: ignore
    files.write(held_out, list_text(rows, layout))
    labels = np.concatenate([one.labels for one in results_of.values()])
    targets = None if first.targets is None else np.concatenate([one.targets for one in results_of.values()])  # pyright: ignore
    videos = metrics.Videos(np.concatenate([one.scores for one in results_of.values()]), labels, targets)
    summary: Summary = {
        # Config, protocol and classes are those of each fold: `_check_alike` has compared them
        **first.summary,
        "metrics": metrics.evaluate(videos),
        "list": str(held_out),
        "list_hash": files.sha256(held_out),
        "weights": str(exp / FOLDER / "*" / Path(str(first.summary.get("weights"))).name),
        "weights_hash": digest,
        "seconds": round(sum(one.summary.get("seconds", 0) for one in results_of.values()), 3),
        "folds": {fold: {"videos": len(one.ids), **one.numbers} for fold, one in results_of.items()},
    }

    # Write each fold as a part, as the ranks of an evaluation write theirs
    owner = result_parts.owner_of({"folds": digest})
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for number, one in enumerate(results_of.values()):
        result_parts.write_part(folder / f"part-0-0000-{number:06d}.npz", one, start, owner)
        start += len(one.ids)
    # Ids are paths, in the order in which the parts were written
    ids = [path for one in results_of.values() for path in one.ids]
    result_parts.merge(folder, ids, labels, summary, targets=targets, owner=owner)
    return Results.load(exp, name)


def _check_alike(results_of: Mapping[str, Results]) -> None:
    """Raise a UserError if the folds were evaluated in different ways."""
    first = next(iter(results_of.values()))
    for fold, one in results_of.items():
        for key in ("class_names", "protocol", "root"):
            if one.summary.get(key) != first.summary.get(key):
                raise UserError(f"{one.folder}: fold {fold} was evaluated with a different {key}; evaluate it again")


def _digest(results: Iterable[Results]) -> str:
    """Return a hash that changes with the weights or the scores of any fold."""
    hashes = "".join(str(one.summary.get(key)) for one in results for key in ("weights_hash", "checksum"))
    return hashlib.sha256(hashes.encode()).hexdigest()


def _rows(one: Results) -> list[tuple[Records, int]]:
    """Return the records of a fold's list, in the order of its result."""
    config = one.summary.get("config", {})
    layout = str(config.get("data", {}).get("list_layout", "auto"))  # pyright: ignore
    file = str(one.summary.get("list"))

    records = Records.load(file, one.summary.get("root", ""), num_class=one.num_class, layout=layout)
    if records.list_hash != one.summary.get("list_hash"):
        raise UserError(f"{file}: has changed since fold {one.exp.name} was evaluated; evaluate it again")

    return [(records, i) for i in range(len(records))]


def table(results_of: dict[str, Results], pooled: Results | None) -> list[str]:
    """Return a line for each fold, mean and standard deviation of the folds, and the pooled numbers."""
    if not results_of:
        return []

    shown_here = metrics.metrics_of("score", multi_label=next(iter(results_of.values())).multi_label)
    rows = [["fold", "videos", *(one.head or one.title for one in shown_here)]]
    values = np.array([[one.numbers[metric.name] for metric in shown_here] for one in results_of.values()])

    for (fold, one), fold_values in zip(results_of.items(), values, strict=True):
        rows.append([fold, str(len(one.ids)), *(f"{value:.2f}" for value in fold_values)])
    if len(results_of) > 1:
        rows.append(["mean", "", *(f"{value:.2f}" for value in values.mean(axis=0))])
        # ddof=1: the folds are a sample
        rows.append(["std", "", *(f"{value:.2f}" for value in values.std(axis=0, ddof=1))])

    if pooled is None:
        return columns(rows)
    # Every video counts once: with folds of different sizes this is not the mean above
    rows.append(["all", str(len(pooled.ids)), *(f"{pooled.numbers[metric.name]:.2f}" for metric in shown_here)])
    unread = f", {int(pooled.failed.sum())} of them could not be read" if pooled.failed.any() else ""

    return [
        *columns(rows),
        f"{shown(shown_here[0].title)} over all {len(pooled.ids)} held-out videos{unread}: "
        f"{pooled.numbers[shown_here[0].name]:.2f}, 95 % interval {interval_text(pooled.videos.right())}",
    ]


def interval_text(right: np.ndarray) -> str:
    """Return the interval of the accuracy in words, and its method; `right` is (N,) bool."""
    # If all videos are right or all wrong, so is each resample: the bootstrap would give an interval without width
    if right.all() or not right.any():
        low, high = intervals.wilson(int(right.sum()), len(right))
        return f"{low:.2f} to {high:.2f} (Wilson)"
    low, high = (100 * end for end in scoring.interval(right))
    return f"{low:.2f} to {high:.2f} (bootstrap over videos)"
