"""Print the table of a sweep and write it as csv, Markdown and a picture: `python -m launch collect NAME`."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

from launch import grid, progress, sweep
from launch.grid import Sweep, Trial
from utils import files, log
from utils.errors import UserError
from utils.options import Parser


def main(argv: Sequence[str]) -> int:
    """Print and write the table; return 1 if a trial has failed, for scripts."""
    parser = Parser(prog="launch collect", description="Write the table of a sweep.")
    parser.add_argument("name", metavar="NAME", help="name of the sweep")
    parser.add_argument("--into", type=Path, default=grid.SWEEPS, help="folder of the sweeps (default: sweeps/)")
    parser.add_argument("--no-picture", action="store_true", help="write only the tables")
    args = parser.parse_args(argv)

    plan = grid.read(grid.folder_of(args.name, args.into))
    trials = plan.trials()
    states = sweep.states(plan, trials)

    # One row for each finished trial; the columns are all keys and numbers in the order in which they first occur.
    rows = [_row(plan, trial) for trial in trials if states[trial.name].kind == "done"]
    keys = list(dict.fromkeys(key for trial in trials for key, _ in trial.values))
    header = list(dict.fromkeys(["trial", "exp", *keys, *(name for row in rows for name in row)]))
    table = [[row.get(name, "") for name in header] for row in rows]
    text = markdown(header, table)

    # The other trials follow below the table, with the reason.
    others = [f"{states[trial.name].kind}: {trial.name}: {states[trial.name].why}".rstrip(": ") for trial in trials]
    others = [line for line in others if not line.startswith("done")]
    heading = f"# Sweep {plan.name}\n\n{len(rows)} of {len(trials)} trials\n\n"
    notes = "".join(f"- {line}\n" for line in others)

    try:
        with (plan.folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *table])
        (plan.folder / "table.md").write_text(heading + text + (f"\n{notes}" if notes else ""), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from error

    print(text + "".join(f"{line}\n" for line in others), end="")

    written = ["table.csv", "table.md"]
    # A run without validation has no accuracy to plot.
    plotted = [row for row in rows if row.get("best_top1", row.get("top1")) is not None]
    if plotted and not args.no_picture:
        picture(plan.folder / "table.png", plan.name, keys, plotted)
        written.append("table.png")

    print(f"{plan.folder}: {', '.join(written)}")
    return int(any(state.kind == "failed" for state in states.values()))


def _row(sweep: Sweep, trial: Trial) -> files.Row:
    """Return the results of a finished trial."""
    from utils import metrics  # numpy, which a start on a login node does not need

    row: files.Row = {"trial": trial.name, "exp": "/".join(trial.source.parts[-2:]), **dict(trial.values)}

    if sweep.verb == "eval":
        summary = json.loads(sweep.result_of(trial).read_text(encoding="utf-8"))
        numbers, counts = summary["metrics"], summary.get("counts", {})
        row |= {metric.name: numbers[metric.name] for metric in metrics.shown_in("collect", numbers)}
        row["num_videos"], row["failed_videos"] = int(numbers["num_videos"]), counts.get("failed", 0)
    # A training run has no summary: take the last points of its curves, and the best validation.
    else:
        exp = sweep.exp_of(trial)
        curves = log.read_scalars(exp / "events" / log.SCALARS)
        row["step"] = progress.read(exp).step
        reached = [value for _, value in curves.get("top1_val", []) if not math.isnan(value)]
        row["best_top1"] = max(reached, default=None)
        for metric in metrics.metrics_of("collect", multi_label="map_val" in curves):
            if points := curves.get(metric.tag):
                row["loss_val" if metric.name == "loss" else metric.name] = points[-1][1]

    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def markdown(header: Sequence[str], table: Sequence[Sequence[object]]) -> str:
    """Return a table with aligned columns; `|` in a value is escaped."""
    texts = [[str("" if value is None else value).replace("|", "\\|") for value in row] for row in [header, *table]]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]

    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in texts
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")

    return "\n".join(lines) + "\n"


def picture(file: Path, title: str, keys: Sequence[str], rows: Sequence[files.Row]) -> None:
    """Plot top-1 against the first key with several numbers, one line per choice of the others; else a bar per trial.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the picture needs matplotlib: pip install matplotlib, or --no-picture") from error
    matplotlib.use("Agg")  # no display, and before pyplot is imported
    from matplotlib import pyplot

    value = "best_top1" if "best_top1" in rows[0] else "top1"

    # The numeric axis. Without one the trials have no order, so they get bars.
    axis = next((key for key in keys if len({row[key] for row in rows}) > 1 and _are_numbers(rows, key)), None)
    figure, axes = pyplot.subplots(figsize=(7, 4 if axis else 1 + 0.35 * len(rows)), layout="constrained")
    if axis:
        lines: dict[str, list[tuple[float, float]]] = {}
        # A line for each combination of experiment and other keys.
        for row in rows:
            label = ", ".join([row["exp"], *(f"{key.rpartition('.')[2]} {row[key]}" for key in keys if key != axis)])
            lines.setdefault(label, []).append((float(row[axis]), row[value]))
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)

        numbers = [float(row[axis]) for row in rows]
        # Learning rates and the like: values that differ by a factor of 20 or more.
        if min(numbers) > 0 and max(numbers) / min(numbers) >= 20:
            axes.set_xscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel("top-1, per cent")
        axes.legend(fontsize="small")
    else:
        axes.barh([row["trial"] for row in rows][::-1], [row[value] for row in rows][::-1])
        axes.tick_params(axis="y", labelsize="small")
        axes.set_xlabel("top-1, per cent")

    axes.set_title(title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _are_numbers(rows: Sequence[files.Row], key: str) -> bool:
    try:
        return all(math.isfinite(float(row[key])) for row in rows)
    except ValueError:
        return False
