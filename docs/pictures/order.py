"""Draw docs/pictures/order.png and print its table: which methods can tell a motion from its reverse.

    ZOETROPE_ACCEPT_DIR=DIR make accept ISSUE=03 ROWS=order        trains them, in DIR/order-METHOD
    .venv/bin/python docs/pictures/order.py DIR

Each bar is one method on the 240 validation clips of motion8 with the weights of the last iteration: the share that is
right, the share taken for the same motion played backwards, and the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

METHODS = {"tsn": "TSN", "tsm": "TSM", "slowonly": "SlowOnly", "slowfast": "SlowFast", "tpn": "TPN on TSM"}
PARTS = (("right", "tab:blue"), ("taken for its reverse", "tab:red"), ("another motion", "lightgray"))


def main(argv: list[str]) -> int:
    """Read the evaluations, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what ZOETROPE_ACCEPT_DIR was")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args(argv)

    rows = {}
    for method, name in METHODS.items():
        exp = args.folder / f"order-{method}"
        if not (exp / "results/latest.json").is_file():
            sys.exit(f"error: {exp} has no results/latest.json; make accept ISSUE=03 ROWS=order makes it")
        rows[name] = (*shares(exp), steps(exp))

    # The table, in Markdown, and the picture
    print("| method | right | taken for its reverse | another motion | steps of 16 clips |")
    print("|---|---:|---:|---:|---:|")
    for name, (right, reverse, other, step) in rows.items():
        print(f"| {name} | {right:.3f} | {reverse:.3f} | {other:.3f} | {step} |")

    draw(args.out, {name: row[:3] for name, row in rows.items()})
    print(f"wrote {args.out}")
    return 0


def shares(exp: Path) -> tuple[float, float, float]:
    """Return the shares of videos that are right, taken for the reverse of their motion, and taken for another one."""
    labels = np.load(exp / "results/latest/labels.npy")
    guess = np.load(exp / "results/latest/scores.npy").argmax(1)
    # A motion and its reverse have neighbouring labels, 2n and 2n + 1: ^ 1 exchanges them
    right, reverse = float((guess == labels).mean()), float((guess == labels ^ 1).mean())
    return right, reverse, 1 - right - reverse


def steps(exp: Path) -> int:
    """Return the number of iterations that the weights were trained for."""
    return int(json.loads((exp / "results/latest.json").read_text(encoding="utf-8"))["step"])


def draw(out: Path, rows: dict[str, tuple[float, float, float]]) -> None:
    """Draw one stacked bar for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 2.8), layout="constrained")

    # The bars
    names = list(rows)
    left = np.zeros(len(rows))
    for part, (label, colour) in enumerate(PARTS):
        widths = np.array([100 * rows[name][part] for name in names])
        axis.barh(names, widths, left=left, color=colour, label=label)
        left += widths

    # Frame and legend; the first method is at the top
    axis.axvline(50, color="black", linestyle=":", linewidth=1)
    axis.text(50.5, -0.72, "best possible without order", fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="validation clips, %", xlim=(0, 100))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, fontsize=9, frameon=False)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
