"""`python main.py analyze EXP`: list the mistakes of a model, from the results of an evaluation."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anal_tools import allowed_pairs, label_errors
from anal_tools.allowed_pairs import Pair
from anal_tools.evaluate.results import Results
from anal_tools.get_reference_results import write_reference_results
from anal_tools.text import one_line, shown, write_lines
from utils import metrics, ranking
from utils.errors import UserError, counted
from utils.options import Parser

TOP = 100  # error pairs and videos that are listed


def main(argv: list[str]) -> int:
    """Parse the command line and analyse one evaluation."""
    parser = Parser(prog="main.py analyze", description="Show what a model gets wrong.")
    parser.add_argument("exp", type=Path, help="experiment folder that was evaluated")
    parser.add_argument("--name", default=None, help="name of the results (default: the last evaluation)")
    parser.add_argument(
        "--good-pairs",
        type=Path,
        default=None,
        metavar="FILE",
        help="rules `child -> parent`, one per line: predictions that do not count as mistakes",
    )

    args = parser.parse_args(argv)
    print(run(args.exp, args.name, good_pairs=args.good_pairs))
    return 0


@dataclass(frozen=True)
class Analysis:
    """The counted predictions of one evaluation, from which all lists are made.

    Attributes:
        results: the evaluation.
        names: K class names, printable.
        predicted: (N,) classes, -1 for a video that could not be read.
        matrix: (K, K) counts, rows true.
        videos: (K,) number of videos of each class, including those that could not be read.
        allowed: pairs that are not mistakes.
    """

    results: Results
    names: list[str]
    predicted: np.ndarray
    matrix: np.ndarray
    videos: np.ndarray
    allowed: frozenset[Pair]

    @classmethod
    def of(cls, results: Results, good_pairs: Path | None = None) -> Analysis:
        """Count one evaluation; `good_pairs` is the file of allowed pairs.

        Raises:
            UserError: its files do not fit together, or a rule is wrong.
        """
        names = class_names(results)
        predicted = results.videos.predicted
        return cls(
            results=results,
            names=names,
            predicted=predicted,
            matrix=metrics.confusion_matrix(predicted, results.labels, len(names)),
            videos=np.bincount(results.labels, minlength=len(names)),
            allowed=allowed_pairs.read(good_pairs, names) if good_pairs else frozenset(),
        )

    @property
    def recall(self) -> np.ndarray:
        """Recall of each class, (K,), 0..1; nan for a class without videos."""
        return metrics.precision_and_recall(self.predicted, self.results.labels, len(self.names))[1]

    def errors(self, allowed: Collection[Pair] | None = None) -> np.ndarray:
        """Return the matrix without its diagonal and without allowed pairs."""
        errors = self.matrix - np.diag(self.matrix.diagonal())
        for pair in self.allowed if allowed is None else allowed:
            errors[pair] = 0
        return errors


def run(exp: Path, name: str | None = None, *, good_pairs: Path | None = None) -> str:
    """Write all lists of one evaluation into ``results/``.

    Args:
        exp: experiment folder.
        name: name of the results; None for the last evaluation.
        good_pairs: file of allowed pairs (`allowed_pairs.read`).

    Returns:
        The summary to print.

    Raises:
        UserError: there is no such evaluation, or its files do not fit together.
    """
    exp = Path(exp)
    results = Results.load(exp, name)
    folder = exp / "results"

    analysis = Analysis.of(results, good_pairs)
    files = [write_reference_results(exp, results)]
    doubtful = label_errors.suspects(results.scores, results.labels)

    # Lists as text
    for file, lines in (
        ("top100_errors.txt", error_lines(analysis)),
        ("top100_videos.txt", video_lines(analysis)),
        ("label_suspects.txt", suspect_lines(analysis, doubtful)),
    ):
        files.append(folder / file)
        write_lines(files[-1], lines)

    files.append(folder / label_errors.CSV)
    label_errors.write_csv(files[-1], doubtful, results)

    # Tables as CSV
    for file, table in (
        ("confusion_matrix.csv", matrix_table(analysis)),
        ("per_class.csv", class_table(analysis)),
    ):
        files.append(folder / file)
        with open(files[-1], "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            csv.writer(stream).writerows(table)

    # matplotlib takes a second to import, and only the picture needs it
    files.append(folder / "confusion_matrix.png")
    from anal_tools import confusion_plot

    confusion_plot.draw(files[-1], analysis.matrix, analysis.names, title=f"{exp.resolve().name}, {results.name}")
    return "\n".join([*summary(analysis, len(doubtful)), "written:", *(f"  {shown(str(file))}" for file in files)])


def class_names(results: Results) -> list[str]:
    """Return the names of all K classes, including those without a video.

    Raises:
        UserError: there are no videos, or they have several labels.
    """
    if results.multi_label:
        where = results.folder
        raise UserError(f"{where}: these videos have several labels; their metrics are in {where}.json")
    if not results.ids:
        raise UserError(f"{results.folder}: it has no videos; evaluate a list with videos")
    return [shown(name) for name in results.class_names]


def error_lines(analysis: Analysis) -> list[str]:
    """Return the most frequent (true, predicted) pairs of different classes, in Pytorch Video Analysis's format.

    `prec` is the recall of the true class, `err` the share of its videos that went to the predicted one. Allowed pairs
    are left out.
    """
    errors, matrix, videos, names = analysis.errors(), analysis.matrix, analysis.videos, analysis.names
    order = np.argsort(-errors, axis=None, kind="stable")[:TOP]  # flat indices into (K, K)
    lines = []
    for true, guess in zip(*np.unravel_index(order, errors.shape), strict=True):
        # The counts fall, so only zeros follow
        if (count := errors[true, guess]) == 0:
            break
        lines.append(
            f"gt:{true}({names[true]})\tpred:{guess}({names[guess]})\tcount:{count}\t"
            # `err` has no colon in this format
            f"prec:{matrix[true, true] / videos[true]:.4f}\terr{count / videos[true]:.4f}\t"
            f"gt_samples:{videos[true]}/{videos.sum()}"
        )
    return lines


def worst_videos(analysis: Analysis, top: int = TOP) -> list[int]:
    """Return the rows of the wrong videos with the highest scores, without allowed pairs and unreadable videos."""
    labels, predicted, scores = analysis.results.labels, analysis.predicted, analysis.results.scores
    # Unreadable videos (-1) are wrong, but not a mistake of the model
    wrong = np.flatnonzero((predicted != labels) & (predicted >= 0))
    # A stable sort keeps equal scores in the order of the list
    wrong = wrong[np.argsort(-scores[wrong, predicted[wrong]], kind="stable")]
    rows = [int(row) for row in wrong if (int(labels[row]), int(predicted[row])) not in analysis.allowed]
    return rows[:top]


def video_lines(analysis: Analysis) -> list[str]:
    """Return the most confident mistakes: path, truth, prediction, score of the prediction and of the truth."""
    results, names = analysis.results, analysis.names
    lines = []
    for row in worst_videos(analysis):
        true, guess = results.labels[row], analysis.predicted[row]
        lines.append(
            f"{one_line(results.ids[row])}\tgt:{true}({names[true]})\tpred:{guess}({names[guess]})\t"
            f"score:{results.scores[row, guess]:.4f}\tgt_score:{results.scores[row, true]:.4f}"
        )
    return lines


def suspect_lines(analysis: Analysis, doubtful: Sequence[label_errors.Suspect]) -> list[str]:
    """Return the videos whose label is in doubt: path, label, the class that it may belong to, both scores."""
    return [
        f"{one_line(analysis.results.ids[one.row])}\tlabel:{one.label}({analysis.names[one.label]})\t"
        f"perhaps:{one.other}({analysis.names[one.other]})\tscore:{one.score:.4f}\tlabel_score:{one.label_score:.4f}"
        for one in doubtful
    ]


def matrix_table(analysis: Analysis) -> list[list[object]]:
    """Return the counts with the true classes down and the predicted ones across, and their heads."""
    heads = [f"{index}({name})" for index, name in enumerate(analysis.names)]
    return [["gt \\ pred", *heads], *([head, *row] for head, row in zip(heads, analysis.matrix.tolist(), strict=True))]


def class_table(analysis: Analysis) -> list[list[object]]:
    """Return one row per class: its counts, recall, precision, average precision, and its most frequent mistake."""
    numbers = per_class(analysis)
    errors = analysis.errors(())  # with allowed pairs: the table describes, it does not judge
    rows: list[list[object]] = [
        ["class", "name", "videos", "right", "recall", "predicted", "precision", "average_precision",
         "mostly_taken_for", "count"]
    ]  # fmt: skip

    for k, name in enumerate(analysis.names):
        guess = int(errors[k].argmax())
        # `argmax` of a row of zeros is class 0: no mistake
        other = [analysis.names[guess], int(errors[k, guess])] if errors[k, guess] else ["", 0]
        shares = [
            "" if np.isnan(numbers[key][k]) else f"{numbers[key][k]:.4f}" for key in ("recall", "precision", "ap")
        ]
        right, guessed = int(analysis.matrix[k, k]), int(analysis.matrix[:, k].sum())
        rows.append([k, name, int(analysis.videos[k]), right, shares[0], guessed, shares[1], shares[2], *other])

    return rows


def per_class(analysis: Analysis) -> dict[str, np.ndarray]:
    """Return recall, precision and average precision (`ap`) of each class, (K,), 0..1; nan without videos to count."""
    labels, count = analysis.results.labels, len(analysis.names)
    precision, recall = metrics.precision_and_recall(analysis.predicted, labels, count)
    targets = labels[:, None] == np.arange(count)  # (N, K)
    return {
        "recall": recall,
        "precision": precision,
        "ap": ranking.average_precision(analysis.results.scores, targets),
    }


def confused_pairs(analysis: Analysis) -> list[tuple[int, int, int]]:
    """Return the pairs of classes that were mistaken for each other, most frequent first: (class, class, videos)."""
    both = np.triu(analysis.errors(()) + analysis.errors(()).T, 1)  # each pair once, above the diagonal
    order = np.argsort(-both, axis=None, kind="stable")[:TOP]
    pairs = zip(*np.unravel_index(order, both.shape), strict=True)
    return [(int(a), int(b), int(both[a, b])) for a, b in pairs if both[a, b]]


def summary(analysis: Analysis, doubtful: int) -> list[str]:
    """Return the most important numbers as lines to print first."""
    results, names, matrix, videos = analysis.results, analysis.names, analysis.matrix, analysis.videos
    total = len(analysis.predicted)
    numbers = [f"{one.title} {results.numbers[one.name]:.2f}" for one in metrics.metrics_of("analyze")]
    lines = [f"{results.name}: {total} videos, {len(names)} classes", "  ".join(numbers)]
    if analysis.allowed:
        second = allowed_pairs.accuracy(analysis.predicted, results.labels, analysis.allowed)
        lines.append(f"top-1 {100 * second:.2f} with {len(analysis.allowed)} allowed pairs counted as right")
    if unread := int((analysis.predicted < 0).sum()):
        lines.append(f"{unread} videos could not be read and count as wrong")

    recall = analysis.recall
    # Classes without videos (nan) go last
    worst = [k for k in np.argsort(np.nan_to_num(recall, nan=2.0), kind="stable")[:5] if recall[k] < 1]
    if worst:
        lines.append("hardest classes:")
        width = max(len(names[k]) for k in worst)
        lines += [f"  {names[k]:<{width}}  {matrix[k, k]} of {videos[k]} right" for k in worst]
    if pairs := confused_pairs(analysis)[:5]:
        lines.append("most confused:")
        for a, b, _ in pairs:
            wrong = f"{counted(int(matrix[a, b]), 'video')} of the first, {matrix[b, a]} of the second"
            lines.append(f"  {names[a]} and {names[b]}: {wrong}")

    if doubtful:
        lines.append(f"{doubtful} videos look mislabelled to this model ({label_errors.CSV})")
    if absent := int((videos == 0).sum()):
        lines.append(f"{absent} classes have no video in this list")
    return lines
