"""Turn an evaluation's results into seed 004's ``results/reference_result.txt``: `path max_logit predicted label`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from anal_tools.results import Results
from utils import metrics


def main(argv: list[str]) -> int:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(
        prog="main.py get_reference_results", description="Write results/reference_result.txt of an evaluation."
    )
    parser.add_argument("exp", type=Path, help="experiment folder that was evaluated")
    parser.add_argument("--name", default=None, help="name of the results (default: the last evaluation)")
    args = parser.parse_args(argv)
    print(write_reference_results(args.exp, Results.load(args.exp, args.name)))
    return 0


def write_reference_results(exp: Path, results: Results) -> Path:
    """Write one line per video, in list order.

    The maximum is that of the logits' mean over the views. A video that could not be read has ``nan -1``. Paths may
    hold spaces: the last three fields are always numbers, so lines are split from the right.

    Returns:
        The file.
    """
    highest = results.logits.mean(axis=1, dtype=np.float64).max(axis=1)  # (N, V, K) -> (N,)
    predicted = metrics.predictions(results.scores)
    path = exp / "results" / "reference_result.txt"
    rows = zip(results.ids, highest, predicted, results.labels, strict=True)
    lines = [f"{one_line(name)} {logit:.2f} {guess} {label}\n" for name, logit, guess, label in rows]
    path.write_text("".join(lines), "utf-8", errors="surrogateescape")
    return path


def one_line(text: str) -> str:
    r"""`text` with tabs, line ends and other control characters written as \t, \n, \x1b ...; all else as it is."""
    breaks = "\u2028\u2029\x85"
    return "".join(ascii(c)[1:-1] if ord(c) < 32 or ord(c) == 127 or c in breaks else c for c in text)
