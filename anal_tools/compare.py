"""`python main.py compare EXP EXP...`: test which experiment is better, in which classes, and list what differs.

Experiments are compared on the videos that both have, matched by path.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anal_tools import compare_runs, score
from anal_tools.evaluate import scoring
from anal_tools.evaluate.results import Results
from anal_tools.text import shown
from utils import metrics
from utils.errors import UserError
from utils.options import Parser

SHOWN = 10  # classes that are printed; the file has all


def main(argv: list[str]) -> int:
    """Parse the command line and compare the experiments."""
    parser = Parser(prog="main.py compare", description="Compare evaluated experiments.")
    parser.add_argument("exp", type=Path, nargs="+", help="experiment folders; EXP:NAME selects the results NAME")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="write the table of classes as CSV")
    parser.add_argument("--seeds", action="store_true", help="pool experiments whose configs differ only in `seed`")
    args = parser.parse_args(argv)
    if len(args.exp) < 2:
        raise UserError("compare: name at least two experiment folders (EXP:NAME selects another evaluation of one)")

    experiments = [load(str(exp)) for exp in args.exp]
    print("\n".join(compare_runs.seeds_text(experiments) if args.seeds else text(experiments)))
    if args.out:
        args.out.write_text(class_csv(experiments), "utf-8", errors="surrogateescape")
        print(f"written: {shown(str(args.out))}")
    return 0


@dataclass(frozen=True)
class Experiment:
    """An evaluation in a comparison.

    Attributes:
        exp: experiment folder.
        title: its name in the comparison.
        results: the evaluation.
    """

    exp: Path
    title: str
    results: Results


@dataclass(frozen=True)
class Pairing:
    """Two evaluations on the videos that both have.

    Attributes:
        rows_a, rows_b: (n,) rows of the videos, in the order of the first evaluation.
        right_a, right_b: (n,) bool, True where top-1 is right.
        only_a, only_b: number of videos that only one gets right.
        p: two-sided p of McNemar's test.
        change: (K,) recall of the second minus that of the first; nan for a class without videos.
    """

    rows_a: np.ndarray
    rows_b: np.ndarray
    right_a: np.ndarray
    right_b: np.ndarray
    only_a: int
    only_b: int
    p: float
    change: np.ndarray

    @property
    def difference(self) -> float:
        """Top-1 of the second minus that of the first on the common videos, in points (per cent)."""
        return 100 * (self.only_b - self.only_a) / max(len(self.rows_a), 1)


def load(where: str) -> Experiment:
    """Return the evaluation that `EXP` or `EXP:NAME` names.

    Raises:
        UserError: there is no such evaluation.
    """
    results = score.load(where)
    whole = results.exp.resolve()
    # With the parent's name: many experiments are called "start" or "base"
    title = f"{whole.parent.name}/{whole.name}" + ("" if Path(where).is_dir() else f" {results.name}")
    return Experiment(results.exp, shown(title), results)


def pair(a: Results, b: Results) -> Pairing:
    """Align two evaluations by their videos, and test whether one is better.

    Raises:
        UserError: classes or labels differ, or no video is in both.
    """
    if a.summary.get("class_names") != b.summary.get("class_names"):
        raise UserError(f"{a.name} and {b.name}: their classes differ; compare evaluations of the same classes")
    # By path: lists may differ in order and in length
    rows_a, rows_b = scoring.common_rows(a.ids, b.ids)
    if not len(rows_a):
        raise UserError(f"{a.name} and {b.name}: no video in common; compare evaluations of the same list")

    labels = a.labels[rows_a]
    if (labels != b.labels[rows_b]).any():
        row = int(np.flatnonzero(labels != b.labels[rows_b])[0])
        raise UserError(
            f"{shown(a.ids[rows_a[row]])}: label {labels[row]} in one list and {b.labels[rows_b[row]]} in the other; "
            "compare evaluations of the same labels"
        )

    # (n,) each
    right_a, right_b = (one.videos.right()[rows] for one, rows in ((a, rows_a), (b, rows_b)))
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())

    count = a.scores.shape[1]
    change = metrics.class_means(right_b.astype(float) - right_a, labels, count)
    return Pairing(rows_a, rows_b, right_a, right_b, only_a, only_b, mcnemar(only_a, only_b), change)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p of McNemar's test (McNemar 1947), exact at any count.

    If both were equally good, each video that only one gets right would be a fair coin flip, and the smaller count the
    tail of a binomial distribution. Integers are used, because floats underflow with thousands of videos.
    """
    total, least = only_a + only_b, min(only_a, only_b)
    term = tail = 1  # binomial coefficients of `total`
    for i in range(least):
        term = term * (total - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)


