"""Print the last lines of `make demo`: how good the model is, where everything is, and what to try next."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.checkpoint_names import BEST, LATEST, present
from utils.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Print the summary of an evaluated experiment; with `--is-finished` only answer by the exit code (0 yes, 1 no)."""
    parser = argparse.ArgumentParser(prog="python -m anal_tools.demo_summary", description=__doc__)
    parser.add_argument("exp", type=Path, help="experiment folder that was trained and evaluated")
    parser.add_argument("--is-finished", action="store_true", help="exit code 0 if its last evaluation is up to date")
    args = parser.parse_args(argv)

    if args.is_finished:
        finished = is_finished(args.exp)
        if finished:
            print("The demo run is finished; these are its results (train.sh local 2 --fresh starts it again).")
        return 0 if finished else 1

    print(summary(args.exp))
    return 0


def is_finished(exp: Path) -> bool:
    """Return whether the newest results are newer than every checkpoint."""
    written = [path.stat().st_mtime for path in present(exp, BEST, LATEST) if path.exists()]
    newest = newest_results(exp)
    return newest is not None and bool(written) and newest.stat().st_mtime >= max(written)


def newest_results(exp: Path) -> Path | None:
    """Return the summary file of the last evaluation; None if there was none."""
    return max((exp / "results").glob("*.json"), key=lambda path: path.stat().st_mtime, default=None)


def summary(exp: Path) -> str:
    """Return the closing lines, ready to print.

    Raises:
        UserError: there are no results.
    """
    file = newest_results(exp)
    if file is None:
        raise UserError(f"{exp}: no results yet; run {exp}/eval.sh local 2")

    metrics = json.loads(file.read_text(encoding="utf-8"))["metrics"]
    best = next((path for path in present(exp, BEST, LATEST) if path.exists()), exp)
    # The same experiment with TSN, which averages frames
    order_blind = exp.parent.parent / exp.parent.name.replace("tsm", "tsn")

    return "\n".join(
        (
            "",
            f"top-1 {metrics['top1']:.1f} % of {metrics['num_videos']:.0f} validation videos in 8 motion classes",
            f"  checkpoint  {best}",
            f"  events      {exp / 'events'}   (.venv/bin/tensorboard --logdir {exp / 'events'})",
            f"  log         {exp / 'log.txt'}",
            f"  results     {file.with_suffix('')}",
            "What to try next:",
            f"  .venv/bin/python main.py report {exp}    # what it gets wrong, with pictures: opens in a browser",
            f"  {order_blind / exp.name}/train.sh local 2    # TSN cannot see the order of frames: about half at best",
            f"  .venv/bin/python main.py new ~/my_experiment --from {exp}    # your own; see docs/ucf101.md",
        )
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
