"""The verb `dump`: the videos of a list as JPEG folders, shards or clips that are cheap to sample (docs/dump.md)."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets.dump.settings import FORMS, Settings
from datasets.dump.state import Entry, State, write_text
from datasets.pool import Answer, Pool
from datasets.readers.frame_shard import SUFFIX
from datasets.readers.spec import ReaderSpec
from datasets.records import Records
from datasets.workers import Setup
from utils.faults import UserError

#: Endings that a name loses; any other dot belongs to the name.
ENDINGS = {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"}
ENDINGS |= {".ts", ".webm", ".wmv", SUFFIX}
_AHEAD = 4
_LINE_SECONDS = 10.0


def main(argv: Sequence[str]) -> int:
    """Run the verb; exit code 1 when videos failed, 130 when it was interrupted."""
    args = parse(argv)
    template = args.template or ("img_{:05d}.png" if args.lossless else "img_{:05d}.jpg")
    if args.template is None and args.form == "clips":
        template = Settings.template
    settings = Settings(
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
    root = args.root or args.list.parent
    records = Records.load(args.list, root, num_class=None, layout=args.layout)
    dst = args.dst.absolute()
    if os.path.realpath(dst) == os.path.realpath(root):
        raise UserError(f"dump: {dst} is the folder of the videos themselves; choose another one")
    if args.workers < 1:
        raise UserError(f"dump: --workers {args.workers}: at least 1")
    state = State(dst, settings, redo=args.redo)
    try:
        return run(records, state, workers=args.workers, deadline=args.deadline)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    finally:
        state.close()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the verb."""
    parser = argparse.ArgumentParser(prog="main.py dump", description="store videos in a form that is cheap to sample")
    parser.add_argument("list", type=Path, help="list file, any layout")
    parser.add_argument("dst", type=Path, help="folder for the result; a new list of the same name is written there")
    parser.add_argument(
        "--as", dest="form", choices=FORMS, required=True, help="JPEG folders, shards, or short-GOP video"
    )
    parser.add_argument("--root", type=Path, help="folder of the paths in the list (default: where the list is)")
    parser.add_argument("--layout", default="auto", help="data.list_layout of the list (default: auto)")
    parser.add_argument("--short-side", type=int, default=256, help="pixels; never enlarged, 0 keeps the size")
    parser.add_argument("--quality", type=int, default=Settings.quality, help="of JPEG (default: 85)")
    parser.add_argument("--template", help="names of frames (default: img_{:05d}.jpg)")
    parser.add_argument("--base", type=int, default=Settings.base, help="number of the first frame (default: 1)")
    parser.add_argument("--gop", type=int, default=Settings.gop, help="clips: frames between key frames (default: 12)")
    parser.add_argument("--crf", type=int, default=Settings.crf, help="clips: rate factor of x264 (default: 23)")
    parser.add_argument("--lossless", action="store_true", help="PNG, or video without loss: for comparisons")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds that one video may take")
    parser.add_argument("--redo", action="store_true", help="make everything again if the settings have changed")
    return parser.parse_args(argv)


def run(records: Records, state: State, *, workers: int, deadline: float) -> int:
    """Dump what is not there yet, write the list and failed.txt; the exit code."""
    targets = target_names(records, state.settings)
    owners: dict[str, int] = {}  # a path may stand in several records, it is dumped once
    for i in range(len(records)):
        owners.setdefault(records.path(i), i)
    done: dict[str, Entry] = {}
    todo: list[int] = []
    for shown, i in owners.items():
        entry = state.done(shown, records.full_path(i), str(state.folder / targets[shown]))
        if entry is None:
            todo.append(i)
        else:
            done[shown] = entry
    if done:
        print(f"{len(done)} of {len(owners)} videos are there already", flush=True)
    failures: dict[str, str] = {}
    progress = Progress(len(todo))
    for i, answer in _ask(records, state, targets, todo, workers, deadline):
        shown = records.path(i)
        if answer["ok"]:
            done[shown] = {key: value for key, value in answer.items() if key not in ("id", "ok", "kept")}
            state.add(done[shown])
        else:
            failures[shown] = _reason(answer)
        progress.advance(answer)
    file = state.note_failures(owners, failures)
    new_list = state.folder / Path(records.list_file).name
    lines = list_lines(records, targets, done)
    write_text(new_list, "".join(lines))
    print(f"{new_list}: {len(lines)} of {len(records)} records, {progress.total()}", flush=True)
    if failures:
        print(f"{len(failures)} videos failed, see {file}", file=sys.stderr)
    return 1 if failures else 0


