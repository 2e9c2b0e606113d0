"""The reader `dali` on a GPU. Without one it reports "not measured".

    python -m tests.benchmarks.data.dali                                            # the row
    python -m tests.benchmarks.data.dali --device cpu --codec libvpx-vp9            # the same code on a CPU, to try it

The decode limit is DALI alone on the same bytes: no reader processes, no crop, no resize, no copy into a batch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.rows import run_rows, workspace

VIDEOS, FRAMES, HEIGHT, WIDTH = 16, 300, 256, 340
BATCH, STEPS, WARM_UP = 16, 24, 4
NOT_MEASURED = "not measured: there is no GPU on this machine"


def gpu(work: Path) -> dict[str, Any]:
    """Exactness, clips/s beside the decode limit and the CPU readers, wait of a training step."""
    import torch

    if not torch.cuda.is_available():
        return {"measured": NOT_MEASURED, "holds": True}
    figures = measure(work, "cuda:0", "libx264")
    shares = [figures[pipe]["of_limit"] for pipe in PIPES]
    waits = [figures[pipe]["data_wait"] for pipe in PIPES]
    good = figures["wrong_frames"] == 0 and min(shares) >= 0.8 and max(waits) <= 0.03
    return {"measured": {"gpu": torch.cuda.get_device_name(0), **figures}, "holds": good}


PIPES = {"tsn8": ("mmaction2_1x", 8, 1, 1), "32x2": ("mmaction2_1x", 1, 32, 2)}


def measure(work: Path, device: str, codec: str) -> dict[str, Any]:
    """All figures for one device and one codec."""
    records = videos(work / codec, codec)
    figures: dict[str, Any] = {"codec": codec, **exactness(records, device)}
    for name, pipe in PIPES.items():
        ours, waited = loader_speed(records, pipe, "dali", device)
        limit = decode_limit(records, pipe, device)
        figures[name] = {
            "dali_clips_per_s": round(ours, 1),
            "limit_clips_per_s": round(limit, 1),
            "of_limit": round(ours / limit, 3),
            "video_clips_per_s": round(loader_speed(records, pipe, "video", device)[0], 1),
            "data_wait": round(step_wait(records, pipe, device), 4),
            "waiting_alone": round(waited, 3),
        }
    return figures


def videos(folder: Path, codec: str) -> Any:
    """Barcoded videos with moving noise, so that a frame costs what a real one costs; the list of them."""
    import av
    import numpy as np

    from datasets.lists.records import Records
    from tests.datasets.videos import frame_image

    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 60, (HEIGHT, WIDTH * 2, 3), np.uint8)
    for number in range(VIDEOS):
        path = folder / f"v{number}.mp4"
        if path.exists():
            continue
        with av.open(str(path), "w") as output:
            stream = output.add_stream(codec, rate=30, options={"crf": "23", "g": "250"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for ordinal in range(FRAMES):
                image = frame_image(ordinal % 256, HEIGHT, WIDTH)
                image[HEIGHT // 2 :, :, 1:] += noise[HEIGHT // 2 :, ordinal : ordinal + WIDTH, 1:]
                output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            output.mux(stream.encode(None))
    lists = folder / "list.txt"
    lists.write_text("".join(f"v{number}.mp4 {number % 4}\n" for number in range(VIDEOS)))
    return Records.load(lists, folder, num_class=4)


def exactness(records: Any, device: str) -> dict[str, Any]:
    """Every 7th frame of every video, whole, by the evaluation loader: ordinals, and colours beside PyAV."""
    import numpy as np

    from datasets.loading.loader import loaders
    from datasets.loading.base import LoaderOptions
    from datasets.plan.sampling import Sampling
    from datasets.plan.views import EvalSpec
    from datasets.readers import open_reader
    from tests.datasets.specs import reader_spec
    from tests.datasets.videos import number_in

    spec = EvalSpec(Sampling("mmaction2_1x", 40), scale=HEIGHT, crop_size=224)
    wrong = frames = 0
    means, biases = [], []
    reference_reader = open_reader(reader_spec("video"), records)
    with loaders("dali")[1](records, spec, LoaderOptions(reader_spec("dali"), workers=2), device=device) as items:
        for item in items:
            assert item.frames is not None, item.failure
            assert item.plan is not None
            pixels = item.frames.cpu().numpy()
            expected = item.plan.frames.tolist()
            wrong += sum(number_in(image) != ordinal % 256 for image, ordinal in zip(pixels, expected, strict=True))
            frames += len(expected)
            reference = np.empty_like(pixels)
            reference_reader.read(item.sample, item.plan.frames, None, item.plan.size, reference)
            difference = pixels.astype(np.int16) - reference
            means.append(np.abs(difference).mean())
            biases.append(difference.mean())
        fallbacks = getattr(items, "fallbacks", None)
        assert isinstance(fallbacks, dict)
        on_cpu = sum(fallbacks.values())
    colour = {"colour_mean": round(float(np.mean(means)), 2), "colour_bias": round(float(np.mean(biases)), 2)}
    return {"frames": frames, "wrong_frames": wrong, "on_cpu": on_cpu, **colour}


def training(records: Any, pipe: tuple, reader: str, device: str, stop: int) -> Any:
    """The training loader with a random resized crop to 224 and 8 reader processes (2 on a CPU)."""
    from datasets.loading.base import LoaderOptions
    from datasets.loading.loader import loaders
    from datasets.plan.sampling import Sampling
    from tests.datasets.specs import reader_spec, train_spec
    from utils.shards import ShardPlan

    spec = train_spec(Sampling(*pipe), input_size=224, crop="random_resized")
    options = LoaderOptions(reader_spec(reader), workers=2 if device == "cpu" else 8, prefetch=4, on_bad="error")
    shards = ShardPlan(total=1, batch_size=BATCH, world=1, rank=0, group_size=1)
    return loaders(reader)[0](records, spec, options, seed=1, shards=shards, stop=stop, device=device)


def loader_speed(records: Any, pipe: tuple, reader: str, device: str) -> tuple[float, float]:
    """(clips/s, share of the time spent waiting) of the loader with nothing behind it."""
    with training(records, pipe, reader, device, WARM_UP + STEPS) as loader:
        for _ in range(WARM_UP):
            next(loader)
        waited, began = loader.seconds_waiting, time.perf_counter()
        for _ in range(STEPS):
            next(loader)
        synchronize(device)
        seconds = time.perf_counter() - began
        return STEPS * BATCH / seconds, (loader.seconds_waiting - waited) / seconds


def step_wait(records: Any, pipe: tuple, device: str) -> float:
    """Share of a training step of TSN ResNet-50 in bfloat16 that waits for data."""
    import torch

    import methods
    from utils import transforms

    backbone = "resnet18" if device == "cpu" else "resnet50"
    net: Any = methods.build(type="tsn", backbone=backbone, num_class=4, num_segments=pipe[1] * pipe[2])
    net = net.to(device).train()
    with training(records, pipe, "dali", device, WARM_UP + STEPS) as loader:
        waited = began = 0.0
        for step, (batch,) in loader:
            if step == WARM_UP:
                synchronize(device)
                waited, began = loader.seconds_waiting, time.perf_counter()
            clips = transforms.normalise(batch.clips, mean=(0.5,) * 3, std=(0.25,) * 3, dtype=torch.float32)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(net(clips).float(), batch.labels)
            loss.backward()
            net.zero_grad(set_to_none=True)
            float(loss.detach())  # as a log line reads it
        return (loader.seconds_waiting - waited) / (time.perf_counter() - began)


def decode_limit(records: Any, pipe: tuple, device: str) -> float:
    """Clips/s of DALI decoding the same bytes alone, three runs under way."""
    import numpy as np
    import torch

    from datasets.dali.pipeline import THREADS, mode, require_dali

    dali, where = require_dali(), mode(torch.device(device))

    @dali.pipeline_def
    def alone() -> Any:
        data = dali.fn.external_source(name="data", dtype=dali.types.UINT8, ndim=1)
        rows = dali.fn.external_source(name="rows", dtype=dali.types.INT32, ndim=1)
        return dali.fn.decoders.video(data, frames=rows, device=where, build_index=False)

    number = None if where == "cpu" else 0
    pipeline = alone(batch_size=BATCH, num_threads=THREADS[where], device_id=number, prefetch_queue_depth=1)
    pipeline.build()
    batches = list(stored(records, pipe, where))
    began, under_way = 0.0, 0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            began = time.perf_counter()
        clips = batches[step % len(batches)]
        pipeline.feed_input("data", [np.frombuffer(clip.files[0], np.uint8) for clip in clips])
        pipeline.feed_input("rows", [clip.rows for clip in clips])
        pipeline.schedule_run()
        under_way += 1
        if under_way == 3:
            pipeline.share_outputs()
            pipeline.release_outputs()
            under_way -= 1
    for _ in range(under_way):
        pipeline.share_outputs()
        pipeline.release_outputs()
    return STEPS * BATCH / (time.perf_counter() - began)


def stored(records: Any, pipe: tuple, where: str) -> Iterator[list[Any]]:
    """What the reader processes deliver for the first steps."""
    from datasets.dali.encoded import EncodedReader
    from datasets.plan.sampling import Sampling
    from datasets.plan.train import draw, resolve
    from tests.datasets.specs import reader_spec, train_spec

    spec = train_spec(Sampling(*pipe), input_size=224, crop="random_resized")
    reader = EncodedReader(reader_spec("encoded", decoder=where), records)
    for step in range(6):
        clips = []
        for position in range(step * BATCH, (step + 1) * BATCH):
            sample = position % len(records)
            plan = resolve(draw(1, 0, position, spec), reader.probe(sample), spec, sample)
            clips.append(reader.encode(sample, plan.frames))
        yield clips


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


ROWS = {
    "gpu": (
        "dali mixed, H.264 340x256, on a GPU",
        "frames exact; goal >= 0.8 of the decode limit, data wait <= 3 % of a step",
        lambda: gpu(workspace()),
    ),
}

if __name__ == "__main__":
    if "--device" not in sys.argv:
        sys.exit(run_rows(ROWS))
    parser = argparse.ArgumentParser(description="the reader dali: exactness and speed")
    parser.add_argument("--work", type=Path, default=Path("/tmp/zoetrope-dali"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--codec", default="libx264")
    for name in ("videos", "frames", "batch", "steps"):
        parser.add_argument(f"--{name}", type=int, default=globals()[name.upper()])
    args = parser.parse_args()
    VIDEOS, FRAMES, BATCH, STEPS = args.videos, args.frames, args.batch, args.steps
    print(json.dumps(measure(args.work, args.device, args.codec)))
