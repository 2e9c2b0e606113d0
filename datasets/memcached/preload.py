"""`python main.py preload EXP`: put the frames of an experiment into its memcached servers before training.

Frames that a server already has are checked by key. They are not read and sent again, so the same command resumes
after an interruption. `--shard r/n` takes every n-th video, starting at r, so that n nodes share the work. A server
without room keeps what it has (-M). The rest of its videos will come from the disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.loading.bad_media import printable
from utils.errors import MediaError, UserError
from utils.options import Parser

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.plan.views import EvalSpec
    from datasets.readers.spec import ReaderSpec

_SAY_SECONDS = 2.0  # between two progress lines
_NAMED = 20  # failures that are listed by name


@dataclasses.dataclass
class PreloadProgress:
    """The work done so far. `lock` guards all changes."""

    videos: int
    done: int = 0
    frames: int = 0
    there: int = 0  # frames that a server already had
    stored: int = 0
    read_bytes: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)
    full: set[str] = dataclasses.field(default_factory=set)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    began: float = dataclasses.field(default_factory=time.monotonic)

    def text(self) -> str:
        """Return one line: videos, frames, MB/s, ETA, full servers."""
        seconds = max(time.monotonic() - self.began, 1e-3)
        # Assumes that the rest is as fast as the videos so far.
        left = int((self.videos - self.done) * seconds / self.done) if self.done else 0
        missing = self.frames - self.there - self.stored
        return (
            f"{self.done}/{self.videos} videos, {self.frames} frames: {self.there} already there, {self.stored} "
            f"stored, {missing} not; {self.read_bytes / 1e6:.0f} MB, {self.read_bytes / 1e6 / seconds:.1f} MB/s, "
            f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            + (f"; full: {', '.join(sorted(self.full))}" if self.full else "")
        )


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Returns:
        0 if everything was read (stored, or refused by a full server), 1 if videos could not be read, 130 if
        interrupted.
    """
    args = _arguments(argv)

    from datasets.loading import loader  # loads torch, so that help and a mistyped option do not wait for it
    from datasets.plan.views import eval_spec
    from utils import config

    # Store frames under the keys of the reader `memcached`, whichever reader the experiment has.
    overrides = [*args.set, "data.reader=memcached"]
    if args.servers:
        overrides.append(f"data.memcached.servers={args.servers}")
    cfg = config.load(args.exp, overrides)

    splits = ("train", "val") if args.split == "both" else (args.split,)
    config.check_files(cfg, splits)
    spec = loader.loader_options(cfg).reader

    lists = {split: loader.records_of(cfg, split) for split in splits}
    # Check everything before the first list is stored, which may take hours.
    for records in lists.values():
        _check_frames(records)
    _check_servers(spec)

    code = 0
    for split, records in lists.items():
        views = eval_spec(cfg) if args.frames == "val" else None
        turn, turns = args.shard
        try:
            progress = preload(records, spec, range(turn, len(records), turns), views, workers=args.workers)
        except KeyboardInterrupt:
            print("\nstopped; run the same command again to resume", file=sys.stderr)
            return 130

        print(f"{split}: {progress.text()}")
        for failure in progress.failed[:_NAMED]:
            print(f"  cannot be read: {failure}")
        if progress.failed:
            print(f"  {len(progress.failed)} videos could not be read")
            code = 1
    return code


def preload(
    records: Records, spec: ReaderSpec, samples: Sequence[int], views: EvalSpec | None, *, workers: int
) -> PreloadProgress:
    """Store the frames of these records: all frames, or those that an evaluation with `views` reads.

    Args:
        workers: threads; each has its own connections.
    """
    progress = PreloadProgress(len(samples))
    todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    for sample in samples:
        todo.put(sample)

    stop = threading.Event()
    bugs: list[BaseException] = []

    def work() -> None:
        try:
            _work(records, spec, views, todo, progress, stop)
        except BaseException as error:  # noqa: BLE001  raised again below, in the thread that started this one
            bugs.append(error)
            stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, workers))]
    for thread in threads:
        todo.put(None)  # one end mark per thread
        thread.start()

    last_report = time.monotonic()
    try:
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            if time.monotonic() - last_report > _SAY_SECONDS:
                last_report = time.monotonic()
                print(progress.text(), file=sys.stderr, flush=True)
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    if bugs:
        raise bugs[0]
    return progress