def _ask(
    records: Records, state: State, targets: dict[str, str], todo: list[int], workers: int, deadline: float
) -> Iterator[tuple[int, Answer]]:
    """(record, answer) of each video in the order in which they are done."""
    if not todo:
        return
    setup = Setup(reader=ReaderSpec("frames").to_json(), train="", eval="", seed=0)
    pool = Pool(setup, records, [], min(workers, len(todo)), deadline)
    settings, ahead, under_way = dataclasses.asdict(state.settings), iter(enumerate(todo, start=1)), {}
    try:
        while True:
            while len(under_way) < _AHEAD * workers and (following := next(ahead, None)) is not None:
                number, i = following
                under_way[number] = i
                target = str(state.folder / targets[records.path(i)])
                request = {"id": number, "kind": "dump", "sample": i, "settings": settings, "target": target}
                pool.submit({**request, "tmp": str(state.tmp)})
            if not under_way:
                return
            for answer in pool.answers():
                if "user" in answer:
                    raise UserError(answer["user"])
                yield under_way.pop(answer["id"]), answer
    finally:
        pool.close()


def _reason(answer: Answer) -> str:
    if "bug" in answer:
        return f"not expected: {answer['bug'].strip().splitlines()[-1]}"
    return answer["reason"]


def target_names(records: Records, settings: Settings) -> dict[str, str]:
    """Where each path of the list goes below DST: without its ending, unless two videos would then be one."""
    paths = dict.fromkeys(records.path(i) for i in range(len(records)))
    short = {path: _without_ending(os.path.normpath(path)) for path in paths}
    times = Counter(short.values())
    return {
        path: (name if times[name] == 1 else os.path.normpath(path)) + settings.ending for path, name in short.items()
    }


def _without_ending(path: str) -> str:
    name, ending = os.path.splitext(path)
    return name if ending.lower() in ENDINGS else path


def list_lines(records: Records, targets: dict[str, str], done: dict[str, Entry]) -> list[str]:
    """The records whose video is there, in the order of the list: `path [start] frames label...` with real counts."""
    blank = "\t" if any(" " in name or "," in name for name in targets.values()) else " "
    parts = bool(records.starts.any())
    lines: list[str] = []
    for i in range(len(records)):
        entry = done.get(records.path(i))
        if entry is None:
            continue
        start, declared = int(records.starts[i]), int(records.frames[i])
        frames = entry["frames"] - start
        if parts and declared > 0:
            frames = min(frames, declared)
        if frames < 1:
            continue
        numbers = [start, frames] if parts else [frames]
        row = [targets[records.path(i)], *map(str, numbers), *map(str, records.labels_of(i))]
        lines.append(blank.join(row) + "\n")
    return lines


class Progress:
    """A line every few seconds: videos done and failed, frames/s, MB/s, time left."""

    def __init__(self, total: int) -> None:
        self._videos, self._done, self._failed, self._kept, self._frames, self._bytes = total, 0, 0, 0, 0, 0
        self._began = self._shown = time.monotonic()

    def advance(self, answer: Answer) -> None:
        """Count one answer."""
        self._done += 1
        self._failed += not answer["ok"]
        if answer.get("kept"):
            self._kept += 1
        elif answer["ok"]:
            self._frames += answer["frames"]
            self._bytes += answer["bytes"]
        now = time.monotonic()
        if now - self._shown >= _LINE_SECONDS or self._done == self._videos:
            self._shown = now
            left = (now - self._began) / self._done * (self._videos - self._done)
            clock = time.strftime("%H:%M:%S", time.gmtime(left))
            days = f"{int(left // 86400)} d " if left >= 86400 else ""
            print(f"{self._done}/{self._videos} videos, {self.total()}, ETA {days}{clock}", flush=True)

    def total(self) -> str:
        """What was done so far."""
        seconds = max(1e-9, time.monotonic() - self._began)
        speed = f"{self._frames / seconds:.0f} frames/s, {self._bytes / seconds / 1e6:.1f} MB/s"
        kept = f", {self._kept} found whole" if self._kept else ""
        return f"{self._failed} failed{kept}, {self._frames} frames in {seconds:.0f} s ({speed})"
