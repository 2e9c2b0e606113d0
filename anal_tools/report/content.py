"""Collect the data of the page: one or several evaluations as compact plain values."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from anal_tools import allowed_pairs, analyze, compare, folds, intervals, label_errors, score
from anal_tools.analyze import Analysis
from anal_tools.compare import Experiment
from anal_tools.evaluate import scoring
from anal_tools.evaluate.protocols import FAMILIES
from anal_tools.evaluate.results import Results
from anal_tools.report.media import Pictures
from anal_tools.report.page import words
from anal_tools.text import shown
from utils import log, metrics, ranking
from utils.errors import UserError

UNREAD, ABSENT = 0xFFFF, 0xFFFE  # instead of a predicted class; js/data.js has the same
TOP = 5  # guesses of each video
PIECE = 2000  # names of videos that the page parses at a time
SUSPECTS = 500  # labels in doubt on the page
CURVE_POINTS = 600  # of each curve
CLIPS = (1, 2, 3, 5, 10)  # numbers of clips in the curve over views
_ALIKE_LIMIT = 1000  # more classes than this are not ordered by similarity: it takes cubic time


class ViewPoint(TypedDict):
    """Accuracy of some of the kept views."""

    text: str
    views: int
    gmacs: float | None
    top1: float
    top5: float


def blocks(
    experiments: Sequence[Experiment],
    analyses: Sequence[Analysis],
    media: dict[int, Pictures],
    *,
    pictures: str,
    maps: Sequence[str] = (),
    suspects: str = "",
) -> dict[str, object]:
    """Return all JSON blocks of the page, by the id of their element.

    Args:
        experiments: the first gives the list of videos; the others show the subset that they have.
        analyses: one for each experiment.
        media: row -> pictures.
        pictures: a line about the pictures.
        maps: a line about the maps of each experiment, "" for none.
        suspects: file next to the page with the suspected label errors of the first experiment.
    """
    first = experiments[0].results
    pooled = first.summary.get("folds") or {}

    rows = [scoring.common_rows(first.ids, one.results.ids) for one in experiments]
    parts: dict[str, object] = {
        "report-data": {
            "classes": analyses[0].names,
            "videos": len(first.ids),
            "top": min(TOP, first.scores.shape[1]),
            "piece": PIECE,
            "listed": analyze.TOP,
            "labels": words(first.labels),
            "allowed": sorted([int(a), int(b)] for a, b in analyses[0].allowed),
            "pictures": pictures,
            "maps": list(maps) or [""] * len(experiments),
            "suspects": suspects,
            "folds": [[shown(fold), int(about["videos"])] for fold, about in pooled.items()],
            "media": {str(row): values for row, values in media.items()},
            "experiments": [
                about(one, analysis, places) for one, analysis, places in zip(experiments, analyses, rows, strict=True)
            ],
            "comparison": comparison(experiments) if len(experiments) > 1 else None,
        }
    }

    # Separate blocks: the page parses each one when it first needs it
    for index, (one, places) in enumerate(zip(experiments, rows, strict=True)):
        parts[f"experiment-{index}"] = arrays(one.results.scores, one.results.labels, places, len(first.ids))
    for piece, start in enumerate(range(0, len(first.ids), PIECE)):
        parts[f"names-{piece}"] = [shown(name) for name in first.ids[start : start + PIECE]]
    return parts


def arrays(scores: np.ndarray, labels: np.ndarray, rows: tuple[np.ndarray, np.ndarray], count: int) -> dict[str, str]:
    """Return the TOP guesses of each video with their scores, and score and rank of its own class, as base64.

    Args:
        scores: (N, K).
        labels: (N,).
        rows: rows on the page, and the rows of `scores` that belong there.
        count: number of videos on the page.
    """
    here, there = rows
    own_scores = np.asarray(scores[there], dtype=np.float64)
    unread = np.any(np.isnan(own_scores), axis=1)
    own_scores[unread] = 0

    top = min(TOP, own_scores.shape[1])
    order = ranking.order(own_scores)  # (n, K)
    label_scores = np.take_along_axis(own_scores, labels[there][:, None].astype(np.int64), axis=1)[:, 0]  # (n,)
    rank = ranking.rank_of(own_scores, labels[there])  # (n,) ranks from 0 on

    # Videos that this experiment does not have stay ABSENT
    guess = np.full((count, top), ABSENT, np.uint16)
    score, true_score, true_rank = np.zeros((count, top)), np.zeros(count), np.zeros(count)
    guess[here] = np.where(unread[:, None], UNREAD, order[:, :top])
    score[here] = np.take_along_axis(own_scores, order[:, :top], axis=1)
    true_score[here], true_rank[here] = label_scores, np.minimum(rank, UNREAD)
    return {"guess": words(guess), "score": words(_16(score)), "own": words(_16(true_score)), "rank": words(true_rank)}


def _16(shares: np.ndarray) -> np.ndarray:
    return np.clip(np.round(shares * 65535), 0, 65535)  # 0..1 in 16 bits


def about(one: Experiment, analysis: Analysis, rows: tuple[np.ndarray, np.ndarray]) -> dict[str, object]:
    """Return what the page shows of one experiment besides its predictions."""
    place = dict(zip(rows[1].tolist(), rows[0].tolist(), strict=True))
    doubtful = label_errors.suspects(one.results.scores, one.results.labels)
    numbers = analyze.per_class(analysis)

    return {
        "name": one.title,
        "overview": overview(one, analysis),
        "classes": {key: [_number(value) for value in numbers[key]] for key in ("precision", "ap")},
        "alike": words(alike(analysis.matrix)) if len(analysis.names) <= _ALIKE_LIMIT else None,
        "suspects": [
            [place[s.row], s.other, round(s.score, 4), round(s.label_score, 4)] for s in doubtful if s.row in place
        ][:SUSPECTS],
        "curves": curves_of(one.exp, one.results),
        "views": points(one.results),
        "folds": fold_table(one.results),
        "advice": advice(one.results),
    }


def overview(one: Experiment, analysis: Analysis) -> list[tuple[str, str]]:
    """Return titles and texts of the table on the first page; every experiment has the same titles."""
    summary, predicted = one.results.summary, analysis.predicted
    protocol = summary.get("protocol", {})
    cost, counts = summary.get("cost", {}), summary.get("counts", {})
    gmacs, parameters = cost.get("gmacs_per_video"), cost.get("parameters")
    allowed = allowed_pairs.accuracy(predicted, one.results.labels, analysis.allowed)

    measured = metrics.metrics_of("report")
    ends = intervals.of_metrics(one.results.videos, measured)
    first, *others = [
        (metric.title, _with_interval(metric.on_page(one.results.numbers[metric.name]), ends[metric.name]))
        for metric in measured
    ]

    rows = [
        first,
        ("top-1 with allowed pairs", f"{100 * allowed:.2f} %" if analysis.allowed else ""),
        *others,
        ("videos", f"{len(predicted)}, {int((predicted < 0).sum())} of them could not be read and count as wrong"),
        ("repaired, repeated", f"{counts.get('repaired', 0)}, {counts.get('duplicates', 0)}"),
        ("protocol", str(protocol.get("text", "–"))),
        ("GMACs per video", f"{gmacs:.2f}" if gmacs else "–"),
        ("parameters", f"{parameters / 1e6:.2f} million" if parameters else "–"),
        ("list", str(summary.get("list", "–"))),
        ("weights", str(summary.get("weights", "–"))),
        ("iteration", str(summary.get("step") or "–")),
        ("results", str(one.results.name)),
    ]
    return [(title, shown(text)) for title, text in rows if text]


def _with_interval(number: str, ends: tuple[float, float]) -> str:
    text = intervals.text(ends)
    return f"{number}  ({text})" if text else number


def fold_table(results: Results) -> dict[str, object] | None:
    """Return the numbers of each fold of a pooled result, their mean and standard deviation; None without folds."""
    pooled = results.summary.get("folds")
    if not pooled:
        return None

    # Only metrics that all folds have: older results may lack one
    measured = [one for one in metrics.metrics_of("report") if all(one.name in about for about in pooled.values())]
    values = np.array([[about[one.name] for one in measured] for about in pooled.values()])  # (folds, metrics)

    return {
        "columns": [one.title for one in measured],
        "rows": [
            [shown(fold), int(about["videos"]), fold_values]
            for (fold, about), fold_values in zip(pooled.items(), values.round(4).tolist(), strict=True)
        ],
        "mean": values.mean(axis=0).round(4).tolist(),
        "std": values.std(axis=0, ddof=1).round(4).tolist() if len(values) > 1 else None,
        "all": [round(results.numbers[one.name], 4) for one in measured],
    }


def advice(results: Results) -> str:
    """Return a sentence on how to evaluate more views with this sampling; "" if more than one was evaluated."""
    kept = scoring.kept_protocol(results)
    if kept.spec.views > 1:
        return ""

    for clips in (10, 5, 3, 2, 1):  # a preset may define fewer test clips than others
        try:
            spec = dataclasses.replace(kept.spec, num_clips=clips, crops=FAMILIES[kept.family][3])
        except UserError:
            continue
        views = f"{spec.num_clips}x{spec.crops_per_clip}"
        how = f"eval.sh PARTITION N --views {views}" if results.summary.get("folds") else f"eval EXP --views {views}"
        return f"One view was evaluated; evaluate with more ({how}) to see whether they help."
    return "One view was evaluated; the sampling and crops of this experiment define no more."


def points(results: Results) -> list[ViewPoint]:
    """Return the accuracy of the kept views and of subsets of them, fewest views first."""
    kept = scoring.kept_protocol(results)
    clips = sorted({count for count in CLIPS if count < kept.spec.num_clips} | {kept.spec.num_clips})

    view_points: list[ViewPoint] = []
    for count, crops in itertools.product(clips, (1, 3, 10)):
        try:
            row = score.row([results], views=f"{count}x{crops}")
        except UserError:
            continue  # these crops were not kept
        view_points.append(
            {
                "text": f"{count} x {crops}" + (" (near)" if row.note else ""),
                "views": row.number,
                "gmacs": round(row.gmacs, 3) if row.gmacs else None,
                "top1": 100 * float(row.right[1].mean()),
                "top5": 100 * float(row.right[5].mean()),
            }
        )

    return sorted(view_points, key=lambda point: point["views"])


def alike(matrix: np.ndarray) -> np.ndarray:
    """Return an order of the classes in which classes that are confused are neighbours.

    Average linkage (Sokal and Michener 1958): join the two most similar groups of classes until one is left. The
    similarity of two classes is the share of either one's videos that goes to the other.

    Args:
        matrix: (K, K) counts.

    Returns:
        (K,) classes.
    """
    count = len(matrix)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    near = shares + shares.T  # (K, K), of groups; -1 where a group no longer exists
    np.fill_diagonal(near, -1)

    groups = [[k] for k in range(count)]
    for _ in range(count - 1):
        a, b = sorted(divmod(int(near.argmax()), count))
        # Mean over all pairs of classes of the two groups; group b lives on in row a
        joined = (len(groups[a]) * near[a] + len(groups[b]) * near[b]) / (len(groups[a]) + len(groups[b]))
        joined[[a, b]] = -1
        near[a] = near[:, a] = joined
        near[b] = near[:, b] = -1
        groups[a] += groups[b]
    return np.array(groups[0])


def curves(exp: Path) -> dict[str, list[list[float]]]:
    """Return the training curves with at most CURVE_POINTS points each, without values that are not finite."""
    return {shown(tag): _thin(points) for tag, points in _recorded(exp)}


def _recorded(exp: Path) -> list[tuple[str, list[list[float]]]]:
    path = exp / "events" / log.SCALARS
    if not path.is_file():
        return []
    return [(tag, [[step, value] for step, value in points]) for tag, points in log.read_scalars(path).items()]


def _thin(points: list[list[float]]) -> list[list[float]]:
    # Six digits are enough for a curve
    finite = [[step, float(f"{value:.6g}")] for step, value in points if math.isfinite(value)]
    picked = np.unique(np.linspace(0, len(finite) - 1, min(len(finite), CURVE_POINTS)).round().astype(int))
    return [finite[i] for i in picked] if finite else []


def curves_of(exp: Path, results: Results) -> dict[str, list[list[float]]]:
    """Return the training curves of an experiment; with folds their mean, at the steps that all folds have."""
    pooled = results.summary.get("folds")
    if not pooled:
        return curves(exp)

    each: list[dict[str, dict[float, float]]] = []  # of each fold: tag -> step -> value
    for fold in pooled:
        recorded = _recorded(exp / folds.FOLDER / fold)
        each.append({tag: {step: value for step, value in points} for tag, points in recorded})

    by_tag = {}
    for tag in each[0]:
        if all(tag in points for points in each):
            steps = sorted(set.intersection(*(set(points[tag]) for points in each)))
            by_tag[tag] = _thin([[step, float(np.mean([points[tag][step] for points in each]))] for step in steps])
    return by_tag


def comparison(experiments: Sequence[Experiment]) -> dict[str, object]:
    """Return the tests of all pairs, the changes of the classes, and the differences between the experiments."""
    pairs = []
    for a, b in itertools.combinations(range(len(experiments)), 2):
        paired = compare.pair(experiments[a].results, experiments[b].results)
        pairs.append(
            {
                "a": a,
                "b": b,
                "videos": len(paired.rows_a),
                "only_a": paired.only_a,
                "only_b": paired.only_b,
                "difference": paired.difference,
                "interval": [
                    round(100 * end, 4) for end in scoring.interval(paired.right_b.astype(np.float64) - paired.right_a)
                ],
                "p": paired.p,
                "classes": [_number(value) for value in paired.change],
            }
        )

    return {
        "pairs": pairs,
        "differences": compare.config_differences(experiments),
        "notes": compare.differences_note(experiments),
    }


def _number(value: float) -> float | None:
    """Return a number for JSON, which has no NaN and no infinity."""
    return round(float(value), 5) if math.isfinite(value) else None