def config_differences(experiments: Sequence[Experiment]) -> list[tuple[str, list[str]]]:
    """Return the keys in which configs, protocols or weights differ, with the value of each experiment as text."""
    flat = [_flat(_described(one)) for one in experiments]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = [(key, [_text(values.get(key)) for values in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _described(one: Experiment) -> dict[str, object]:
    """Return the config that the evaluation kept (older results: that of the folder), and how it was evaluated."""
    from utils import config

    kept = one.results.summary.get("config")
    if kept is None:
        try:
            kept = config.to_dict(config.load(one.exp))
        except UserError:
            kept = {}

    # "text" repeats the other keys of the protocol
    protocol = {key: value for key, value in one.results.summary.get("protocol", {}).items() if key != "text"}
    rest = {key: one.results.summary.get(key) for key in ("step", "list_hash", "weights_hash")}

    return {"config": kept, "protocol": protocol, "evaluation": rest}


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        # Nested keys become dotted ones, so that each leaf is a row
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _text(value: object) -> str:
    """Return a value in one line, as the tables show it."""
    return shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def text(experiments: Sequence[Experiment]) -> list[str]:
    """Return the lines to print: accuracies, tests of all pairs, classes that changed most, and differences."""
    lines = []
    width = max(len(one.title) for one in experiments)
    for one in experiments:
        results = one.results
        protocol = results.summary.get("protocol", {}).get("text", "")
        shown_here = metrics.metrics_of("compare", multi_label=results.multi_label)
        shares = "  ".join(f"{metric.title} {results.numbers[metric.name]:.2f}" for metric in shown_here)
        lines.append(f"{one.title:<{width}}  {shares}  {len(results.ids)} videos, {protocol}")

    for a, b in itertools.combinations(experiments, 2):
        paired = pair(a.results, b.results)
        lines += [
            "",
            f"{a.title} -> {b.title}, {len(paired.rows_a)} videos in common: {paired.difference:+.2f} points of top-1",
            f"  only the first right {paired.only_a}, only the second {paired.only_b}: McNemar p = {paired.p:.3g}"
            f" ({verdict(paired)})",
            *compare_runs.folds_line(a.results, b.results),
            *_moved(paired, a.results.class_names),
        ]

    differences = config_differences(experiments)
    lines += ["", "differences of config and evaluation:" if differences else "config and evaluation are the same"]
    lines += [f"  {key}: {' | '.join(values)}" for key, values in differences]
    return lines


def verdict(paired: Pairing) -> str:
    """Return the result of the test in words, at the usual level of 5 per cent."""
    if paired.p >= 0.05:
        return "the difference may be chance"
    return f"the {'second' if paired.only_b > paired.only_a else 'first'} is better"


def _moved(paired: Pairing, names: Sequence[str]) -> list[str]:
    # A class without common videos (nan) has not changed
    order = np.argsort(-np.abs(np.nan_to_num(paired.change)), kind="stable")[:SHOWN]
    moved = [int(k) for k in order if np.nan_to_num(paired.change[k])]
    if not moved:
        return []
    width = max(len(shown(names[k])) for k in moved)
    return [
        "  largest changes in recall:",
        *(f"    {shown(names[k]):<{width}}  {100 * paired.change[k]:+.1f}" for k in moved),
    ]


def class_csv(experiments: Sequence[Experiment]) -> str:
    """Return a CSV of the recall of each class in each experiment, on the videos that it shares with the first."""
    first = experiments[0].results
    names = [shown(name) for name in first.class_names]
    columns = []
    for one in experiments:
        paired = pair(first, one.results)
        columns.append(metrics.class_means(paired.right_b, first.labels[paired.rows_a], len(names)))

    # newline="": the writer ends the lines itself
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["class", "name", *(one.title for one in experiments)])
    for k, name in enumerate(names):
        # Empty: the class has no video
        writer.writerow([k, name, *("" if np.isnan(column[k]) else f"{column[k]:.4f}" for column in columns)])
    return stream.getvalue()


def differences_note(experiments: Sequence[Experiment]) -> list[str]:
    """Return notes that a reader of a comparison needs: different lists or protocols."""
    notes = []
    summaries = [one.results.summary for one in experiments]

    if len({summary.get("list_hash") for summary in summaries}) > 1:
        notes.append(
            "The experiments were evaluated on different lists; they are compared on the videos that both have."
        )

    if len({json.dumps(summary.get("protocol", {}), sort_keys=True) for summary in summaries}) > 1:
        notes.append("The experiments were evaluated with different protocols.")

    return notes
