"""`python main.py benchmark step EXP`: one training step of an experiment's model on this machine, part by part.

The parts are those of training: model, batch norm over groups, loss, optimiser and precision of the config, on one
process. The clips are random, so that reading plays no part. docs/performance.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from utils.options import Parser

if TYPE_CHECKING:
    import torch

    from anal_tools.benchmark.common import Figures
    from utils.config import Config
    from utils.dist import World

PARTS = ("input", "forward", "backward", "optimizer")
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}  # side of the square matrices whose product shows the speed of the device
PEAK_RUNS = 8  # the fastest of them counts


def main(argv: list[str]) -> int:
    """Parse the command line and measure."""
    from anal_tools.benchmark.common import not_negative
    from anal_tools.evaluate import positive

    parser = Parser(prog="main.py benchmark step", description="Time the parts of a training step.")
    parser.add_argument("exp", type=Path, help="experiment folder, holds config.yaml")
    parser.add_argument("--compile", action="store_true", help="with torch.compile (common.compile: true)")
    parser.add_argument("--amp", choices=("fp32", "bf16", "fp16"), default=None, help="instead of common.precision")
    parser.add_argument("--batch", type=positive, default=None, help="clips; default: common.batch_size")
    parser.add_argument("--iters", type=positive, default=5, help="steps that are timed (default 5)")
    parser.add_argument("--warmup", type=not_negative, default=None, help="steps before them (default 1, 10 on a GPU)")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads of torch")
    parser.add_argument(
        "--plain", action="store_true", dest="bare", help="plain PyTorch: channels first, torch's own BN"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    args = parser.parse_args(argv)

    figures = measure(args)
    print(json.dumps(figures) if args.json else as_table(figures))
    return 0


def measure(args: argparse.Namespace) -> Figures:
    """Return all figures of one configuration.

    Returns:
        Medians of times in milliseconds; `*_cpu_ms` is the CPU time of this process. `train` is forward and backward.
    """
    import torch

    from methods.macs import count_macs
    from utils import config, dist

    if args.threads:
        torch.set_num_threads(args.threads)

    # The options are short forms of config keys; they win over `--set`.
    overrides = list(args.set)
    overrides += ["common.compile=true"] if args.compile else []
    overrides += [f"common.precision={args.amp}"] if args.amp else []
    overrides += [f"common.batch_size={args.batch}"] if args.batch else []
    cfg = config.load(args.exp, overrides)

    world = dist.World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    step = Step(cfg, world, bare=args.bare)

    # One clip (B, C, T, H, W). Batch norms do not count: the peak below is that of a matrix product.
    shape = (1, 3, step.frames, cfg.augmentation.input_size, cfg.augmentation.input_size)
    macs = count_macs(step.net, shape, norms=False)

    # On a GPU it takes more steps until the times are steady.
    warmup = args.warmup if args.warmup is not None else (10 if world.device.type == "cuda" else 1)

    rows = [step.run() for _ in range(warmup + args.iters)][warmup:]
    loop = step.loop(args.iters)
    evaluated = [step.evaluate() for _ in range(1 + args.iters)][1:]  # the first call warms up

    figures: Figures = {
        "bench": "step",
        "model": f"{cfg.model.type} {cfg.model.backbone}",
        "input": [cfg.batch_size, *shape[1:]],
        "device": _device_name(world.device),
        "threads": torch.get_num_threads(),
        "precision": cfg.precision,
        "compile": cfg.compile,
        "plain": args.bare,
    }

    for part in PARTS:
        figures |= _medians(part, [row[part] for row in rows])
    figures |= _medians("train", [_add(row["forward"], row["backward"]) for row in rows])
    figures |= _medians("step", [_add(*(row[part] for part in PARTS)) for row in rows])
    figures |= _medians("eval", evaluated)
    figures["loop_ms"] = round(1000 * loop, 2)

    # MFU: arithmetic of the model in this time, as a share of what the device does in a plain matrix product.
    seconds = figures["step_ms"] / 1000
    peak = matmul_peak(world.device, cfg.precision)
    return figures | {
        "clips_per_s": round(cfg.batch_size / seconds, 3),
        "peak_memory_mb": _peak_memory(world.device),
        "gmac_per_clip": round(macs / 1e9, 3),
        "matmul_peak_tflops": round(peak / 1e12, 4),
        # Backward is twice the arithmetic of forward; a MAC is two operations.
        "mfu": round(6 * macs * cfg.batch_size / seconds / peak, 4),
    }


class Step:
    """Hold a model with all that a training step needs, and random clips.

    Args:
        cfg: the experiment.
        world: one rank, and where it computes.
        bare: as in a plain PyTorch script: weights and clips channels first, torch's own batch norm and loop SGD.
    """

    def __init__(self, cfg: Config, world: World, *, bare: bool) -> None:
        import torch

        import methods
        from utils import sync_bn
        from utils.engine.network import compiled, dtype_of, model_arguments, optimizer_of, place
        from utils.shards import ShardPlan

        torch.manual_seed(cfg.seed)
        self.cfg, self.device, self.bare = cfg, world.device, bare
        self.net = methods.build(**model_arguments(cfg, pretrained=False))
        self.frames = int(self.net.frames_per_clip)  # pyright: ignore[reportArgumentType]

        shards = ShardPlan(total=1, batch_size=cfg.batch_size, world=1, rank=0, group_size=1)
        self.bn_stats = None
        if bare:
            self.net = self.net.to(self.device, dtype_of(cfg.precision))
        else:
            self.net = sync_bn.convert(place(self.net, self.device, cfg.precision), shards, sync_stats=True)
            self.bn_stats = sync_bn.BnStats(self.net, shards, world)

        self.optimizer = optimizer_of(cfg, self.net, lr=1e-4)
        if bare:
            for group in self.optimizer.param_groups:
                # neither the fused nor the foreach kernel: one Python loop over the parameters
                group["fused"], group["foreach"] = False, False
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.precision == "fp16")
        self.model = compiled(self.net, cfg.compile, self.device, print)

        # uint8 clips (B, T, H, W, C), as the loader hands them to the device
        side = cfg.augmentation.input_size
        generator = torch.Generator().manual_seed(0)
        clips = torch.randint(0, 256, (cfg.batch_size, self.frames, side, side, 3), generator=generator).byte()
        self.clips = clips.to(self.device)
        self.labels = (torch.arange(cfg.batch_size) % cfg.model.num_class).to(self.device)

    def loop(self, steps: int) -> float:
        """Return the seconds per step in a loop without waits between parts: host work hides behind the GPU."""
        clock = _Clock(self.device)
        clock.start()
        for _ in range(steps):
            self.run(fenced=False)
        clock.stop("loop")
        return clock.spans["loop"][0] / steps

    def run(self, *, fenced: bool = True) -> dict[str, tuple[float, float]]:
        """Run one training step and return the (wall, CPU) seconds of each part.

        Args:
            fenced: wait for the GPU after each part; otherwise the times are those of the host.
        """
        from utils import draws, loss, optim
        from utils.engine.network import autocast

        clock = _Clock(self.device if fenced else None)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)

        # As `train_step` in main.py does it, with one micro-batch.
        clock.start()
        with draws.rng_scope(0, 0, (0,), self.cfg.batch_size):
            clips = self._input()
            clock.stop("input")
            with autocast(self.cfg.precision, self.device):
                answer = self.model(clips)
            value, _ = loss.training_loss(answer, self.labels, label_smooth=self.cfg.label_smooth)
            clock.stop("forward")
            self.scaler.scale(value.sum()).backward()  # a probe has one loss per head
            clock.stop("backward")

        if self.bn_stats is not None:
            self.bn_stats.after_micro_batch(0)

        optim.apply(self.optimizer, self.scaler, max_norm=self.cfg.clip_grad)
        if self.bn_stats is not None:
            self.bn_stats.after_step()
        clock.stop("optimizer")
        return clock.spans

    def evaluate(self) -> tuple[float, float]:
        """Run one forward pass in evaluation mode and return its (wall, CPU) seconds."""
        import torch

        from utils.engine.network import autocast

        self.net.eval()
        clips = self._input()

        clock = _Clock(self.device)
        clock.start()
        with torch.inference_mode(), autocast(self.cfg.precision, self.device):
            self.net(clips)
        clock.stop("eval")
        return clock.spans["eval"]

    def _input(self) -> torch.Tensor:
        """Return normalised clips (B, C, T, H, W)."""
        from utils import transforms
        from utils.engine.network import dtype_of

        clips = transforms.normalise(self.clips, dtype=dtype_of(self.cfg.precision))
        return clips.contiguous() if self.bare else clips


class _Clock:
    """Measure (wall, CPU) seconds from one stop to the next; on a GPU each stop waits for the work queued before it."""

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self.spans: dict[str, tuple[float, float]] = {}

    def _now(self) -> tuple[float, float]:
        import torch

        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def start(self) -> None:
        self.last = self._now()

    def stop(self, part: str) -> None:
        now = self._now()
        self.spans[part] = (now[0] - self.last[0], now[1] - self.last[1])
        self.last = now


def matmul_peak(device: torch.device, precision: str) -> float:
    """Return the operations per second of a product of two large square matrices: the peak that MFU refers to."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}.get(precision, torch.float32)

    side = PEAK_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    clock, best = _Clock(device), float("inf")
    # On such GPUs convolutions use TF32 in fp32 ("high"), so the peak must use it too.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for _ in range(PEAK_RUNS):
            clock.start()
            torch.mm(a, b)
            clock.stop("matmul")
            best = min(best, clock.spans["matmul"][0])
    finally:
        torch.set_float32_matmul_precision(before)

    return 2 * side**3 / best  # a multiplication and an addition per term


