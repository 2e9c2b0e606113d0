"""Our side of `peers pair --ours`: training clips per CPU-second of one process and one thread.

Data and pipes are those of `peers bench-data`: 16 clips of 340x256 in DIR, TSN-8 or 32x2, a random resized crop to 224.
The clips go through `datasets.loading.workers.ReadHandler`, which is what every reader process of training runs; flipping and
packing are left to the device.

    python -m tests.benchmarks.data.bench_reader --data DIR --backend video --pipe sparse8 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

from datasets.lists.records import Records  # noqa: E402
from datasets.loading.messages import Answer, ReadClip, packed  # noqa: E402
from datasets.loading.slots import Slot  # noqa: E402
from datasets.loading.workers import ReadHandler, Setup  # noqa: E402
from datasets.plan.sampling import Sampling  # noqa: E402
from datasets.readers import ReaderSpec  # noqa: E402
from tests.datasets.specs import reader_spec, train_spec  # noqa: E402

# backend: (reader, folder of DIR, how a path of it ends, clips that are timed)
BACKENDS = {
    "frames": ("frames", "frames", "", 320),
    "packs": ("frames", "packs", ".fsh", 320),
    "memcached": ("memcached", "frames", "", 320),
    "video": ("video", "videos", ".mp4", 32),
    "clips": ("video", "clips", ".mp4", 160),
}
PIPES = {"sparse8": Sampling("mmaction2_1x", 8), "dense32x2": Sampling("mmaction2_1x", 1, 32, 2)}
WARM_UP, FRAMES = 4, 300


def handler(args: argparse.Namespace) -> ReadHandler:
    """The work of a reader process, in this one."""
    reader, folder, ending, _ = BACKENDS[args.backend]
    root = args.root or args.data / folder
    lists = args.data / f"list_bench_{args.backend}.txt"
    names = sorted(path.stem for path in (args.data / "videos").iterdir())
    count = "" if reader == "video" else f" {FRAMES}"
    content = "".join(f"{name}{ending}{count} {number % 4}\n" for number, name in enumerate(names))
    if not lists.exists() or lists.read_text() != content:
        lists.write_text(content)
    records = Records.load(lists, root, num_class=4)
    crop = {"crop": "random_resized", "area": (0.08, 1.0), "aspect": (3 / 4, 4 / 3)}
    spec = train_spec(PIPES[args.pipe], input_size=224, **crop)
    known = {field.name for field in dataclasses.fields(ReaderSpec)}
    extra = json.loads(args.spec)
    if extra.keys() - known:
        raise SystemExit(f"ReaderSpec has no {', '.join(extra.keys() - known)}; it has {', '.join(sorted(known))}")
    clip = spec.sampling.frames_per_clip * 224 * 224 * 3
    setup = Setup(reader_spec(kind=reader, **extra), train=spec, seed=args.seed)
    return ReadHandler(setup, records, [Slot.create("bench-clips", clip)])


def ask(work: ReadHandler, position: int) -> Answer:
    """One clip: plan, read, answer, as a request of the training loader has it."""
    videos = len(work.records)
    answer = work.answer(position, ReadClip(position % videos, position // videos, position))
    if not answer.ok:
        raise SystemExit(f"clip {position} cannot be read: {answer}")
    packed(answer)
    return answer


def main() -> int:
    """Time the clips and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="what `peers data` made")
    parser.add_argument("--backend", choices=BACKENDS, default="video")
    parser.add_argument("--pipe", choices=PIPES, default="sparse8")
    parser.add_argument("--clips", type=int, help="how many to time (320 from frames, 32 from videos)")
    parser.add_argument("--root", type=Path, help="where the media are, instead of the backend's folder of DIR")
    parser.add_argument("--spec", default="{}", help="more fields of ReaderSpec, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    args = parser.parse_args()
    import cv2

    cv2.setNumThreads(0)
    count = args.clips or BACKENDS[args.backend][3]
    work = handler(args)
    for position in range(count - WARM_UP, count):  # the last videos: nothing of the first is in a cache
        ask(work, position)
    wall, cpu = time.perf_counter(), time.process_time()
    answer = None
    for position in range(count):
        answer = ask(work, position)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert answer is not None
    assert answer.plan is not None
    shape = [len(answer.plan.frames), 224, 224, 3]
    digest = int(work.slots[0].view(0, (int(np.prod(shape)),)).sum(dtype=np.int64))
    figures = {"bench": "data", "backend": args.backend, "pipe": args.pipe, "clips": count}
    figures |= {"clips_per_cpu_s": round(count / cpu, 2), "clips_per_wall_s": round(count / wall, 2)}
    figures |= {"shape": shape, "sum": digest}
    print(json.dumps(figures) if args.json else "\n".join(f"{key:>18}  {value}" for key, value in figures.items()))
    work.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
