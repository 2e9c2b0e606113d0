"""Find labels that may be wrong, by confident learning (Northcutt, Jiang and Chuang, JAIR 70, 2021, arXiv:1911.00068).

The scores must come from a model that did not train on these videos, as those of a validation list do.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from anal_tools.text import shown
from datasets.lists.correct import COLUMNS
from utils import files, metrics

if TYPE_CHECKING:
    from anal_tools.evaluate.results import Results

CSV = "label_suspects.csv"


@dataclass(frozen=True)
class Suspect:
    """A video whose label is in doubt.

    Attributes:
        row: its row of the results.
        label: its label.
        other: the class that it seems to belong to.
        score, label_score: scores of that class and of the label, 0..1.
    """

    row: int
    label: int
    other: int
    score: float
    label_score: float


def suspects(scores: np.ndarray, labels: np.ndarray) -> list[Suspect]:
    """Return the off-diagonal entries of the confident joint (section 3.1, equations 1 and 2), clearest first.

    The threshold of a class is the mean score in it of the videos with its label. A video is confident in the classes
    whose thresholds its scores reach, and suspected if the highest of these is not its label. Suspects are ranked by
    the normalised margin (section 3.2, prune by noise rate): score of the other class minus that of the label.

    Args:
        scores: (N, K) probabilities; rows of nan (videos that could not be read) are left out.
        labels: (N,).
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=np.int64)
    rows = np.flatnonzero(~np.isnan(scores).any(axis=1))
    if not len(rows):
        return []

    read, own_class = scores[rows], labels[rows]
    given = read[np.arange(len(rows)), own_class].astype(np.float64)  # (n,)
    # A class without videos has no threshold: nothing is confident in it.
    threshold = metrics.class_means(given, own_class, scores.shape[1], empty=np.inf)

    confident = np.where(read >= threshold, read, -1.0)  # (n, K)
    other = confident.argmax(axis=1)
    best = confident[np.arange(len(rows)), other].astype(np.float64)
    wrong = np.flatnonzero((best >= 0) & (other != own_class))
    wrong = wrong[np.argsort(given[wrong] - best[wrong], kind="stable")]  # given - best rises from the clearest on
    return [
        Suspect(int(rows[i]), int(own_class[i]), int(other[i]), float(best[i]), float(given[i])) for i in wrong.tolist()
    ]


def write_csv(path: Path, doubtful: Sequence[Suspect], results: Results) -> None:
    """Write labels in doubt for `main.py lists --drop` and `--relabel`, clearest first (datasets/lists/correct.py)."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)

    # A list may hold a path several times, with other parts or labels
    seen: Counter[str] = Counter()
    entries = []  # which of the records with the same path each row is, from 1
    for name in results.ids:
        seen[name] += 1
        entries.append(seen[name])

    for one in doubtful:
        where = [results.ids[one.row], entries[one.row], one.label, one.other]
        names = [shown(results.class_names[number]) for number in (one.label, one.other)]
        table.writerow([*where, *names, f"{one.score:.4f}", f"{one.label_score:.4f}"])
    files.write_text(path, text.getvalue(), errors="surrogateescape")
