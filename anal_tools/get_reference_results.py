"""`python main.py get_reference_results EXP`: seed 004's ``results/reference_result.txt`` of an evaluation.

One line per video, `path max_logit predicted label`; the evaluation is run first if there is none.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from anal_tools.results import Results
from datasets.loading.bad_media import printable
from utils import faults, metrics

NEEDS_VALIDATE = True
FILE = "reference_result.txt"
_BLOCK = 256  # videos whose views are in memory at a time


def main(argv: list[str], *, validate: Callable[..., dict[str, float] | None]) -> int:
    """Parse the command line, evaluate if nothing is there, write the file; `validate` is main.validate."""
    parser = argparse.ArgumentParser(
        prog="main.py get_reference_results", description=f"Write results/{FILE} of an evaluation."
    )
    parser.add_argument("exp", type=Path, help="experiment folder; it is evaluated if it has no results yet")
    parser.add_argument("--name", default=None, help="name of the results (default: the last evaluation)")
    args = parser.parse_args(argv)
    wanted = f"{args.name}.json" if args.name else "*.json"
    if not any((args.exp / "results").glob(wanted)):
        from anal_tools import evaluate

        code = evaluate.main([str(args.exp), *(["--name", args.name] if args.name else [])], validate=validate)
        if code:
            return code
    if faults.rank_from_environment() == 0:
        print(shown(str(write_reference_results(args.exp, Results.load(args.exp, args.name)))))
    return 0


def write_reference_results(exp: Path, results: Results) -> Path:
    """Write one line per video, in list order.

    The maximum is that of the logits' mean over the views. A video that could not be read has ``nan -1``. Paths may
    hold spaces: the last three fields are always numbers, so lines are split from the right.

    Returns:
        The file.
    """
    predicted = metrics.predictions(results.scores)
    path = Path(exp) / "results" / FILE
    rows = zip(results.ids, highest_logits(results), predicted, results.labels, strict=True)
    write_lines(path, (f"{one_line(name)} {logit:.2f} {guess} {label}" for name, logit, guess, label in rows))
    return path


def highest_logits(results: Results) -> np.ndarray:
    """(N,) float64, the highest of the logits' mean over the views; the views may not all fit into memory."""
    logits = results.logits  # (N, V, K)
    blocks = [
        np.asarray(logits[start : start + _BLOCK]).mean(axis=1, dtype=np.float64).max(axis=1)
        for start in range(0, len(logits), _BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0)


def write_lines(path: Path, lines: Iterator[str] | list[str]) -> None:
    """Write a text file whose names may hold bytes that are not UTF-8; it is whole or not there."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(line + "\n" for line in lines)
    os.replace(temporary, path)


def one_line(text: str) -> str:
    r"""`text` with tabs, line ends and other control characters written as \t, \n, \x1b ...; all else as it is."""
    if text.isprintable():  # most are, and lists are long
        return text
    breaks = "\u2028\u2029\x85"
    return "".join(ascii(c)[1:-1] if ord(c) < 32 or ord(c) == 127 or c in breaks else c for c in text)


def shown(text: str) -> str:
    """`text` for a screen: on one line, and bytes that were not UTF-8 as escapes."""
    return printable(one_line(text))
