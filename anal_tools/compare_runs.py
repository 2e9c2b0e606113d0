"""Compare more than two single runs: runs that differ only in their seed, and folds side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from anal_tools.evaluate import scoring
from anal_tools.evaluate.results import Results
from utils.errors import UserError

if TYPE_CHECKING:
    from anal_tools.compare import Experiment


@dataclass(frozen=True)
class RunGroup:
    """Runs whose configs differ only in `seed`, on the videos that all of them have.

    Attributes:
        title: name of the first run in the comparison.
        first: result of the first run.
        rows: (n,) rows of the videos in the first result.
        right: (runs, n) bool, True where top-1 is right.
    """

    title: str
    first: Results
    rows: np.ndarray
    right: np.ndarray

    @property
    def accuracies(self) -> np.ndarray:
        """Top-1 of each run in per cent, (runs,)."""
        return 100 * self.right.mean(axis=1)

    @property
    def line(self) -> str:
        """The recipe in one line: number of seeds, mean, spread and interval of top-1."""
        values = self.accuracies
        spread = f", std {values.std(ddof=1):.2f}" if len(values) > 1 else ""
        # A video counts by the share of runs that get it right, so the interval is over videos and not over runs
        low, high = (100 * end for end in scoring.interval(self.right.mean(axis=0)))
        return (
            f"{self.title}: {len(values)} seeds, top-1 mean {values.mean():.2f}{spread} "
            f"({values.min():.2f} to {values.max():.2f}), 95 % interval over {len(self.rows)} videos {low:.2f} to "
            f"{high:.2f}"
        )


def recipes(experiments: Sequence[Experiment]) -> list[RunGroup]:
    """Group evaluations by their config without the seed, in the order in which each group begins.

    Raises:
        UserError: an evaluation did not keep its config, or two runs of a group have the same seed.
    """
    groups: dict[str, list[Experiment]] = {}
    for one in experiments:
        config = dict(one.results.summary.get("config", {}))
        if not config:
            raise UserError(f"{one.results.folder}: has no config; evaluate it again to compare seeds")
        # Config and protocol as text: equal texts are one recipe
        seed = config.pop("seed", 0)
        group = groups.setdefault(json.dumps([config, one.results.protocol], sort_keys=True), [])
        if any(other.results.summary.get("config", {}).get("seed", 0) == seed for other in group):
            raise UserError(
                f"{one.title} and {group[0].title}: two runs of one recipe with seed {seed}; name each once"
            )
        group.append(one)

    return [_recipe(group) for group in groups.values()]


def _recipe(group: Sequence[Experiment]) -> RunGroup:
    first = group[0].results
    # Videos that all runs have, as rows of the first
    rows = np.arange(len(first.ids))
    for one in group[1:]:
        rows = np.intersect1d(rows, scoring.common_rows(first.ids, one.results.ids)[0])

    right = []
    for one in group:
        here, there = scoring.common_rows([first.ids[row] for row in rows], one.results.ids)
        if len(here) < len(rows):
            raise UserError(f"{one.title}: lacks videos of {group[0].title}")
        right.append(one.results.videos.right()[there])

    return RunGroup(group[0].title, first, rows, np.array(right))


def seeds_text(experiments: Sequence[Experiment]) -> list[str]:
    """Return a line for each recipe, and the difference of each pair with its bootstrap interval over videos."""
    groups = recipes(experiments)
    lines = [one.line for one in groups]
    for a, b in itertools.combinations(groups, 2):
        here, there = scoring.common_rows([a.first.ids[row] for row in a.rows], [b.first.ids[row] for row in b.rows])
        if not len(here):
            raise UserError(f"{a.title} and {b.title}: no video in common; compare evaluations of the same list")

        # (n,) the change of each video in the share of runs that get it right
        change = b.right[:, there].mean(axis=0) - a.right[:, here].mean(axis=0)
        low, high = (100 * end for end in scoring.interval(change))
        verdict = (
            "the difference may be chance" if low <= 0 <= high else f"the {'second' if low > 0 else 'first'} is better"
        )

        lines += [
            "",
            f"{a.title} -> {b.title}, {len(here)} videos in common: {100 * change.mean():+.2f} points of top-1, "
            f"95 % interval {low:+.2f} to {high:+.2f} (bootstrap over videos; {verdict})",
        ]
    return lines


def folds_line(a: Results, b: Results) -> list[str]:
    """Return in how many folds each of two pooled results is better; nothing if they share no fold."""
    first, second = (one.summary.get("folds", {}) for one in (a, b))
    common = [name for name in first if name in second and first[name]["videos"] == second[name]["videos"]]
    if not common:
        return []

    change = np.array([second[name]["top1"] - first[name]["top1"] for name in common])
    spread = f", std {change.std(ddof=1):.2f}" if len(change) > 1 else ""
    return [
        f"  of {len(common)} folds the second is better in {(change > 0).sum()}, the first in {(change < 0).sum()}: "
        f"mean difference {change.mean():+.2f}{spread}"
    ]
