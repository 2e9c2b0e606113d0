"""`python main.py get_reference_results EXP`: write ``results/reference_result.txt`` of an evaluation.

One line per video, `path max_logit predicted label`, as Pytorch Video Analysis writes it. Without results the
evaluation is run first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anal_tools.evaluate.results import Results
from anal_tools.text import one_line, shown, write_lines
from utils import errors
from utils.options import Parser

FILE = "reference_result.txt"
_BLOCK = 256  # videos whose views are in memory at a time


def main(argv: list[str]) -> int:
    """Parse the command line, evaluate if there are no results, write the file."""
    parser = Parser(prog="main.py get_reference_results", description=f"Write results/{FILE} of an evaluation.")
    parser.add_argument("exp", type=Path, help="experiment folder; it is evaluated if it has no results yet")
    parser.add_argument("--name", default=None, help="name of the results (default: the last evaluation)")
    args = parser.parse_args(argv)

    pattern = f"{args.name}.json" if args.name else "*.json"
    if not any((args.exp / "results").glob(pattern)):
        from anal_tools import evaluate

        code = evaluate.main([str(args.exp), *(["--name", args.name] if args.name else [])])
        if code:
            return code
    # An evaluation may run on several ranks; one of them writes
    if errors.rank_from_environment() == 0:
        print(shown(str(write_reference_results(args.exp, Results.load(args.exp, args.name)))))
    return 0


def write_reference_results(exp: Path, results: Results) -> Path:
    """Write one line per video, in list order.

    The maximum is that of the logits' mean over the views. A video that could not be read has ``nan -1``. Paths may
    contain spaces: the last three fields are always numbers, so lines are split from the right.

    Returns:
        The path of the file.
    """
    predicted = results.videos.predicted
    path = Path(exp) / "results" / FILE
    rows = zip(results.ids, highest_logits(results), predicted, results.labels, strict=True)
    write_lines(path, (f"{one_line(name)} {logit:.2f} {guess} {label}" for name, logit, guess, label in rows))
    return path


def highest_logits(results: Results) -> np.ndarray:
    """Return the highest of the logits' mean over the views, (N,) float64; the views may not all fit into memory."""
    logits = results.logits  # (N, V, K)
    # A block at a time from the memory map: (N, V, K) -> (N, K) -> (N,)
    blocks = [
        np.asarray(logits[start : start + _BLOCK]).mean(axis=1, dtype=np.float64).max(axis=1)
        for start in range(0, len(logits), _BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0)
