"""`python main.py demo-data`: write motion8, a small video data set for the demo, as H.264 files and lists.

- Each file depends on (seed, its number) only, so any number of processes writes the same files.
- All frames are intra-coded at a fixed quantiser, so the place of a frame in a clip does not change its coding. With
  long groups of pictures, the residue of the codec alone would show the direction of play.
- A video gets its name when it is complete, so a stopped run resumes where it was.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from datasets.demo import motion8
from utils import files
from utils.errors import UserError
from utils.options import Parser
from utils.signals import end_with_parent

SETTINGS = "settings.json"
FORMAT = 1  # increase it when the same seed gives different pictures


def main(argv: Sequence[str]) -> int:
    """Write the demo data set, or the part of it that is missing."""
    args = _parser().parse_args(argv)
    if args.train < 8 or args.val < 8 or args.seed < 0 or args.workers < 1:
        raise UserError(
            "demo-data: --train and --val must be 8 or more (one clip per class), --seed 0 or more, --workers 1 or more"
        )

    settings = {"data_set": "motion8", "format": FORMAT, "seed": args.seed, "train": args.train, "val": args.val}
    out = Path(args.out)
    try:
        open_folder(out, settings)
        written = write_videos(out, settings, workers=args.workers)
        write_lists(out, settings)
    except OSError as error:
        where = error.filename or out
        raise UserError(
            f"demo-data: cannot write {where}: {error.strerror}; choose another folder with --out"
        ) from error

    total = args.train + args.val
    print(f"{out}: {total} videos ({written} written now, {total - written} existed), lists in {out / 'lists'}")
    return 0


def open_folder(out: Path, settings: files.Row) -> None:
    """Create the folder, or resume one that the same settings began.

    Raises:
        UserError: the folder holds something else; nothing in it is changed.
    """
    file = out / SETTINGS
    if file.exists():
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            saved = None
        if saved != settings:
            raise UserError(
                f"demo-data: {file} was written with other settings ({saved}); delete {out} or choose another --out"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"demo-data: {out} is not empty and was not written by demo-data; choose another --out")

    # Write the settings first: if this is killed at any time, the folder shows which settings began it.
    out.mkdir(parents=True, exist_ok=True)
    files.write(file, (json.dumps(settings, indent=1) + "\n").encode())
    for part in ("videos", "lists"):
        (out / part).mkdir(exist_ok=True)
    for stale in (out / "videos").glob("*.tmp"):  # left by a run that was killed
        stale.unlink()


def all_labels(settings: files.Row) -> tuple[np.ndarray, np.ndarray]:
    """Return the motion and shape labels (N,) of all clips, those of training first."""
    train = motion8.labels(settings["train"], seed=settings["seed"], split=0)
    val = motion8.labels(settings["val"], seed=settings["seed"], split=1)
    return np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])


def write_videos(out: Path, settings: files.Row, *, workers: int) -> int:
    """Write the videos that do not exist yet, with a progress line. Return their number."""
    motion, shape = all_labels(settings)
    jobs = [
        (str(out / name_of(i)), settings["seed"], i, int(motion[i]), int(shape[i]))
        for i in range(len(motion))
        if not (out / name_of(i)).exists()
    ]

    progress = _Progress("videos", len(jobs))
    # A pool takes seconds to start, more than a few clips.
    if workers == 1 or len(jobs) < 32:
        for job in jobs:
            _write_video(job)
            progress.advance()
        return len(jobs)

    # Spawn, do not fork: the caller may have threads.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_follow_parent, initargs=(os.getpid(),))
    try:
        for _ in pool.map(_write_video, jobs, chunksize=8):
            progress.advance()
    finally:
        pool.shutdown(cancel_futures=True)

    return len(jobs)


def write_lists(out: Path, settings: files.Row) -> None:
    """Write train and val lists (`path frames label`) for the motions and for the shapes, and the class names."""
    train = settings["train"]

    for suffix, names, label in zip(
        ("", "_shape"), (motion8.MOTIONS, motion8.SHAPES), all_labels(settings), strict=True
    ):
        lines = [f"{name_of(i)} {motion8.FRAMES} {label[i]}\n" for i in range(len(label))]
        files.write(out / "lists" / f"train{suffix}.txt", "".join(lines[:train]).encode())
        files.write(out / "lists" / f"val{suffix}.txt", "".join(lines[train:]).encode())
        classes = "".join(f"{k} {name}\n" for k, name in enumerate(names))
        files.write(out / "lists" / f"classInd{suffix}.txt", classes.encode())


def name_of(index: int) -> str:
    """Return the path of a clip below the folder of the data set."""
    return f"videos/{index:05d}.mp4"


def encode(frames: np.ndarray) -> bytes:
    """Encode a clip as an all-intra H.264 mp4 file.

    Args:
        frames: uint8 (T, H, W, 3) RGB.

    Raises:
        UserError: this PyAV has no H.264 encoder.
    """
    import av

    buffer = io.BytesIO()
    # One thread, so that the bytes do not depend on the machine.
    options = {"preset": "ultrafast", "qp": "14", "g": "1", "bf": "0", "threads": "1"}

    with av.open(buffer, "w", format="mp4") as container:
        try:
            stream = container.add_stream("libx264", rate=16, options=options)
        except ValueError as error:  # PyAV's UnknownCodecError is one
            raise UserError(
                "demo-data: PyAV was built without libx264; install the wheel: pip install --force-reinstall av"
            ) from error

        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for picture in frames:
            # The frames of a clip that plays backwards are a view with negative strides.
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))

    return buffer.getvalue()


def _write_video(job: tuple[str, int, int, int, int]) -> None:
    path, seed, index, motion, shape = job
    frames = motion8.clip(seed, index, motion8.MOTIONS[motion], motion8.SHAPES[shape])
    files.write(Path(path), encode(frames))


def _follow_parent(parent: int) -> None:
    """Leave interrupts to the parent, and end when it ends: idle processes of a pool would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent, signal.SIGKILL)()


class _Progress:
    """Show one line `videos 320/1440  22%  ETA 9 s`: rewritten in place on a terminal, a few lines in a file."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.begin = time.monotonic()
        self.shown = self.begin

    def advance(self) -> None:
        """Count one more video, and show the line if it is time."""
        self.done += 1
        now = time.monotonic()
        in_place = sys.stdout.isatty()
        if self.done < self.total and now - self.shown < (0.2 if in_place else 5.0):
            return

        self.shown = now
        left = (now - self.begin) / self.done * (self.total - self.done)
        line = f"{self.what} {self.done}/{self.total} {100 * self.done // self.total:3d}%  ETA {left:.0f} s "
        end = "\n" if self.done == self.total or not in_place else ""
        print(("\r" if in_place else "") + line, end=end, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python main.py demo-data",
        description="Write motion8: short videos of moving shapes, in 8 motion classes that need the order of frames.",
    )

    # The options below are all numbers.
    add = functools.partial(parser.add_argument, metavar="N", type=int)
    parser.add_argument("--out", default="data/motion8", metavar="DIR", help="folder to write (data/motion8)")
    add("--train", default=1200, help="training clips (1200)")
    add("--val", default=240, help="validation clips (240)")
    add("--seed", default=0, help="random seed of the data set (0)")
    add("--workers", default=min(os.cpu_count() or 1, 16), help="processes (one per core)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