def _medians(name: str, spans: list[tuple[float, float]]) -> dict[str, float]:
    wall, cpu = (round(1000 * statistics.median(column), 2) for column in zip(*spans, strict=True))
    return {f"{name}_ms": wall, f"{name}_cpu_ms": cpu}


def _add(*spans: tuple[float, float]) -> tuple[float, float]:
    return sum(wall for wall, _ in spans), sum(cpu for _, cpu in spans)


def _peak_memory(device: torch.device) -> float:
    """Return the peak in MiB: of the allocator on a GPU, of this process's resident memory on the CPU."""
    import resource

    import torch

    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)  # Linux counts in KiB


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def as_table(figures: Figures) -> str:
    """Return the figures as lines of text for people."""
    shape = " x ".join(map(str, figures["input"]))
    kind = ", ".join(
        [figures["device"], figures["precision"]]
        + (["compiled"] if figures["compile"] else [])
        + (["plain PyTorch"] if figures["plain"] else [])
    )

    rows = [f"{figures['model']}, {shape}, {kind}, {figures['threads']} thread(s)"]
    rows += [f"  {'part':<10}{'ms':>12}{'CPU ms':>12}"]

    for part in (*PARTS, "step", "eval"):
        rows.append(f"  {part:<10}{figures[f'{part}_ms']:>12.2f}{figures[f'{part}_cpu_ms']:>12.2f}")

    # Without waits the host queues the next part while the GPU computes the last one.
    hidden = figures["step_ms"] - figures["loop_ms"]
    rows.append(f"  {'loop':<10}{figures['loop_ms']:>12.2f}  a step without waits between parts ({hidden:.2f} ms less)")
    rows.append(f"  {figures['clips_per_s']:.2f} clips/s, peak memory {figures['peak_memory_mb']:.0f} MiB")
    rows.append(
        f"  {figures['gmac_per_clip']:.2f} GMAC per clip forward; MFU {100 * figures['mfu']:.1f} % of "
        f"{figures['matmul_peak_tflops']:.3f} TFLOP/s (measured product of {figures['precision']} matrices)"
    )
    return "\n".join(rows)