def _work(
    records: Records,
    spec: ReaderSpec,
    views: EvalSpec | None,
    todo: queue.SimpleQueue[int | None],
    progress: PreloadProgress,
    stop: threading.Event,
) -> None:
    """Take samples until there are none. Each thread runs this."""
    from datasets.memcached.source import MemcachedReader
    from datasets.plan.views import resolve_eval

    reader = MemcachedReader(spec, records)
    reader.source = reader.below  # probe from the disk: a server's answer would cost a round trip

    try:
        while not stop.is_set() and (sample := todo.get()) is not None:
            failure = warmed = None
            try:
                plan = None if views is None else resolve_eval(reader.probe(sample), views, sample)
                warmed = reader.warm(sample, None if plan is None else [int(frame) for frame in plan.frames])
            except MediaError as error:
                failure = str(error)

            _, events = reader.counters() or ({}, [])
            with progress.lock:
                progress.done += 1
                progress.full |= {server for server, text in events if text.startswith("full")}
                if failure is not None:
                    progress.failed.append(failure)
                if warmed is not None:
                    progress.frames += warmed.frames
                    progress.there += warmed.there
                    progress.stored += warmed.stored
                    progress.read_bytes += warmed.read_bytes
    finally:
        reader.close()


def _check_frames(records: Records) -> None:
    """Raise UserError for a list of video files, where every record would fail for the same reason."""
    from datasets.lists.files import VIDEOS

    named = (i for i in range(len(records)) if records.path(i).lower().endswith(VIDEOS))
    first = next(named, None)
    # The name alone proves nothing: a folder of frames may be called x.avi.
    if first is not None and os.path.isfile(records.full_path(first)):
        raise UserError(
            f"{records.list_file} names video files ({printable(records.path(first))}); preload stores frames: "
            "`python main.py dump` makes folders or shards of them; give their list and root"
        )


def _check_servers(spec: ReaderSpec) -> None:
    """Raise UserError unless every server answers now. With a server missing, its part of the data would be lost."""
    from datasets.memcached.source import open_pool

    settings: dict[str, Any] = spec.memcached or {}
    if not settings["servers"]:
        raise UserError(
            "data.memcached.servers is auto, and the launcher has started none here: name them, for example "
            "--servers 10.0.0.5:11211, or give a file with one per line"
        )

    pool = open_pool(settings)
    try:
        silent = [server for server, answers in pool.probe().items() if not answers]
    finally:
        pool.close()

    if silent:
        raise UserError(f"memcached does not answer at {', '.join(silent)}; start it, or name another server")


def _shard(text: str) -> tuple[int, int]:
    turn, slash, turns = text.partition("/")
    if not (slash and turn.isdecimal() and turns.isdecimal() and int(turn) < int(turns)):
        raise argparse.ArgumentTypeError(f"{text!r}: write r/n with 0 <= r < n, such as 0/4")
    return int(turn), int(turns)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="main.py preload", description="put the frames of an experiment into memcached servers")
    parser.add_argument("exp", type=Path, help="experiment folder with a config.yaml")
    parser.add_argument("--split", choices=("train", "val", "both"), default="train", help="which list (train)")
    parser.add_argument(
        "--frames",
        choices=("all", "val"),
        default="all",
        help="all frames of each video, or only those that a validation reads",
    )
    parser.add_argument("--servers", help="a file with servers, or [host:port, unix:/path]; default: the config's")
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="r/n", help="every n-th video, starting at r")
    parser.add_argument("--workers", type=int, default=4, help="number of threads that read and store (4)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")

    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    return args
