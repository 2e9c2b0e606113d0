"""How fast clips are read from JPEG, mp4 and dumped clips, beside MMAction2 1.2.0; all readers on real files.

The videos are those of `peers data`: $ZOETROPE_BENCH, or made here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.data import memcached as parts
from tests.benchmarks.rows import ROOT, SHARED, command, environment, run_rows, workspace

PEERS = SHARED.parent / "tools" / "peers"
PIPES = ("sparse8", "dense32x2")
ROUNDS = int(os.environ.get("ZOETROPE_ACCEPT_ROUNDS", "5"))
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def conformance(_work: Path) -> dict:
    """Run the conformance test of the readers; report each reader that was skipped."""
    argv = ("-m", "pytest", "-q", "-rs", "tests/datasets/test_conformance.py", "-p", "no:cacheprovider")
    done = command(*argv, env=ONE_THREAD, check=False)
    lines = done.stdout.strip().splitlines()
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    holds = done.returncode == 0 and " passed" in lines[-1] and SHARED.is_dir()
    return {"measured": {"tests": lines[-1], "skipped": skipped}, "holds": holds and not skipped}


def jpeg(work: Path) -> dict:
    """Frame folders beside turbojpeg; then what memcached and shards add to decoding alone."""
    data = bench_data(work)
    measured: dict[str, Any] = {
        pipe: pair(f"--data {data} --backend frames --pipe {pipe}", f"--data {data} --backend raw_turbojpeg", pipe)
        for pipe in PIPES
    }
    holds = measured["sparse8"]["median"] >= 1.1 and measured["dense32x2"]["median"] >= 1.25
    measured["over_decoding_alone"] = sources(data, work)
    bounds = {"packs": 1.08, "memcached": 1.10}
    for name, bound in bounds.items():
        row = measured["over_decoding_alone"].get(name)
        holds &= row is not None and row["median"] <= bound
    return {"measured": measured, "holds": holds}


def mp4(work: Path) -> dict:
    """Long-GOP files, both sides on the same."""
    data = bench_data(work)
    measured = {
        pipe: pair(f"--data {data} --backend video --pipe {pipe}", f"--data {data} --backend decord", pipe)
        for pipe in PIPES
    }
    return {"measured": measured, "holds": above(measured, {"sparse8": 1.3, "dense32x2": 1.2})}


def clips(work: Path) -> dict:
    """What `main.py dump --as clips` makes of the same files, with its default settings, beside decord on them."""
    data = bench_data(work)
    out = work / "clips"
    names = work / "bench.txt"
    names.write_text((data / "list_videos.txt").read_text())
    command("main.py", "dump", names, out, "--root", data / "videos", "--as", "clips", "--workers", "2")
    measured: dict[str, Any] = {
        pipe: pair(f"--data {data} --backend clips --root {out} --pipe {pipe}", f"--data {data} --backend decord", pipe)
        for pipe in PIPES
    }
    sizes = [sum(file.stat().st_size for file in folder.glob("*.mp4")) for folder in (out, data / "videos")]
    measured["size"] = round(sizes[0] / sizes[1], 3)
    holds = above(measured, {"sparse8": 5.5, "dense32x2": 2.7}) and measured["size"] <= 1.5
    return {"measured": measured, "holds": holds}


def above(measured: dict[str, Any], bounds: dict[str, float]) -> bool:
    """Whether the median ratio of each pipe reaches its bound."""
    return all(measured[pipe]["median"] >= bound for pipe, bound in bounds.items())


def bench_data(work: Path) -> Path:
    """16 clips of 340x256 as `peers data` makes them from two real files; made once."""
    data = Path(os.environ.get("ZOETROPE_BENCH") or work.parent / "zoetrope-bench-data")
    real = [SHARED / "single" / "mmaction2" / name for name in ("demo.mp4", "test.mp4")]
    peers("data", "--out", data, "--videos", *real)
    return data


def pair(ours: str, theirs: str, pipe: str) -> dict:
    """Both sides in turn: median ratio of clips per CPU-second, its spread, all rounds."""
    ours = f"{shlex.quote(sys.executable)} -m tests.benchmarks.data.bench_reader {ours} --json"
    output = peers(
        "pair", "--rounds", ROUNDS, "--field", "clips_per_cpu_s", "--json",
        "--ours", ours, "--theirs", f"bench-data {theirs} --pipe {pipe}",
    )  # fmt: skip
    row = json.loads(output.splitlines()[-1])
    return {key: row[key] for key in ("median", "min", "max", "ours", "theirs")}


def peers(*words: object) -> str:
    """Run the tool that measures beside MMAction2."""
    argv = [str(PEERS), *map(str, words)]
    done = subprocess.run(argv, env=environment(ONE_THREAD), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peers {words[0]}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout


def sources(data: Path, work: Path) -> dict:
    """CPU seconds of getting and decoding the frames of TSN-8 clips / of decoding them, by source, in turns."""
    import numpy as np

    from datasets.readers.frame_source import FilesSource
    from datasets.readers.frames import decode

    folders = sorted(path for path in (data / "frames").iterdir() if path.is_dir())
    packs = shards_of(data, work)
    random = np.random.default_rng(0)
    plans = []
    for number in range(160):
        ordinals = (np.arange(8) * 300 // 8 + random.integers(0, 37, 8)).tolist()
        plans.append((number % len(folders), [f"img_{ordinal + 1:05d}.jpg" for ordinal in ordinals]))
    files = FilesSource()

    def run(read: Callable[[int, list[str]], list[bytes]]) -> float:
        began = time.process_time()
        for video, names in plans:
            for data in read(video, names):
                decode(data, "x.jpg")
        return time.process_time() - began

    held = [files.read_many(str(folders[video]), names) for video, names in plans]
    turn = iter(range(1 << 30))
    ways: dict[str, Callable[[int, list[str]], list[bytes]]] = {
        "memory": lambda _video, _names: held[next(turn) % len(held)],
        "files": lambda video, names: files.read_many(str(folders[video]), names),
        "packs": lambda video, names: files.read_many(str(packs[video]), names),
    }
    with contextlib.ExitStack() as stack:
        cached = stack.enter_context(memcached_source(work, files))
        if cached is not None:
            ways["memcached"] = lambda video, names: cached.read_many(str(folders[video]), names)
            for video, names in plans:  # all frames are there before the first timed round
                cached.read_many(str(folders[video]), names)
                cached.pool.flush(30)
            cached.pool.take()
        for read in ways.values():
            run(read)
        rounds = [{name: run(read) for name, read in ways.items()} for _ in range(ROUNDS)]
        hits = cached.pool.take()[0] if cached is not None else {}
    ratios_of: dict[str, Any] = {}
    for name in ways:
        ratios = [row[name] / row["memory"] for row in rounds]
        if name != "memory":
            ratios_of[name] = {"median": round(statistics.median(ratios), 3), "rounds": [round(r, 3) for r in ratios]}
    return ratios_of | ({"memcached_counts": dict(hits)} if hits else {})


def shards_of(data: Path, work: Path) -> list[Path]:
    """One shard per frame folder, with the same bytes."""
    names = work / "shards.txt"
    folders = sorted(path.name for path in (data / "frames").iterdir() if path.is_dir())
    names.write_text("".join(f"{name} 300 {number % 4}\n" for number, name in enumerate(folders)))
    command("main.py", "dump", names, work / "packs", "--root", data / "frames", "--as", "packs", "--workers", "2")
    return [work / "packs" / f"{name}.fsh" for name in folders]


@contextlib.contextmanager
def memcached_source(work: Path, files: Any) -> Any:
    """A MemcachedSource on a server of our own; None where memcached or its client is not installed."""
    if parts.MISSING:
        yield None
        return
    from datasets.memcached.client import MemcachedPool, ClientSettings
    from datasets.memcached.source import MemcachedSource

    folder = work / "memcached"
    folder.mkdir(parents=True, exist_ok=True)
    server = parts.Server(folder, "s", megabytes=512)
    pool = MemcachedPool(ClientSettings((server.name,), timeout=5.0))
    try:
        yield MemcachedSource(files, pool)
    finally:
        pool.close()
        server.close()


ROWS = {
    "conformance": (
        "one plan through every reader on real files and lossless or VP9 copies",
        "same frames by ordinal (barcodes exact); bit-equal, dali within its stated tolerance",
        lambda: conformance(workspace()),
    ),
    "jpeg": (
        "TSN-8 / 32x2 from JPEG 340x256 / mmaction2 turbojpeg; CPU of memcached and shards / decoding alone",
        ">= 1.1x / >= 1.25x; <= 1.10x and <= 1.08x",
        lambda: jpeg(workspace()),
    ),
    "mp4": (
        "TSN-8 / 32x2 from long-GOP mp4 / mmaction2 decord",
        ">= 1.3x / >= 1.2x",
        lambda: mp4(workspace()),
    ),
    "clips": (
        "TSN-8 / 32x2 from clips / mmaction2 decord on the originals",
        ">= 5.5x / >= 2.7x, size <= 1.5x",
        lambda: clips(workspace()),
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
