"""`python main.py benchmark data EXP`: how many training clips per second each reader delivers on this machine.

Measure two things. The first is one process with one thread, alternating with a bare decoding loop over its frames:
clips per CPU-second, stored megabytes per second, and the share of each stage. The second is the training loader with
1, 2, ... reader processes: clips per second, and whether a training step of a given length would wait for them.
docs/data_speed.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import typing
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError, did_you_mean
from utils.options import Parser

if TYPE_CHECKING:
    from anal_tools.benchmark.common import Figures
    from anal_tools.benchmark.reader_stages import Bench
    from utils.config import Config


def main(argv: list[str]) -> int:
    """Parse the command line, measure, print."""
    from anal_tools.benchmark.common import seconds
    from anal_tools.evaluate import positive

    parser = Parser(prog="main.py benchmark data", description="Time the readers on this machine.")
    parser.add_argument("exp", type=Path, help="experiment folder: its list, sampling, crop and reader are used")
    parser.add_argument(
        "--readers",
        nargs="+",
        default=[],
        metavar="READER[=FOLDER]",
        help="readers to compare (default: the experiment's); FOLDER: the output of `main.py dump` for this reader",
    )
    parser.add_argument("--clips", type=positive, default=64, help="clips to time per reader (default: 64)")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds of timing (default: 3)")
    parser.add_argument("--workers", default="1,2", help="numbers of reader processes, 0 = none (default: 1,2)")
    parser.add_argument("--step-time", type=seconds, default=None, metavar="SECONDS", help="length of a training step")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    args = parser.parse_args(argv)

    figures = measure(args)
    print(json.dumps(figures) if args.json else as_table(figures))
    return 0


def measure(args: argparse.Namespace) -> Figures:
    """Return all figures: one row per reader, and the conclusions from the rows."""
    from anal_tools.benchmark.reader_stages import Bench
    from utils import config

    cfg = config.load(args.exp, args.set)
    config.check_files(cfg, ("train",))

    # `--readers READER[=FOLDER]`; without it the reader and the media of the experiment
    readers = [text.partition("=") for text in args.readers] or [(cfg.data.reader, "", "")]
    workers = numbers(args.workers)
    choices = typing.get_args(type(cfg.data).model_fields["reader"].annotation)

    for name, _, _ in readers:
        if name not in choices:
            raise UserError(
                f"benchmark data: there is no reader {name!r}{did_you_mean(name, choices)}; "
                f"choose one of {', '.join(choices)}"
            )

    # Build all benches before the first is timed: a reader that cannot start ends the command at once.
    rows, benches = [], []
    for name, _, folder in readers:
        media = in_folder(cfg, folder) if folder else cfg
        benches.append(Bench(media, name, folder, clips=args.clips))
    try:
        for _ in range(args.rounds):  # readers take turns, so a machine that slows down slows all of them
            for bench in benches:
                bench.round(-(-args.clips // args.rounds))
        for bench in benches:
            rows.append(bench.figures())
            bench.close()  # its reader must not compete with the worker processes for the cores
            rows[-1]["workers"] = {str(count): with_workers(bench, count, args.clips) for count in workers}
    finally:
        for bench in benches:
            bench.close()

    return {
        "bench": "data",
        "clip": f"{cfg.model.num_segments} x {cfg.data.clip_len} frames of {cfg.augmentation.input_size} pixels",
        "cores": len(os.sched_getaffinity(0)),
        "batch": cfg.batch_size,
        "step_time": args.step_time,
        "readers": rows,
        **verdict(rows, cfg.batch_size, args.step_time, len(os.sched_getaffinity(0))),
    }


def numbers(text: str) -> list[int]:
    """Parse numbers of workers from `1,2,4`."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [-1]  # fails the check below
    if min(counts) < 0:
        raise UserError(f"benchmark data: --workers {text}: numbers of processes separated by commas, such as 1,2,4")
    return counts


