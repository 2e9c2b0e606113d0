"""`python main.py dense-sweep EXP`: show accuracy against the number of views, from the views that one evaluation kept.

Evaluate once with the largest protocol (`eval EXP --views 10x3`). Every smaller protocol is a subset of its views, and
the table marks those whose views another tool would place elsewhere. The knee is the cheapest row that may be as good
as the best one.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anal_tools import score, text
from anal_tools.evaluate import scoring
from anal_tools.evaluate.protocols import FAMILIES
from anal_tools.evaluate.results import Results
from anal_tools.score import ScoreRow
from utils.errors import UserError
from utils.options import Parser

FILE = "dense_sweep"  # in results/<name>/, as .csv and .png


def main(argv: list[str]) -> int:
    """Parse the command line, print the table and the names of the written files."""
    parser = Parser(
        prog="main.py dense-sweep", description="Accuracy against the views of a video, from one evaluation."
    )
    parser.add_argument("exp", metavar="EXP[:NAME]", help="experiment folder, and the name of its results")
    parser.add_argument("--clips", help="numbers of clips, such as 1,2,5,10 (default: all that are sensible)")
    args = parser.parse_args(argv)

    results = score.load(args.exp)
    words = args.clips.split(",") if args.clips else []
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise UserError(f"--clips {args.clips}: whole numbers separated by commas, such as 1,2,5,10")

    counts = [int(word) for word in words] or None
    rows = sweep(results, clips=counts)
    best = knee(rows)
    print(table(rows, best))
    for path in write(results, rows, best):
        print(f"written: {path}")
    return 0


def sweep(results: Results, clips: Sequence[int] | None = None) -> list[ScoreRow]:
    """Return one row for each number of clips and of crops that the kept views have.

    Args:
        results: a finished evaluation.
        clips: numbers of clips; None: 1, 2, 3, 5, 10, ... up to the kept number.

    Returns:
        The rows, cheapest first.
    """
    kept = scoring.kept_protocol(results)
    most = kept.spec.num_clips
    counts = sorted({n for n in clips or (1, 2, 3, 4, 5, 7, 10, 15, 20, 30) if 1 <= n <= most} | {most})
    # Fewer crops than were kept: only the centre one is a protocol of its own
    crops = [n for n in sorted(FAMILIES["plain"]) if n == kept.spec.crops_per_clip or n == 1]
    rows = [score.row([results], views=f"{clip}x{crop}") for crop in crops for clip in counts]
    return sorted(rows, key=lambda row: (row.number, -row.protocol.spec.crops_per_clip))


def _cost(row: ScoreRow) -> float:
    """Return the GMACs per video, or the number of views if they are unknown."""
    return row.gmacs or row.number


def knee(rows: Sequence[ScoreRow]) -> int:
    """Return the cheapest row whose top-1 may be as good as the best: the difference lies within its 95 % error.

    Both rows saw the same videos, so the difference is taken video by video; the error is 1.96 standard errors.
    """
    # Among equally good rows, the one with fewer views
    best = max(range(len(rows)), key=lambda i: (rows[i].top1, -rows[i].number))

    for index, row in enumerate(rows):
        difference = rows[best].right[1].astype(np.float64) - row.right[1]
        error = 1.96 * difference.std() / np.sqrt(max(len(difference), 1))
        if difference.mean() <= error:
            return index
    return best


def table(rows: Sequence[ScoreRow], best: int) -> str:
    """Return the rows as text, with marks at the knee and at views that another tool would place elsewhere."""
    lines = [["clips x crops", "views", "GMAC/video", "top-1", "interval", "top-5", ""]]
    notes = text.Notes()

    for index, row in enumerate(rows):
        spec, (low, high) = row.protocol.spec, row.intervals[1]
        marks = ("knee" if index == best else "") + notes.mark(row.note)
        cost = "?" if row.gmacs is None else f"{row.gmacs:.1f}"
        shown = [f"{spec.num_clips} x {spec.crops_per_clip}", str(row.number), cost, f"{row.top1:.2f}"]
        lines.append([*shown, f"{low:.2f} .. {high:.2f}", f"{row.numbers['top5']:.2f}", marks.strip()])

    return "\n".join([*text.columns(lines), *notes.lines()])


def write(results: Results, rows: Sequence[ScoreRow], best: int) -> list[Path]:
    """Write the table as CSV and the picture; return both files."""
    table_file, picture = results.folder / f"{FILE}.csv", results.folder / f"{FILE}.png"

    with table_file.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clips", "crops", "views", "gmacs", "top1", "top5", "top1_interval", "note", "knee"])
        for index, row in enumerate(rows):
            spec = row.protocol.spec
            about = [spec.num_clips, spec.crops_per_clip, row.number, row.gmacs, row.top1, row.numbers["top5"]]
            writer.writerow([*about, row.intervals[1], row.note, int(index == best)])

    draw(picture, rows, best, title=f"{results.exp.resolve().name}, {results.name}: {len(results.ids)} videos")
    return [table_file, picture]


def draw(path: Path, rows: Sequence[ScoreRow], best: int, *, title: str) -> None:
    """Draw accuracy with its interval against cost, one line per number of crops, the knee circled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    known = all(row.gmacs for row in rows)  # GMACs of all rows, else the axis shows views
    for crop in sorted({row.protocol.spec.crops_per_clip for row in rows}):
        crop_rows = [row for row in rows if row.protocol.spec.crops_per_clip == crop]
        x, y = [_cost(row) for row in crop_rows], [row.top1 for row in crop_rows]
        # Errorbar takes distances, and a bootstrap interval may not contain the value
        low = [max(0.0, row.top1 - row.intervals[1][0]) for row in crop_rows]
        high = [max(0.0, row.intervals[1][1] - row.top1) for row in crop_rows]
        axes.errorbar(
            x, y, yerr=[low, high], marker="o", capsize=3, label=f"{crop} crop{'s' if crop > 1 else ''} per clip"
        )
        for row in crop_rows:
            place = (_cost(row), row.top1)
            axes.annotate(row.views, place, (4, -11), textcoords="offset points", fontsize=7)

    chosen = rows[best]
    axes.plot(
        [_cost(chosen)], [chosen.top1], "o", markersize=15, fillstyle="none", color="black", label="knee", zorder=5
    )

    axes.set_xscale("log")
    axes.set_xlabel("GMAC per video" if known else "views per video")
    axes.set_ylabel("top-1, per cent")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
