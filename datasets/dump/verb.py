"""The verb `dump`: write the videos of a list as JPEG folders, packs or clips, cheap to sample (docs/dump.md)."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from datasets.dump.lists import list_lines, target_names
from datasets.dump.names import FAILED, Names, list_name, write_text
from datasets.dump.settings import FORMS, DumpSettings
from datasets.dump.state import DumpEntry, DumpFolder
from datasets.lists.records import Records
from datasets.loading.messages import Answer, DumpVideo
from datasets.loading.pool import each
from datasets.loading.workers import Setup
from datasets.readers.spec import ReaderSpec
from utils import renamed
from utils.config.schema import Data
from utils.errors import UserError
from utils.options import Parser

LAYOUTS = ("auto", "path_labels", "path_frames_labels")
_LINE_SECONDS = 10.0  # between two lines of progress


def main(argv: Sequence[str]) -> int:
    """Run the verb. Return 1 if videos failed, 130 if the dump was interrupted."""
    args = parse(argv)
    # Check all options before anything is read or written.
    template = args.template or ("img_{:05d}.png" if args.lossless else "img_{:05d}.jpg")
    # Clips have no frame files: the default keeps the template out of their settings.
    if args.template is None and args.form == "clips":
        template = DumpSettings.template
    settings = DumpSettings(
        form=args.form,
        short_side=args.short_side,
        quality=args.quality,
        template=template,
        base=args.base,
        lossless=args.lossless,
        gop=args.gop,
        crf=args.crf,
    )
    settings.check()

    if args.workers < 1:
        raise UserError(f"dump: --workers {args.workers}: must be at least 1")
    if not 0 < args.deadline < math.inf:
        raise UserError(f"dump: --deadline {args.deadline:g}: give a number of seconds above 0")
    if not 0 <= args.missing_share < 1:
        raise UserError(f"dump: --missing-share {args.missing_share:g}: give a share from 0 to below 1, such as 0.05")

    # Read the list and find the place of each video.
    root = args.root or args.list.parent
    if args.root and not root.is_dir():
        raise UserError(f"dump: --root {root}: there is no such folder; give the folder of the paths in the list")
    records = Records.load(args.list, root, num_class=None, layout=args.layout)
    dst = args.dst.absolute()
    if os.path.realpath(dst) == os.path.realpath(root):
        raise UserError(f"dump: {dst} is the folder of the videos themselves; choose another one")

    # Refuse to replace files of others before the state is opened, which writes the settings.
    names, name, source = Names(dst), list_name(args.list, dst), os.path.realpath(args.list)
    targets = target_names(records, settings, {name, FAILED})
    names.check(name, source)
    names.check(FAILED, "")

    # From here on no other dump can write to this folder.
    state = DumpFolder(dst, settings, names, redo=args.redo)
    try:
        # Claim the name of the new list first, so that the next dump may replace the list of a killed one.
        names.claim(name, source)
        spec = ReaderSpec("frames", missing_share=args.missing_share)
        return run(records, state, targets, dst / name, spec, workers=args.workers, deadline=args.deadline)
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130
    finally:
        state.close()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of the verb."""
    parser = Parser(prog="main.py dump", description="store videos in a form that is cheap to sample")
    parser.add_argument("list", type=Path, help="list file, any layout")
    parser.add_argument("dst", type=Path, help="folder for the result; a new list of the same name is written there")
    parser.add_argument(
        "--as",
        dest="form",
        type=renamed.form,
        choices=FORMS,
        required=True,
        help="JPEG folders, frame packs, or short-GOP video",
    )
    parser.add_argument("--root", type=Path, help="folder of the paths in the list (default: that of the list)")
    parser.add_argument("--layout", default="auto", choices=LAYOUTS, help="as data.list_layout (default: auto)")
    parser.add_argument(
        "--short-side", type=int, default=256, help="short side in pixels, never enlarged; 0 keeps the size"
    )
    parser.add_argument("--quality", type=int, default=DumpSettings.quality, help="JPEG quality (default: 85)")
    parser.add_argument("--template", help="names of frames (default: img_{:05d}.jpg)")
    parser.add_argument("--base", type=int, default=DumpSettings.base, help="number of the first frame (default: 1)")
    parser.add_argument(
        "--gop", type=int, default=DumpSettings.gop, help="clips: frames between key frames (default: 12)"
    )
    parser.add_argument("--crf", type=int, default=DumpSettings.crf, help="clips: rate factor of x264 (default: 23)")
    parser.add_argument("--lossless", action="store_true", help="PNG or lossless video, for comparisons")
    # The cores that this process may use: on a cluster often fewer than the machine has.
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds allowed per video")
    parser.add_argument("--redo", action="store_true", help="write everything again if the settings have changed")
    parser.add_argument(
        "--missing-share",
        type=float,
        default=Data().missing_share,
        help="as data.missing_share: share of frames that may be missing at the end of a video (%(default)s)",
    )
    return parser.parse_args(argv)


