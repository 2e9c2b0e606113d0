"""`python main.py analyze EXP`: what a model gets wrong, from the results of an evaluation."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from anal_tools.get_reference_results import one_line, write_reference_results
from anal_tools.results import Results
from utils import metrics
from utils.faults import UserError

TOP = 100  # error pairs and videos that are listed


def main(argv: list[str]) -> int:
    """Parse the command line and analyse."""
    parser = argparse.ArgumentParser(prog="main.py analyze", description="Show what a model gets wrong.")
    parser.add_argument("exp", type=Path, help="experiment folder that was evaluated")
    parser.add_argument("--name", default=None, help="name of the results (default: the last evaluation)")
    args = parser.parse_args(argv)
    print(run(args.exp, args.name))
    return 0


def run(exp: Path, name: str | None = None) -> str:
    """Write all reports of one evaluation into ``results/``.

    Args:
        exp: experiment folder.
        name: of the results; None: the last evaluation.

    Returns:
        The summary to print.

    Raises:
        UserError: there is no such evaluation, or its files do not fit together.
    """
    exp = Path(exp)
    results = Results.load(exp, name)
    names = class_names(exp, results)
    predicted = metrics.predictions(results.scores)
    matrix = metrics.confusion_matrix(predicted, results.labels, len(names))
    videos = np.bincount(results.labels, minlength=len(names))
    folder = exp / "results"
    files = [write_reference_results(exp, results)]
    for file, lines in (
        ("top100_errors.txt", error_lines(matrix, videos, names)),
        ("top100_videos.txt", video_lines(results, predicted, names)),
    ):
        files.append(folder / file)
        files[-1].write_text("".join(line + "\n" for line in lines), "utf-8", errors="surrogateescape")
    files.append(folder / "confusion_matrix.csv")
    write_csv(files[-1], matrix, names)
    files.append(folder / "confusion_matrix.png")
    from anal_tools import confusion_plot

    confusion_plot.draw(files[-1], matrix, names, title=f"{exp.resolve().name}, {results.name}")
    return summary(results, predicted, matrix, videos, names, files)


def class_names(exp: Path, results: Results) -> list[str]:
    """The K names; K is the width of the scores, which is the config's num_class, so that no class is ever left out."""
    rows, num_class = results.scores.shape
    where = exp / "results" / results.name
    if not (rows == len(results.labels) == len(results.ids) == len(results.logits)):
        raise UserError(f"{where}: its files have different numbers of videos; run the evaluation again")
    if rows == 0:
        raise UserError(f"{where}: no videos in it; evaluate a list that has some")
    if results.labels.min() < 0 or results.labels.max() >= num_class:
        raise UserError(
            f"{where}: a label outside 0..{num_class - 1}; run the evaluation again with the list's classes"
        )
    names = results.summary.get("class_names") or [str(k) for k in range(num_class)]
    if len(names) != num_class:
        raise UserError(f"{where}.json: {len(names)} class names for {num_class} classes; run the evaluation again")
    # Bytes of a name that were not UTF-8 (lone surrogates) cannot be printed everywhere.
    return [one_line(name).encode("utf-8", "backslashreplace").decode("utf-8") for name in names]


def error_lines(matrix: np.ndarray, videos: np.ndarray, names: list[str]) -> list[str]:
    """The most frequent (true, predicted) pairs of different classes, in seed 004's line format.

    `prec` is the recall of the true class, `err` the share of its videos that went to the predicted one.

    Args:
        matrix: (K, K) counts, rows true.
        videos: (K,) videos of each class, also those that could not be read.
        names: K class names.
    """
    errors = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-errors, axis=None, kind="stable")[:TOP]
    lines = []
    for true, guess in zip(*np.unravel_index(order, errors.shape), strict=True):
        if (count := errors[true, guess]) == 0:
            break
        lines.append(
            f"gt:{true}({names[true]})\tpred:{guess}({names[guess]})\tcount:{count}\t"
            f"prec:{matrix[true, true] / videos[true]:.4f}\terr{count / videos[true]:.4f}\t"
            f"gt_samples:{videos[true]}/{videos.sum()}"
        )
    return lines


def video_lines(results: Results, predicted: np.ndarray, names: list[str]) -> list[str]:
    """The wrong videos with the highest scores: path, truth, prediction, score of the prediction and of the truth."""
    wrong = np.flatnonzero((predicted != results.labels) & (predicted >= 0))
    confidence = results.scores[wrong, predicted[wrong]]
    lines = []
    for row in wrong[np.argsort(-confidence, kind="stable")[:TOP]]:
        true, guess = results.labels[row], predicted[row]
        lines.append(
            f"{one_line(results.ids[row])}\tgt:{true}({names[true]})\tpred:{guess}({names[guess]})\t"
            f"score:{results.scores[row, guess]:.4f}\tgt_score:{results.scores[row, true]:.4f}"
        )
    return lines


def write_csv(path: Path, matrix: np.ndarray, names: list[str]) -> None:
    """Counts with the true classes down and the predicted ones across."""
    heads = [f"{index}({name})" for index, name in enumerate(names)]
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["gt \\ pred", *heads])
        writer.writerows([head, *row] for head, row in zip(heads, matrix.tolist(), strict=True))


def summary(
    results: Results,
    predicted: np.ndarray,
    matrix: np.ndarray,
    videos: np.ndarray,
    names: list[str],
    files: list[Path],
) -> str:
    """What a person wants to see first."""
    right, total = int(matrix.diagonal().sum()), len(predicted)
    top5 = metrics.top_k_accuracy(results.scores, results.labels, 5)
    per_class = metrics.mean_class_accuracy(predicted, results.labels, len(names))
    lines = [
        f"{results.name}: {total} videos, {len(names)} classes",
        f"top-1 {100 * right / total:.2f}  top-5 {100 * top5:.2f}  mean class accuracy {100 * per_class:.2f}",
    ]
    if unread := int((predicted < 0).sum()):
        lines.append(f"{unread} videos could not be read and count as wrong")
    recall = np.divide(matrix.diagonal(), videos, out=np.ones(len(names)), where=videos > 0)
    worst = [k for k in np.argsort(recall, kind="stable")[:5] if recall[k] < 1]
    if worst:
        lines.append("worst classes:")
        width = max(len(names[k]) for k in worst)
        lines += [f"  {names[k]:<{width}}  {matrix[k, k]} of {videos[k]} right" for k in worst]
    if absent := int((videos == 0).sum()):
        lines.append(f"{absent} classes have no video in this list")
    return "\n".join([*lines, "written:", *(f"  {file}" for file in files)])
