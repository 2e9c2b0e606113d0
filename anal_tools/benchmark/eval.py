"""`python main.py benchmark eval EXP`: how many videos per second an evaluation scores here, and the memory it takes.

It prints two rates. The first is of the model alone, one video at a time, as MMAction2's tools/analysis/benchmark.py
measures it: warm-up first, device synchronised, no reading and no pre-processing. The second is end to end, with
reading and scoring. Both use the loader, batches of views and network of `main.py eval`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from utils.options import Parser

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from anal_tools.benchmark.common import Figures
    from utils.config import Config
    from utils.dist import World


def main(argv: list[str]) -> int:
    """Parse the command line and measure."""
    from anal_tools.benchmark.common import not_negative
    from anal_tools.evaluate import add_options, positive

    parser = Parser(prog="main.py benchmark eval", description="Time an evaluation on this machine.")
    parser.add_argument("exp", type=Path, help="experiment folder; without a checkpoint the weights are random")
    parser.add_argument("--checkpoint", default=None, metavar="best|latest|FILE", help="default: best, else latest")
    parser.add_argument("--videos", type=positive, default=50, help="videos that are timed (default: 50)")
    parser.add_argument("--warmup", type=not_negative, default=5, help="videos before them that are not (default: 5)")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads of torch")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    add_options(parser)
    args = parser.parse_args(argv)

    figures = measure(args)
    print(json.dumps(figures) if args.json else as_table(figures))
    return 0


def measure(args: argparse.Namespace) -> Figures:
    """Return all figures of one evaluation.

    Returns:
        Rates in videos/s, times in seconds per video; `cpu_s_per_video` counts this process and its readers.
        `memory_above_model_mb` is the memory used in addition to the model: of the GPU if there is one, else of this
        process.
    """
    import torch

    from anal_tools.evaluate import chosen_protocol
    from anal_tools.evaluate.network import prepare, scorer
    from datasets.loading import loader
    from utils import config, dist

    if args.threads:
        torch.set_num_threads(args.threads)

    cfg = config.load(args.exp, args.set)
    config.check_files(cfg, ("val",))
    protocol = chosen_protocol(cfg, args)

    with contextlib.ExitStack() as stack:
        world = dist.join()
        stack.push(dist.leave)

        # Exactly what `main.py eval` builds: network in its fastest form, records, scorer.
        net, cost = prepare(cfg, protocol, functools.partial(network, cfg, args, world), as_is=args.as_is)
        records = loader.records_of(cfg, "val")
        watch = Stopwatch(net, world.device)
        run = scorer(net, cfg, world, protocol, args.chunk)

        # The first videos warm up, the next ones count; a short list keeps at least one that counts.
        last = min(len(records), args.warmup + args.videos)
        first = min(args.warmup, last - 1)
        before = memory(world.device, reset=True)
        for start, stop in ((0, first), (first, last)):
            if start == stop:
                continue
            # the loader skips the videos of the other phase
            others = set(range(len(records))) - set(range(start, stop))
            watch.reset()
            wall, cpu = time.perf_counter(), cpu_seconds()
            with loader.val(cfg, world, records=records, spec=protocol.spec, skip=others) as videos:
                run(videos)
                waited = videos.seconds_waiting
            # closing the loader ended its processes, so that `cpu_seconds` now counts them
            wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        peak = memory(world.device, reset=False)

    seconds = {"": wall, "model_": watch.wall, "waiting_": waited, "cpu_": cpu, "model_cpu_": watch.cpu}
    return {
        "bench": "eval",
        "model": f"{cfg.model.type} {cfg.model.backbone}",
        "protocol": protocol.text,
        "views": protocol.spec.views,
        "gmacs_per_video": cost.get("gmacs_per_video"),
        "device": str(world.device),
        "threads": torch.get_num_threads(),
        "videos": last - first,
        "videos_per_s": round((last - first) / wall, 4),
        "model_videos_per_s": round((last - first) / watch.wall, 4),
        **{f"{what}s_per_video": round(each / (last - first), 4) for what, each in seconds.items()},
        "largest_chunk": watch.largest,
        "memory_of_model_mb": round(before),
        "memory_above_model_mb": round(peak - before),
    }


def network(cfg: Config, args: argparse.Namespace, world: World) -> nn.Module:
    """Return the experiment's network with its checkpoint's weights, or with random ones if it has no checkpoint."""
    import methods
    from anal_tools.evaluate.network import build_for_evaluation, choose_weights
    from utils import checkpoint
    from utils.engine.network import model_arguments, place

    has_any = any(checkpoint.newest(args.exp, name) for name in (checkpoint.BEST, checkpoint.LATEST))
    if args.checkpoint is None and not has_any:
        return place(methods.build(**model_arguments(cfg, pretrained=False)), world.device, cfg.precision).eval()

    weights = choose_weights(args.exp, args.checkpoint)
    return build_for_evaluation(cfg, checkpoint.load(weights), weights, world)


class Stopwatch:
    """Measure how long a network is busy.

    Args:
        net: gets two hooks.
        device: where it runs; both hooks wait for a GPU to finish.

    Attributes:
        wall, cpu: seconds in the network since `reset`, of the wall clock and of this process.
        largest: number of clips in its largest call.
    """

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        self.device = device
        self.reset()
        net.register_forward_pre_hook(self._begin)
        net.register_forward_hook(self._end)

    def reset(self) -> None:
        """Start at 0."""
        self.wall, self.cpu, self.largest = 0.0, 0.0, 0

    def _begin(self, _net: nn.Module, _clips: tuple[Tensor, ...]) -> None:
        self._wait()
        self.began = time.perf_counter(), time.process_time()

    def _end(self, _net: nn.Module, clips: tuple[Tensor, ...], _logits: Tensor) -> None:
        self._wait()
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]
        self.largest = max(self.largest, len(clips[0]))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its ended children, such as the readers of a closed loader."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def memory(device: torch.device, *, reset: bool) -> float:
    """Return the MiB in use now and forget the peak (`reset`), or the peak since then."""
    if device.type == "cuda":
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device) / 2**20
        return torch.cuda.max_memory_allocated(device) / 2**20

    if reset:
        with contextlib.suppress(OSError):  # without this permission the peak of building the model counts too
            Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak, see man proc

    field = "VmRSS:" if reset else "VmHWM:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return float("nan")


def as_table(figures: Figures) -> str:
    """Return the figures as lines of text for people."""
    f = figures
    return "\n".join(
        [
            f"{f['model']} on {f['device']}, {f['threads']} thread(s): {f['protocol']}",
            f"model alone   {f['model_videos_per_s']:9.3f} videos/s   {1000 * f['model_s_per_video']:9.1f} ms/video, "
            f"{f['gmacs_per_video']:.1f} GMAC, {f['largest_chunk']} views at once",
            f"end to end    {f['videos_per_s']:9.3f} videos/s   {1000 * f['s_per_video']:9.1f} ms/video, of which "
            f"{1000 * f['waiting_s_per_video']:.1f} ms waiting for data, {f['cpu_s_per_video']:.3f} CPU-seconds",
            f"memory        {f['memory_of_model_mb']:9.0f} MiB with the model, {f['memory_above_model_mb']} MiB more "
            f"at the peak ({f['videos']} videos)",
        ]
    )
