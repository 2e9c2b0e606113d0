"""`python main.py scan LIST --root R`: examine every file of a list before a run reads it.

Reader processes (pool.py) examine the files, so a file that hangs or crashes its decoder does not affect the others.
Each result is written to DIR/files.jsonl at once, and a stopped scan resumes from there. The next scan examines only
files that are new or whose size or modification time has changed. The files of the list are never changed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from datasets.lists.records import Records
from datasets.readers import metadata_cache
from datasets.readers.frame_pack import TEMPLATE
from datasets.readers.spec import ReaderSpec
from datasets.scan import results as scan_results
from datasets.scan.file import LEVELS
from datasets.scan.journal import JOURNAL, Journal
from datasets.scan.results import clean_name
from datasets.scan.same import same_content
from datasets.scan.work import examine
from utils.config.schema import Data
from utils.errors import UserError
from utils.options import Parser


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Returns:
        0 if every file can be read, 1 if some cannot (their names are printed), 130 if the scan was interrupted.
    """
    args = _arguments(argv)
    lists = load_lists(args.lists, args.root, args.layout)
    if args.classes:
        for records in lists:  # report an error in this file before hours of examining videos
            scan_results.class_names(records, args.classes)

    spec = ReaderSpec(
        "frames", template=args.template, frame_base=args.frame_base, fps=args.fps, missing_share=args.missing_share
    )
    # Without a journal, no scan has written here, so files with our names belong to the user.
    if not (args.out / JOURNAL).exists():
        for name in (metadata_cache.FILE, scan_results.SUMMARY, scan_results.PAGE, *map(clean_name, args.lists)):
            if (args.out / name).exists():
                raise UserError(f"--out: {args.out / name} exists and was not written by a scan; choose another --out")

    # The journal locks the folder, so that two scans do not mix their lines.
    started = time.monotonic()
    with Journal(args.out, spec) as journal:
        for records in lists:
            journal.check_owner(args.out / clean_name(records.list_file), str(records.list_file), records.root)

        try:
            examined = [
                examine(records, spec, journal, level=args.decode, workers=args.workers, deadline=args.deadline)
                for records in lists
            ]
            groups = same_content(lists, examined, spec, workers=args.workers, deadline=args.deadline)
        except KeyboardInterrupt:
            print("\nstopped; run the same command again to resume", file=sys.stderr)
            return 130

        # Record the owners before the lists are written.
        for records in lists:
            journal.record_list(clean_name(records.list_file), str(records.list_file), records.root)

        # Write the metadata for training, then the lists, the summary and the page, while the folder is locked.
        cache = metadata_cache.path_in(args.out)
        entries = metadata_cache.write(cache, journal.metadata())
        seconds = time.monotonic() - started
        summary = scan_results.write(
            args.out, lists, examined, groups, level=args.decode, classes=args.classes, seconds=seconds
        )

    print("\n".join(scan_results.in_words(summary, args.out)))
    print(f"metadata of {entries} files for training: set data.metadata to {cache}")

    return 1 if any(part["bad"] for part in summary["lists"]) else 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="main.py scan",
        description="find unreadable files of a list, and the properties of the others",
    )
    parser.add_argument("lists", nargs="+", type=Path, metavar="LIST", help="list files, such as train.txt val.txt")
    parser.add_argument(
        "--root",
        action="append",
        required=True,
        metavar="DIR",
        help="folder of the paths; one for all lists, or one for each",
    )
    parser.add_argument(
        "--decode",
        choices=LEVELS,
        default="ends",
        help="header: count only; ends: first, middle and last frame (default); all: every frame",
    )
    parser.add_argument("--out", type=Path, default=Path("scan"), metavar="DIR", help="folder for the results (scan)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one per core)"
    )
    parser.add_argument("--deadline", type=float, default=120.0, metavar="S", help="seconds allowed per file (120)")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names (default: classInd.txt next to the list)"
    )
    parser.add_argument(
        "--layout", default="auto", choices=("auto", "path_labels", "path_frames_labels"), help="as data.list_layout"
    )
    parser.add_argument("--template", help="frame folders: file name such as img_{:05d}.jpg (default: detected)")
    parser.add_argument("--frame-base", type=int, choices=(0, 1), help="frame folders: number of the first file")
    parser.add_argument("--fps", type=float, default=ReaderSpec.fps, help="frame folders: frames/s (30)")
    parser.add_argument(
        "--missing-share",
        type=float,
        default=Data().missing_share,
        help="as data.missing_share: share of frames that may be missing at the end of a video (%(default)s)",
    )

    args = parser.parse_args(argv)
    if len(args.root) not in (1, len(args.lists)):
        raise UserError(f"--root: {len(args.root)} folders for {len(args.lists)} lists; give one, or one for each list")
    if args.workers < 1 or not args.deadline > 0:
        raise UserError("--workers and --deadline must be positive")
    if not (math.isfinite(args.fps) and args.fps > 0):
        raise UserError(f"--fps: {args.fps:g} is not a frame rate; give frames per second, above 0")
    if not 0 <= args.missing_share < 1:
        raise UserError(f"--missing-share: {args.missing_share:g}: give a number from 0 to below 1, such as 0.05")
    if args.template is not None and not TEMPLATE.fullmatch(args.template):
        raise UserError(f"--template {args.template}: give a file name with one number, such as img_{{:05d}}.jpg")
    return args


def load_lists(files: Sequence[Path], roots: Sequence[str], layout: str = "auto") -> list[Records]:
    """Load lists with their roots, one root for all or one for each list.

    Raises:
        UserError: a list or root does not exist or has an error, or two lists have the same name.
    """
    # The names of the lists without bad files; all of these are written to one folder.
    names = [clean_name(file) for file in files]
    if len(set(names)) < len(names):
        raise UserError(f"two lists are called {max(names, key=names.count)}: scan them into different folders (--out)")

    roots = roots if len(roots) == len(files) else [roots[0]] * len(files)
    for root in roots:
        if not os.path.isdir(root):
            raise UserError(f"--root: there is no folder {root}")

    return [Records.load(file, root, num_class=None, layout=layout) for file, root in zip(files, roots, strict=True)]
