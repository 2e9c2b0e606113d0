"""Which labels are perhaps wrong: confident learning (Northcutt, Jiang and Chuang, JAIR 70, 2021, arXiv:1911.00068).

The scores must come from a model that did not train on these videos, as those of a validation list do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from utils import metrics


@dataclass(frozen=True)
class Suspect:
    """One video whose label is in doubt.

    Attributes:
        row: of the results.
        label: its label.
        other: the class that it seems to belong to.
        score, own: scores of that class and of the label, 0..1.
    """

    row: int
    label: int
    other: int
    score: float
    own: float


def suspects(scores: np.ndarray, labels: np.ndarray) -> list[Suspect]:
    """The off-diagonal entries of the confident joint (section 3.1, equations 1 and 2), clearest first.

    The threshold of a class is the mean score that videos labelled with it have in it. A video is confident in the
    classes whose thresholds its scores reach; it is suspected if the highest of them is not its label. They are ranked
    by the normalised margin (section 3.2, prune by noise rate): score of the other class less that of the label.

    Args:
        scores: (N, K) probabilities; rows of nan (videos that could not be read) are left out.
        labels: (N,).
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=np.int64)
    rows = np.flatnonzero(~np.isnan(scores).any(axis=1))
    if not len(rows):
        return []
    read, own_class = scores[rows], labels[rows]
    own = read[np.arange(len(rows)), own_class].astype(np.float64)
    # A class without videos has no threshold: nothing is confident in it.
    threshold = metrics.class_means(own, own_class, scores.shape[1], empty=np.inf)
    confident = np.where(read >= threshold, read, -1.0)  # (n, K)
    other = confident.argmax(axis=1)
    best = confident[np.arange(len(rows)), other].astype(np.float64)
    found = np.flatnonzero((best >= 0) & (other != own_class))
    found = found[np.argsort(own[found] - best[found], kind="stable")]
    return [
        Suspect(int(rows[i]), int(own_class[i]), int(other[i]), float(best[i]), float(own[i])) for i in found.tolist()
    ]