def in_folder(cfg: Config, folder: str) -> Config:
    """Return the configuration with the media of a dump, which holds a list of the same name."""
    source = Path(folder) / Path(cfg.train_source).name
    if not source.is_file():
        raise UserError(f"benchmark data: {source} is missing; `main.py dump {cfg.train_source} {folder}` writes it")
    return cfg.model_copy(update={"train_source": str(source), "train_root": str(folder)})


def with_workers(bench: Bench, count: int, clips: int) -> dict[str, float]:
    """Time the training loader with `count` reader processes after its start-up, by the wall clock."""
    cfg = bench.cfg
    loader = bench.loader(count)
    try:
        steps, size = max(2, -(-clips // cfg.batch_size)), cfg.batch_size
        for _ in range(loader.options.prefetch + 1):  # drop the batches that were read while the processes started
            next(loader)

        # Only batches that are read at the steady rate count.
        waited, began = loader.seconds_waiting, time.perf_counter()
        for _ in range(steps):
            next(loader)
        seconds = time.perf_counter() - began

        return {
            "clips_per_s": round(steps * size / seconds, 2),
            "waiting": round((loader.seconds_waiting - waited) / seconds, 3),
            "bad": len(loader.ledger.samples),
        }
    finally:
        loader.close()


def verdict(rows: list[Figures], batch: int, step_time: float | None, cores: int) -> Figures:
    """Return which reader is fastest here, and whether a device that needs a batch every `step_time` seconds waits."""
    fastest = max(rows, key=lambda row: row["clips_per_cpu_s"])
    answer: Figures = {"fastest": fastest["reader"]}
    if step_time is None:
        return answer

    needed = batch / step_time
    answer["needed_clips_per_s"] = round(needed, 2)
    for row in rows:
        best = max((figures["clips_per_s"] for figures in row["workers"].values()), default=0.0)
        row["waits"] = best < needed
        # The time by which a step takes longer than the model alone, as a share of the whole.
        row["wait_share"] = round(max(0.0, 1 - best / needed), 3)
        # rounded up, by a floor division of the negative
        row["workers_needed"] = -(-needed // row["clips_per_cpu_s"])
        row["cores_are_enough"] = row["workers_needed"] <= cores

    answer["gpu_waits"] = all(row["waits"] for row in rows)
    return answer


def as_table(figures: Figures) -> str:
    """Return the figures as lines of text for people."""
    lines = [f"clips of {figures['clip']}, batch {figures['batch']}, {figures['cores']} cores"]

    # one block per reader: one thread, bare decode, stages, then a line per number of workers
    for row in figures["readers"]:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in row["stages"].items() if share >= 0.005)
        lines += [
            f"{row['reader']}",
            f"  one thread   {row['clips_per_cpu_s']:9.2f} clips per CPU-second   {row['mb_per_cpu_s']:8.2f} MB/s "
            f"stored   {row['kb_per_clip']:.0f} kB per clip",
            f"  bare decode  {row['raw_clips_per_cpu_s']:9.2f} clips per CPU-second   reader / bare decode "
            f"{row['over_raw']:.2f} of the CPU time",
            f"  time in      {shares}",
        ]
        lines += [
            f"  {count:>2} worker(s) {each['clips_per_s']:9.2f} clips/s" + (f", {each['bad']} bad" * bool(each["bad"]))
            for count, each in row["workers"].items()
        ]

    # the conclusions; without a step time only the fastest reader is known
    lines.append(f"fastest here: {figures['fastest']}")
    if figures["step_time"] is None:
        lines.append("give --step-time (from `benchmark step`) to see whether the GPU would wait")
        return "\n".join(lines)

    need = f"a step of {figures['step_time']:g} s needs {figures['needed_clips_per_s']:g} clips/s"
    for row in figures["readers"]:
        waiting = f"waits {100 * row['wait_share']:.0f} % of the time" if row["waits"] else "the GPU does not wait"
        enough = "" if row["cores_are_enough"] else f", more than the {figures['cores']} cores here"
        lines.append(f"{need}: {row['reader']}: {waiting}; {row['workers_needed']:.0f} workers would be enough{enough}")
    return "\n".join(lines)
