"""`python main.py clean EXP [--dry-run]`: list and free what an experiment does not need to continue.

That is `old/` (runs that --fresh moved away), copies of the code of jobs that have ended, and the logits of all
evaluations except the newest. Checkpoints, logs, curves, scores and summaries are kept.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from anal_tools.text import columns
from utils import files, schedulers
from utils.errors import UserError
from utils.options import Parser

LOGITS = "logits.npy"
SUBMITTING = 3600.0  # seconds; the code of a job that is being submitted is copied before the job exists


def main(argv: Sequence[str]) -> int:
    """List what can be freed, and free it unless `--dry-run` is given."""
    parser = Parser(prog="main.py clean", description="Free what an experiment does not need any more.")
    parser.add_argument("exp", type=Path, help="experiment folder")
    parser.add_argument("--dry-run", action="store_true", help="only show it")
    args = parser.parse_args(argv)
    if not (args.exp / "config.yaml").is_file():
        raise UserError(f"{args.exp}: no config.yaml here; name an experiment folder")

    freeable = [(path, why, size(path)) for path, why in removable(args.exp)]
    rows = [[in_words(count), str(path.relative_to(args.exp)), why] for path, why, count in freeable]
    if rows:
        print("\n".join(columns(rows, left={1, 2})))

    for path, _, _ in freeable if not args.dry_run else ():
        remove(path)

    total = in_words(sum(count for _, _, count in freeable))
    print(f"{total} can be freed: run it without --dry-run" if args.dry_run else f"{total} freed")
    return 0


def removable(exp: Path) -> Iterator[tuple[Path, str]]:
    """Yield (path, reason) of everything that can be removed."""
    for path in inside(exp / "old"):
        yield path, "an earlier run, moved here by --fresh"

    used = code_in_use(exp)
    for path in inside(exp / "jobs" / "code"):
        is_new = time.time() - path.stat().st_mtime < SUBMITTING
        # A name with a dot is a copy that is being written
        if path.resolve() not in used and not path.name.startswith(".") and not is_new:
            yield path, "code of jobs that have ended"

    summaries = sorted((exp / "results").glob("*.json"), key=os.path.getmtime)
    # The newest evaluation keeps its logits
    for summary in summaries[:-1]:
        path = exp / "results" / summary.stem / LOGITS
        if path.is_file():
            yield path, "logits of an older evaluation: its summary stays, `score` and `report` of it need another eval"


def inside(folder: Path) -> list[Path]:
    """Return the entries of a folder; none if the folder is a link to elsewhere."""
    return [] if folder.is_symlink() else sorted(folder.glob("*"))


def code_in_use(exp: Path) -> set[Path]:
    """Return the code copies that a job may use: those of live jobs, and of jobs whose scheduler does not answer."""
    rows = [row for row in files.read_rows(exp / "jobs" / "jobs.jsonl") if row.get("code") and row.get("job")]
    used = set()
    for row in rows:
        try:
            alive = schedulers.named(row.get("scheduler", "slurm")).states([row["job"]])
        except UserError:
            # Unknown counts as alive: deleting its code would break the job
            alive = {row["job"]: "unknown"}
        if alive:
            used.add(Path(row["code"]).resolve())

    if rows:  # `launch requeue` starts the newest job again
        used.add(Path(rows[-1]["code"]).resolve())
    return used


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder on the disk, without following links."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_blocks * 512  # of 512 bytes each: sparse files count as they are stored
    return sum(size(inner) for inner in path.iterdir())


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def in_words(count: float) -> str:
    """Return a number of bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
