"""The real training loader on a fake GPU: which bytes the main thread copies, and when the next batch is asked for."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.fake_cuda import cases


def make_images(folder: Path, count: int = 8, frames: int = 4) -> Path:
    """Folders of JPEG frames and a list of them."""
    import numpy as np
    import simplejpeg

    lines = []
    for number in range(count):
        (folder / f"v{number}").mkdir(parents=True)
        for frame in range(frames):
            picture = np.full((40, 48, 3), 10 * number + frame, np.uint8)
            name = folder / f"v{number}" / f"img_{frame + 1:05d}.jpg"
            name.write_bytes(simplejpeg.encode_jpeg(picture, quality=90))
        lines.append(f"v{number} {frames} {number % 8}\n")
    (folder / "lists").mkdir()
    for name in ("train.txt", "val.txt"):
        (folder / "lists" / name).write_text("".join(lines))
    return folder


def steps(gpu: cases.Gpu, workers: int, may_pin: bool) -> dict[str, Any]:
    """Four steps of training with the loader of the config; figures of the last but one."""
    import torch

    import main
    from datasets.loading import loader
    from tests.fake_cuda import mode as modes
    from utils import dist
    from utils.shards import ShardPlan

    mode = gpu.fresh()
    if not may_pin:
        torch.cuda.cudart = lambda: modes.SimpleNamespace(cudaHostRegister=lambda *_: 1, cudaHostUnregister=None)
    sets = ["data.reader=frames", "model.num_segments=2", f"workers={workers}", "batch_size=2", "val_freq=100"]
    with tempfile.TemporaryDirectory() as name, mode:
        folder = make_images(Path(name) / "data")
        world = dist.World(device=gpu.device)
        shards = ShardPlan(total=2, batch_size=2, world=1, rank=0, group_size=1)
        run = cases.build(gpu, folder, "tsn", [f"common.{word}" for word in sets], shards, world)
        clip_bytes = 2 * 2 * run.cfg.augmentation.input_size**2 * 3  # of one micro-batch
        rows = []
        with loader.train(run.cfg, world, shards, stop=4) as batches:
            free_before = len(batches._free) + len(batches._steps)
            for step, micro_batches in batches:
                mode.forget()
                wait_until_read(batches)
                main.train_step(run, step, micro_batches, stop=False, save=False, meanwhile=batches.copy_ahead)
                rows.append(list(mode.log))
            slots_lost = free_before - len(batches._free) - len(batches._leaving) - len(batches._steps)
    order = [(entry.what, entry.size) for entry in rows[1]]
    names = [what for what, _ in order]
    waits = names.index("an event is waited for")
    copied = [size for what, size in order[:waits] if what == "copy to the GPU"]
    return {
        "workers": workers,
        "may_pin": may_pin,
        "clip_bytes": clip_bytes,
        "clips_copied_before_the_wait": sum(size == clip_bytes for size in copied),
        "main_thread_bytes_of_clips": sum(size for what, size in order if "main thread" in what and size >= clip_bytes),
        "waits": [f"{entry.what} at {entry.where}" for entry in rows[1] if entry.waits],
        "pinned_left": len([start for start, (_, owner) in mode.pinned.items() if owner is None]),
        "steps": len(rows),
        "slots_lost": slots_lost,
    }


def wait_until_read(batches: Any) -> None:
    """Until the readers have answered all requests, as on a machine on which they keep up."""
    import time

    end = time.monotonic() + 30
    service = batches.service
    while hasattr(service, "_workers") and batches._steps and batches._steps[0].open and time.monotonic() < end:
        for answer in batches._answers(wait=False):
            batches._take(answer)
        time.sleep(0.01)


if __name__ == "__main__":
    gpu = cases.Gpu(sys.argv[1])
    for workers, may_pin in ((2, True), (2, False), (0, True)):
        print(json.dumps(steps(gpu, workers, may_pin)), flush=True)
