"""Draw docs/pictures/results.png from tests/data/results: training loss of each method, confusions of the best one.

    .venv/bin/python docs/pictures/results.py

A row for each data set that a network was trained on. A line is the mean over the folds; the band goes from the
lowest to the highest fold. A matrix counts the held-out videos of all folds, rows are the true classes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.analysis import results  # noqa: E402
from tests.benchmarks.analysis.answers import DATA_SETS, Answers  # noqa: E402

OUT = Path(__file__).with_suffix(".png")


def main() -> int:
    """Draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = {data: [one for one in answers if one.curve] for data, answers in results.kept().items()}
    trained = {data: answers for data, answers in trained.items() if answers}
    figure, axes = pyplot.subplots(
        len(trained), 2, figsize=(10, 4.2 * len(trained)), squeeze=False, layout="constrained"
    )
    for (data, answers), (left, right) in zip(trained.items(), axes, strict=True):
        for one in answers:
            steps, low, mean, high = curve(one)
            left.plot(steps, mean, label=f"{one.name.replace('_', ' ', 1)}, {one.right.mean():.2f}")
            left.fill_between(steps, low, high, alpha=0.2)
        left.set(title=f"{DATA_SETS[data][0]}: training loss", xlabel="share of the training", ylim=(0, None))
        left.legend()
        matrix(right, answers[0])
    figure.savefig(OUT, dpi=80)
    print(f"wrote {OUT}")
    return 0


def curve(one: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Share of the training, and lowest, mean and highest loss of the folds there."""
    steps = np.linspace(0, 1, 50)
    folds = [np.array(points) for points in one.curve.values()]
    losses = np.array([np.interp(steps, points[:, 0] / points[-1, 0], points[:, 1]) for points in folds])
    return steps, losses.min(axis=0), losses.mean(axis=0), losses.max(axis=0)


def matrix(axes, one: Answers) -> None:  # noqa: ANN001
    """The confusion matrix of a method."""
    names = results.class_names(one)
    counts = np.zeros((len(names), len(names)), int)
    for _, label, _, guess in one.videos:
        counts[label, guess] += 1
    axes.imshow(counts / counts.sum(axis=1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(column, row, count, ha="center", va="center", color="white" if row == column else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"{one.name.replace('_', ' ', 1)}: predicted as")


if __name__ == "__main__":
    sys.exit(main())
