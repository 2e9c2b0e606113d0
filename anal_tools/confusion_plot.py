"""Draw the confusion matrix as a picture that is readable for four classes and for four hundred."""

from __future__ import annotations

import unicodedata
import warnings
from pathlib import Path

import numpy as np

_NAMED = 60  # up to this number of classes every row and column has its name
_COUNTED = 25  # up to this number of classes every cell has its count
_NAME_LENGTH = 24  # letters


def draw(path: Path, matrix: np.ndarray, names: list[str], *, title: str) -> None:
    """Write a PNG: colours are shares of the true class, numbers are videos.

    Args:
        path: file to write.
        matrix: (K, K) counts, rows true, columns predicted.
        names: K class names.
        title: text above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(names)
    # Inches: a third for each class, and room for the labels
    side = float(np.clip(0.32 * count + 3, 6, 16))
    # Figure without pyplot: no display is needed, and no global state stays behind
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # The square root keeps errors of a few per cent visible next to a diagonal near one.
    image = axes.imshow(shares, cmap="viridis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest", aspect="equal")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")

    accuracy = matrix.diagonal().sum() / max(matrix.sum(), 1)
    axes.set_title(f"{_short(title, 60)}: {100 * accuracy:.1f} % of {matrix.sum()} videos right", parse_math=False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")

    if count <= _NAMED:
        labels = [_short(name, _NAME_LENGTH) for name in names]
        axes.set_xticks(range(count), labels, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(count), labels, fontsize=8, parse_math=False)
    else:
        _mark_worst(axes, matrix, names)

    if count <= _COUNTED:
        for row, column in np.argwhere(matrix > 0):
            colour = "black" if shares[row, column] > 0.4 else "white"  # readable on the colour below
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)

    with warnings.catch_warnings():
        # The font of matplotlib lacks many scripts; a box in a picture does not deserve a warning
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png")


def _mark_worst(axes, matrix: np.ndarray, names: list[str]) -> None:  # noqa: ANN001
    """Mark the most frequent errors by numbers if there are too many classes for names, and list them below."""
    errors = matrix - np.diag(matrix.diagonal())
    # Eight lines fit below the picture, in two columns
    for place, flat in enumerate(np.argsort(-errors, axis=None, kind="stable")[:8]):
        row, column = np.unravel_index(flat, errors.shape)
        if errors[row, column] == 0:
            break
        axes.plot(column, row, "o", markersize=9, markerfacecolor="none", markeredgecolor="red")
        axes.annotate(str(place + 1), (column, row), xytext=(6, 4), textcoords="offset points", color="red", fontsize=9)

        text = f"{place + 1}: {_short(names[row], 28)} mistaken for {_short(names[column], 28)} ({errors[row, column]})"
        axes.annotate(
            text, (0, 0), xytext=(0.02 + 0.5 * (place % 2), -0.1 - 0.025 * (place // 2)), textcoords="axes fraction",
            fontsize=9, parse_math=False, annotation_clip=False,
        )  # fmt: skip


def _short(text: str, length: int) -> str:
    """Return a printable text that is not longer than the picture has room for."""
    # Surrogates, control characters, private and unassigned code points have no glyph
    printable = "".join("?" if unicodedata.category(c) in ("Cs", "Cc", "Co", "Cn") else c for c in text)
    return printable if len(printable) <= length else printable[: length - 1] + "\u2026"