def run(
    records: Records,
    state: DumpFolder,
    targets: dict[str, str],
    new_list: Path,
    spec: ReaderSpec,
    *,
    workers: int,
    deadline: float,
) -> int:
    """Dump the videos that are missing, write the new list and failed.txt, and return the exit code.

    Args:
        records: the list.
        state: the open state of DST.
        targets: see `target_names`.
        new_list: path of the new list.
        spec: share of frames that may be missing at the end of a video.
        workers, deadline: number of processes, and seconds for one video.
    """
    owners: dict[str, int] = {}  # several records may share a video, which is dumped once
    for i in range(len(records)):
        owners.setdefault(targets[records.path(i)], i)

    # Leave out what an earlier dump has finished.
    done: dict[str, DumpEntry] = {}
    todo: list[int] = []
    for target, i in owners.items():
        entry = state.done(target, records.path(i), records.full_path(i))
        if entry is None:
            todo.append(i)
        else:
            done[target] = entry
    if done:
        print(f"{len(done)} of {len(owners)} videos exist already", flush=True)

    failures: dict[str, str] = {}
    progress = DumpProgress(len(todo))
    shorter: list[str] = []
    # Only the workers read and write videos; this process keeps the manifest.
    tasks = [DumpVideo(i, state.settings, str(state.folder / targets[records.path(i)]), str(state.tmp)) for i in todo]

    for task, answer in each(Setup(spec), records, tasks, workers, deadline):
        shown = records.path(task.sample)
        if answer.ok:
            # `kept` and `missing` describe this dump, not the video: the manifest does not hold them.
            entry = {key: value for key, value in answer.result.items() if key not in ("kept", "missing")}
            shorter += [shown] * bool(answer.result.get("missing"))
            done[targets[shown]] = state.add(targets[shown], entry)
        else:
            failures[shown] = answer.why
        progress.advance(answer)

    # Write failed.txt and the new list even after failures: the dumped videos can be used.
    file = state.note_failures(targets, failures)
    lines = list_lines(records, targets, done)
    if lines:
        write_text(new_list, "".join(lines))
        print(f"{new_list}: {len(lines)} of {len(records)} records, {progress.total()}", flush=True)
    else:
        left = "left as it was" if new_list.exists() else "not written"
        print(f"{new_list}: {left}, since none of its {len(records)} records can be dumped", file=sys.stderr)

    if shorter:
        print(
            f"{len(shorter)} videos are dumped without their last frames, which do not decode, such as {shorter[0]}",
            file=sys.stderr,
        )
    if failures:
        print(f"{len(failures)} videos failed, see {file}", file=sys.stderr)

    return 1 if failures or not lines else 0


class DumpProgress:
    """Print a line every few seconds: videos done and failed, frames/s, MB/s, time left."""

    def __init__(self, total: int) -> None:
        self._videos, self._done, self._failed, self._kept, self._frames, self._bytes = total, 0, 0, 0, 0, 0

        self._began = self._shown = time.monotonic()

    def advance(self, answer: Answer) -> None:
        """Count one answer."""
        self._done += 1
        self._failed += not answer.ok
        # A video that was already complete costs no time and says nothing about the speed.
        if answer.result.get("kept"):
            self._kept += 1
        elif answer.ok:
            self._frames += answer.result["frames"]
            self._bytes += answer.result["bytes"]

        # The last video always gets a line.
        now = time.monotonic()
        if now - self._shown >= _LINE_SECONDS or self._done == self._videos:
            self._shown = now
            left = (now - self._began) / self._done * (self._videos - self._done)
            clock = time.strftime("%H:%M:%S", time.gmtime(left))
            days = f"{int(left // 86400)} d " if left >= 86400 else ""
            print(f"{self._done}/{self._videos} videos, {self.total()}, ETA {days}{clock}", flush=True)

    def total(self) -> str:
        """Return the failures, the frames and the speed so far, as text."""
        seconds = max(1e-9, time.monotonic() - self._began)
        speed = f"{self._frames / seconds:.0f} frames/s, {self._bytes / seconds / 1e6:.1f} MB/s"
        kept = f", {self._kept} already complete" if self._kept else ""
        return f"{self._failed} failed{kept}, {self._frames} frames in {seconds:.0f} s ({speed})"
