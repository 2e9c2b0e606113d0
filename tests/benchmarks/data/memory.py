"""Memory: readers that read for long, and what a list of a million videos costs a node."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.rows import command, run_rows, workspace

CLIPS = int(os.environ.get("ZOETROPE_ACCEPT_CLIPS", "10000"))
VIDEOS, EVERY, WARM_UP = 64, 100, 0.2
#: What counts as flat: growth over 10^4 clips [MiB].
FLAT_MIB = 2.0
RECORDS, WORKERS, LIMIT_MB = 1_000_000, 4, 150
READERS = ("frames", "packs", "memcached", "video", "clips", "dali")
ENV = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


def memory(work: Path) -> dict:
    """Growth of each reader, each in a process of its own; memory of a list, with and without a million records."""
    folders = media(work)
    measured: dict[str, Any] = {}
    holds = CLIPS >= 10_000
    for name in READERS:
        why = missing(name)
        if why:
            measured[name], holds = f"not measured: {why}", False
            continue
        measured[name] = child("read", name, folders[name])
        holds &= measured[name]["growth_mib"] <= FLAT_MIB
    sizes = {count: child("list", str(count), write_list(work / f"{count}.txt", count)) for count in (64, RECORDS)}
    cost = {key: round(sizes[RECORDS][key] - sizes[64][key], 1) for key in ("start_mb", "stepping_mb", "peak_mb")}
    measured["list_of_1e6_mb"] = cost
    return {"measured": measured, "holds": holds and max(cost.values()) <= LIMIT_MB}


def missing(name: str) -> str:
    """Why a reader cannot be used here; empty if it can."""
    if name == "memcached" and not shutil.which("memcached"):
        return "memcached is not installed"
    return "NVIDIA DALI is not installed" if name == "dali" and not importlib.util.find_spec("nvidia.dali") else ""


def child(*words: object) -> dict[str, Any]:
    """This file in a process of its own; the JSON line that it prints."""
    done = command("-m", "tests.benchmarks.data.memory", "--child", *map(str, words), env=ENV)
    return json.loads(done.stdout.strip().splitlines()[-1])


def media(work: Path) -> dict[str, Path]:
    """Small barcoded VP9 videos (DALI's CPU build takes them), and their dumps; reader -> folder with train.txt."""
    from tests.datasets.videos import write_video

    videos = work / "small"
    videos.mkdir(parents=True, exist_ok=True)
    first = write_video(videos / "v000.mp4", "libvpx-vp9", 24, options={"g": "12", "cpu-used": "8"})
    for number in range(1, VIDEOS):
        shutil.copy(first, videos / f"v{number:03d}.mp4")
    (videos / "train.txt").write_text("".join(f"v{number:03d}.mp4 0\n" for number in range(VIDEOS)))
    folders = {"video": videos, "dali": videos}
    for form in ("frames", "packs", "clips"):
        folders[form] = work / f"small-{form}"
        command("main.py", "dump", videos / "train.txt", folders[form], "--as", form, "--workers", "2")
    return folders | {"memcached": folders["frames"]}


def write_list(path: Path, count: int) -> Path:
    """A list whose paths are as long as those of Kinetics; none of the files exists."""
    with path.open("w") as file:
        for number in range(count):
            file.write(f"playing some instrument/{number:011d}_000012_000022.mp4 {number % 400}\n")
    return path


def read(name: str, folder: str) -> dict[str, Any]:
    """Read CLIPS clips of four frames as a reader process does; growth of resident memory by its median slope."""
    import contextlib

    from datasets.lists.records import Records
    from datasets.loading.messages import ReadClip
    from datasets.loading.slots import Slot
    from datasets.loading.workers import ReadHandler, Setup
    from datasets.plan.sampling import Sampling
    from tests.datasets.specs import reader_spec, train_spec

    spec = train_spec(Sampling("tsn", 4), input_size=32, crop="random_resized")
    records = Records.load(f"{folder}/train.txt", folder, num_class=1)
    kind = {"packs": "frames", "clips": "video"}.get(name, name)
    with contextlib.ExitStack() as stack:
        cached = stack.enter_context(server()) if kind == "memcached" else None
        reader = reader_spec(kind, memcached=cached)
        handler = ReadHandler(Setup(reader, train=spec), records, [Slot.create("m", 1 << 20)])
        points = []
        for position in range(CLIPS):
            epoch, sample = divmod(position, len(records))
            answer = handler.answer(1, ReadClip(sample, epoch, position))
            if not answer.ok:
                raise SystemExit(f"{name}: {answer}")
            if position % EVERY == EVERY - 1:
                points.append((position, resident_mib()))
        handler.close()
    quarter = len(points) // 4
    medians = [statistics.median(mib for _, mib in points[k * quarter : (k + 1) * quarter]) for k in range(4)]
    points = points[int(WARM_UP * len(points)) :]
    growth = {"growth_mib": round(1e4 * median_slope(points), 3)}
    return growth | {"resident_mib_by_quarter": [round(mib, 1) for mib in medians]}


def server() -> Any:
    """Fields of a ReaderSpec for a memcached of our own."""
    import contextlib
    import tempfile

    @contextlib.contextmanager
    def run() -> Iterator[dict[str, Any]]:
        from tests.memcached import Server

        with tempfile.TemporaryDirectory(prefix="zoe-") as folder:
            running = Server(Path(folder), "s")
            names = {"timeout_ms": 5000.0, "connect_timeout_ms": 5000.0, "secret_file": None, "namespace": ""}
            try:
                yield {"servers": [running.name], **names}
            finally:
                running.close()

    return run()


def median_slope(points: list[tuple[int, float]]) -> float:
    """MiB per clip: the median of the slopes of all pairs (Theil-Sen), which single jumps do not move."""
    slopes = [
        (later[1] - sooner[1]) / (later[0] - sooner[0])
        for number, sooner in enumerate(points)
        for later in points[number + 1 :]
    ]
    return statistics.median(slopes)


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def from_list(count: str, path: str) -> dict[str, float]:
    """The training loader with its reader processes on a list: memory of all, shared pages counted once, in MB."""
    import torch

    from datasets.lists.records import Records
    from datasets.loading import train as train_loader
    from datasets.loading.base import LoaderOptions
    from datasets.plan.sampling import Sampling
    from tests.datasets.specs import reader_spec, train_spec
    from utils.shards import ShardPlan

    torch.set_num_threads(1)
    records = Records.load(path, "/nowhere", num_class=400)
    assert len(records) == int(count)
    spec = train_spec(Sampling("tsn", 4), input_size=32, crop="random_resized")
    options = LoaderOptions(reader_spec("video"), workers=WORKERS, on_bad="skip", bad_budget=1.0)
    shards = ShardPlan(total=1, batch_size=8, world=1, rank=0, group_size=1)
    with train_loader.TrainLoader(records, spec, options, seed=0, shards=shards) as loader:
        next(loader)
        start = together_mb()
        for _ in range(20):
            next(loader)
        figures = {"start_mb": start, "stepping_mb": together_mb()}
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return figures | {"peak_mb": int(peak.split()[1]) * 1024 / 1e6}


def together_mb() -> float:
    """Proportional share (PSS) of this process and its children, in MB."""
    own_pid = os.getpid()
    children = Path(f"/proc/{own_pid}/task/{own_pid}/children").read_text().split()
    total = 0
    for pid in [str(own_pid), *children]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total / 1e6


ROWS = {
    "memory": (
        "resident memory over 10^4 small clips, every reader; a list of 1,000,000 records",
        "flat (slope test); <= 150 MB per node with its reader processes",
        lambda: memory(workspace()),
    ),
}

if __name__ == "__main__":
    if sys.argv[1:2] != ["--child"]:
        sys.exit(run_rows(ROWS))
    print(json.dumps({"read": read, "list": from_list}[sys.argv[2]](*sys.argv[3:])))
