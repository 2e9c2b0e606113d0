"""All that a GPU can show of this project, in one process and less than ten minutes.

    python tests/gpu/one_gpu.py --out figures.jsonl          on a machine with a GPU
    python tests/gpu/one_gpu.py --rehearse                   every row on the CPU, so that none fails for a silly reason
    python tests/gpu/one_gpu.py --rehearse --smoke           the same, as small as possible

Each row prints one JSON line; a table follows. A row that fails does not stop the others. Rows that `--out` already
holds are not measured again, so that a run that was cut off continues. At the time limit the process ends with what it
has. README.md in this folder tells how to bring the project to a machine without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("PYTHONPATH", str(ROOT))

LIMIT = 570.0  # seconds in all
METHODS: dict[str, dict[str, Any]] = {
    "tsn": {},
    "tsm": {},
    "slowonly": {},
    "slowfast": {"alpha": 4},
    "tpn": {},
    "pptsn": {},
    "pptsm": {},
}
_VIT = {"width": 48, "depth": 2, "heads": 2}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "videomae": _VIT,
    "vjepa2": _VIT | {"pooler_layers": 1},
    "probe": _VIT | {"encoder": "videomae", "pooler_layers": 1},
}


class Machine:
    """Where the rows run, and how large they are.

    Attributes:
        gpu: False in a rehearsal.
        smoke: the smallest sizes.
        device: "cuda:0" or "cpu".
        folder: for what the rows write.
    """

    def __init__(self, *, rehearse: bool, smoke: bool, folder: Path) -> None:
        import torch

        self.gpu, self.smoke, self.folder = not rehearse, smoke, folder
        self.device = torch.device("cuda", 0) if self.gpu else torch.device("cpu")

    def pick(self, gpu: Any, rehearsal: Any, smoke: Any) -> Any:
        """One of three sizes."""
        return gpu if self.gpu else smoke if self.smoke else rehearsal

    @functools.cached_property
    def motion(self) -> Path:
        """The demo's videos."""
        from datasets.demo import verb as demo

        out = self.folder / "motion"
        count = self.pick(96, 48, 16)
        with contextlib.redirect_stdout(io.StringIO()):
            words = ["--out", str(out), "--train", str(count), "--val", str(count // 2), "--workers", "2"]
            assert demo.main(words) == 0
        return out


# The rows, the most valuable first. Each returns {"measured": ..., "holds": bool}.


def env(machine: Machine) -> dict[str, Any]:
    """Names and versions of everything that the figures depend on."""
    import torch
    from torch.cuda import nccl

    from utils.engine.network import _missing_for_triton

    cuda = torch.cuda.is_available()
    driver = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    versions = {
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "capability": list(torch.cuda.get_device_capability(0)) if cuda else None,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "nccl": ".".join(map(str, nccl.version())) if cuda else None,
        "python": platform.python_version(),
        "headers": os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")),
        "compiler": shutil.which("gcc") or shutil.which("clang"),
        "compile_lacks": _missing_for_triton(),
        "nvcuvid": "libnvcuvid" in (_output("ldconfig", "-p") or ""),
        "dali": _version("nvidia.dali"),
        "torchcodec": _version("torchcodec"),
        "cores": len(os.sched_getaffinity(0)),
    }
    return {"measured": versions, "holds": cuda or not machine.gpu}


def unit(machine: Machine) -> dict[str, Any]:
    """The unit tests for GPUs, without those that compile."""
    import pytest

    words = [str(ROOT / "tests" / "gpu"), "-q", "-W", "default", "-k", "not compiled and not benchmark", "--no-header"]
    words += ["--rootdir", str(ROOT), "-p", "no:cacheprovider", "--import-mode=importlib"]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = int(pytest.main(words))
    last = shown.getvalue().strip().splitlines()[-1:]
    return {"measured": {"exit": code, "pytest": last}, "holds": code == 0}


def parity(machine: Machine) -> dict[str, Any]:
    """Three training steps of each method: float64 beside the CPU, other precisions beside float64."""
    import torch

    every = [*METHODS, *TRANSFORMERS]
    names = machine.pick(every, every, ["tsn", "videomae"])
    worst, apart = 0.0, {}
    for name in names:
        reference = train_steps(machine, torch.device("cpu"), name, "fp64")
        losses = train_steps(machine, machine.device, name, "fp64")
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True)))
        for precision in machine.pick(("fp32", "bf16", "fp16"), ("fp32", "bf16"), ("bf16",)):
            values = train_steps(machine, machine.device, name, precision)
            apart[f"{name} {precision}"] = max(abs(a - b) / abs(b) for a, b in zip(values, reference, strict=True))
    largest = max(apart.values())
    measured = {"fp64": worst, "others": {key: round(value, 5) for key, value in apart.items()}}
    return {"measured": measured, "holds": worst < 1e-8 and largest < 2e-2}


def sync(machine: Machine) -> dict[str, Any]:
    """No operation of a training step makes the host wait, but the one event."""
    import torch

    if not machine.gpu:
        from tests.fake_cuda import build

        if torch.version.cuda or torch.version.hip:
            return {"measured": "not measured: there is no fake GPU beside a build of torch for GPUs", "holds": True}
        (result,) = build.run("cases", "tsn=bf16")
        return {"measured": {"fake GPU": result["waits"]}, "holds": len(result["waits"]) == 1}
    raised = {}
    for name in (*METHODS, *TRANSFORMERS):
        run, batches = run_of(machine, machine.device, name, "bf16")
        one_step(run, 0, batches)
        one_step(run, 1, batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in (2, 3, 4):
                one_step(run, step, batches)
        except RuntimeError as error:
            raised[name] = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"measured": {"methods": [*METHODS, *TRANSFORMERS], "raised": raised}, "holds": not raised}


def nccl1(machine: Machine) -> dict[str, Any]:
    """A communicator of one rank: its collectives, and batch norm over its group beside torch's own."""
    import torch
    import torch.distributed as dist

    from utils import transfer
    from utils.dist import World

    backend = "nccl" if machine.gpu else "gloo"
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    more: dict[str, Any] = {"device_id": machine.device} if machine.gpu else {}
    dist.init_process_group(backend, store=store, rank=0, world_size=1, **more)
    try:
        totals = torch.arange(7.0, dtype=torch.float64, device=machine.device)
        summed = transfer.Readback(totals, dist.all_reduce(totals, async_op=True)).read().tolist()
        dist.barrier(device_ids=[0] if machine.gpu else None)
        sent = torch.ones(3, device=machine.device)
        dist.broadcast(sent, 0)
        difference = norm_difference(machine, World(0, 1, 0, machine.device, backend))
    finally:
        dist.destroy_process_group()
    good = summed == list(range(7)) and sent.tolist() == [1, 1, 1] and difference < 1e-9
    return {"measured": {"backend": backend, "batch_norm_difference": difference}, "holds": good}


def norm_difference(machine: Machine, world: Any) -> float:
    """Largest difference of output and gradients between a group's batch norm and torch's, in float64."""
    import torch
    import torch.distributed as dist

    from utils import sync_bn

    torch.manual_seed(0)
    torch_norm = torch.nn.BatchNorm3d(16).double().to(machine.device)
    assert dist.group.WORLD is not None
    ranks = sync_bn._Ranks(dist.group.WORLD, 1)
    ours = sync_bn._as_group_norm(torch_norm, ranks, True).train()
    x = torch.randn(4, 16, 3, 5, 5, dtype=torch.float64, device=machine.device)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    results = []
    for norm in (torch_norm, ours):
        inputs = x.clone().requires_grad_()
        norm.zero_grad()
        out = norm(inputs)
        (out * x).sum().backward()
        assert inputs.grad is not None
        assert norm.weight.grad is not None
        assert norm.bias.grad is not None
        results.append((out.detach(), inputs.grad, norm.weight.grad.clone(), norm.bias.grad.clone()))
    return max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))


def two(machine: Machine) -> dict[str, Any]:
    """Two processes over gloo, on one GPU: the losses of one process; then an error on one rank ends both."""
    from utils import dist

    spec = importlib.util.spec_from_file_location("two_ranks", ROOT / "tests" / "gpu" / "two_ranks.py")
    assert spec is not None
    assert spec.loader is not None
    two_ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(two_ranks)
    scale = "small" if machine.smoke else "usual"
    alone: list[float] = []
    for losses in two_ranks.train(dist.World(device=machine.device), machine.folder / "alone", scale):
        alone = list(losses)
    ranks = _ranks(machine, scale)
    both = [json.loads(next(line for line in text.splitlines() if line.startswith("["))) for _, text, _ in ranks]
    apart = max(abs(a - b) / abs(a) for a, b in zip(alone, both[0], strict=False))
    seconds = max(end for _, _, end in ranks) - min(end for _, _, end in ranks)
    is_shown = "a planted error" in ranks[1][1]
    measured = {"losses_apart": apart, "seconds_until_the_other_ends": round(seconds, 1)}
    measured |= {"codes": [code for code, _, _ in ranks], "error_shown": is_shown}
    good = both[0] == both[1] and apart < 1e-6 and is_shown and seconds < 20
    return {"measured": measured, "holds": good and all(code for code, _, _ in ranks)}


def _ranks(machine: Machine, scale: str) -> list[tuple[int, str, float]]:
    """(exit code, output, time of the end) of two ranks."""
    program = [sys.executable, str(ROOT / "tests" / "gpu" / "two_ranks.py")]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(2)]
        processes = []
        for rank, log in enumerate(logs):
            words = [str(rank), "2", str(machine.device), folder, scale]
            with log.open("w") as output:
                processes.append(subprocess.Popen([*program, *words], stdout=output, stderr=subprocess.STDOUT))
        ended: dict[int, float] = {}
        limit = time.monotonic() + 150
        while len(ended) < 2:
            for rank, process in enumerate(processes):
                if time.monotonic() > limit:
                    process.kill()
                if rank not in ended and process.poll() is not None:
                    ended[rank] = time.monotonic()
            time.sleep(0.05)
        return [(process.returncode, logs[rank].read_text(), ended[rank]) for rank, process in enumerate(processes)]


def step(machine: Machine) -> dict[str, Any]:
    """Steps of the step benchmark: bf16, channels-last, fused, beside plain PyTorch in float32."""
    models = machine.pick(
        [
            ("tsn", "resnet50"),
            ("tsm", "resnet50"),
            ("slowonly", "resnet50"),
            ("slowfast", "resnet50"),
            ("tpn", "resnet50"),
        ],
        [("tsn", "resnet18"), ("slowonly", "resnet18")],
        [("tsn", "resnet18")],
    )
    figures = {}
    for method, backbone in models:
        ours = bench(machine, method, backbone, "--amp", "bf16")
        reference = bench(machine, method, backbone, "--amp", "fp32", "--plain")
        figures[f"{method} {backbone}"] = {
            "clips_per_s": ours["clips_per_s"],
            "times_plain": round(reference["step_ms"] / ours["step_ms"], 2),
            "mfu": ours["mfu"],
            "loop_ms": ours.get("loop_ms"),
            "step_ms": ours["step_ms"],
        }
    goal = all(row["times_plain"] >= 1 for row in figures.values())
    return {"measured": figures, "holds": goal or not machine.gpu}


def transformers(machine: Machine) -> dict[str, Any]:
    """Steps of VideoMAE with AdamW: precision, activation checkpointing; clips a second and peak memory."""
    backbones = machine.pick(["vit3d_small", "vit3d_base", "vit3d_large"], ["vit3d"], ["vit3d"])
    kept, checkpointed = "common.model.kwargs.checkpointing=false", "common.model.kwargs.checkpointing=true"
    ways = {
        "bf16": ("--amp", "bf16", "--set", kept),
        "bf16, checkpointing": ("--amp", "bf16", "--set", checkpointed),
        "fp32": ("--amp", "fp32", "--set", kept),
    }
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for backbone in backbones:
        rows = {name: bench(machine, "videomae", backbone, *words) for name, words in ways.items()}
        shown = ("clips_per_s", "step_ms", "peak_memory_mb", "mfu")
        figures[backbone] = {name: {key: row[key] for key in shown} for name, row in rows.items()}
    goal = all(
        rows["bf16"]["step_ms"] < rows["fp32"]["step_ms"]
        and rows["bf16, checkpointing"]["peak_memory_mb"] < rows["bf16"]["peak_memory_mb"]
        for rows in figures.values()
    )
    return {"measured": figures, "holds": goal or not machine.gpu}


def compiled(machine: Machine) -> dict[str, Any]:
    """The same, compiled."""
    models = machine.pick([("tsm", "resnet50"), ("slowonly", "resnet50")], [("tsn", "resnet18")], [("tsn", "resnet18")])
    figures = {}
    for method, backbone in models:
        if machine.smoke:  # compiling takes a minute of CPU time: only that the options are understood
            figures[f"{method} {backbone}"] = bench(machine, method, backbone, "--amp", "bf16")["step_ms"]
            continue
        ours = bench(machine, method, backbone, "--amp", "bf16", "--compile")
        reference = bench(machine, method, backbone, "--amp", "fp32", "--plain")
        times = round(reference["step_ms"] / ours["step_ms"], 2)
        figures[f"{method} {backbone}"] = {"times_plain": times, "mfu": ours["mfu"], "clips_per_s": ours["clips_per_s"]}
    good = machine.smoke or not machine.gpu or all(row["times_plain"] >= 2 for row in figures.values())
    return {"measured": figures, "holds": good}


def train(machine: Machine) -> dict[str, Any]:
    """Train, stop, resume, validate, evaluate; and what `deterministic` gives: equal bits of two runs."""
    import torch

    import main
    from tests import experiment

    steps = machine.pick(30, 8, 6)
    shown = io.StringIO()

    def run(name: str, *, stops: bool = False) -> Path:
        exp = machine.folder / name
        options = {"workers": 2, "steps": steps, "val_freq": steps, "print_freq": 2}
        experiment.make(exp, machine.motion, method="tsm", **options)
        words = ["train", str(exp), "--set", "common.deterministic=true"]
        with contextlib.redirect_stdout(shown):
            if stops:
                with stopped_at(exp, f"Iter: [2/{steps}]"):
                    assert main.main(words) == 75, shown.getvalue()[-2000:]
            assert main.main(words) == 0, shown.getvalue()[-2000:]
        return exp

    one, other = run("one"), run("other", stops=True)
    with contextlib.redirect_stdout(shown):
        assert main.main(["eval", str(one)]) == 0, shown.getvalue()[-2000:]
    torch.use_deterministic_algorithms(False)
    equal = experiment.fingerprint(one) == experiment.fingerprint(other)
    last = [line for line in (one / "log.txt").read_text().splitlines() if "Prec@1" in line][-1]
    measured = {"iterations": steps, "a_stopped_run_ends_with_the_same_bits": equal, "last": last[-120:]}
    return {"measured": measured, "holds": equal}


@contextlib.contextmanager
def stopped_at(exp: Path, line: str) -> Iterator[None]:
    """Send this process SIGTERM when a line is in the log, as a cluster does."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # if training ends first
    done = threading.Event()

    def watch() -> None:
        log = exp / "log.txt"
        while not done.wait(0.005):
            if log.exists() and line in log.read_text(encoding="utf-8", errors="replace"):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def dali(machine: Machine) -> dict[str, Any]:
    """Barcodes, and clips/s of the reader `dali` beside the limit of its decoder alone."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return {"measured": "not measured: DALI is not installed", "holds": True}
    if machine.gpu and "libnvcuvid" not in (_output("ldconfig", "-p") or ""):
        return {"measured": "not measured: the driver's video library is not here", "holds": True}
    from tests.benchmarks.data import dali as checks

    checks.VIDEOS, checks.FRAMES = machine.pick((16, 300), (4, 60), (2, 40))
    checks.STEPS, checks.BATCH = machine.pick((24, 16), (3, 4), (1, 2))
    checks.WARM_UP = machine.pick(4, 1, 1)
    if not machine.gpu:
        checks.PIPES = {"tsn8": ("mmaction2_1x", 8, 1, 1)}
    figures = checks.measure(machine.folder / "dali", str(machine.device), machine.pick("libx264", *["libvpx-vp9"] * 2))
    shares = {name: figures[name]["of_limit"] for name in checks.PIPES}
    good = figures["wrong_frames"] == 0
    return {"measured": figures, "holds": good and (not machine.gpu or min(shares.values()) >= 0.8)}


def torchcodec(machine: Machine) -> dict[str, Any]:
    """Clips/s of torchcodec's decoder on the same files, where it is installed."""
    if importlib.util.find_spec("torchcodec") is None:
        return {"measured": "not measured: torchcodec is not installed", "holds": True}
    decoders = importlib.import_module("torchcodec.decoders")
    files = sorted((machine.folder / "dali").rglob("*.mp4"))
    began = time.perf_counter()
    for file in files:
        decoder = decoders.VideoDecoder(str(file), device=str(machine.device))
        decoder.get_frames_at(list(range(0, 32, 4)))
    seconds = time.perf_counter() - began
    return {"measured": {"clips_per_s": round(len(files) / seconds, 1), "clips": len(files)}, "holds": True}


def data_wait(machine: Machine) -> dict[str, Any]:
    """Share of a real training step that waits for clips, and what copying ahead leaves of it."""
    from datasets.loading import loader
    from utils import dist
    from utils.shards import ShardPlan

    count = machine.pick(40, 6, 3)
    size = machine.pick(224, 64, 32)
    run, _ = run_of(
        machine, machine.device, "tsm", "bf16", size=size, data=machine.motion, batch=machine.pick(16, 2, 2)
    )
    shards = ShardPlan(total=1, batch_size=run.cfg.batch_size, world=1, rank=0, group_size=1)
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    cfg = run.cfg.model_copy(update={"workers": min(workers, 12)})
    world = dist.World(device=machine.device)
    with loader.train(cfg, world, shards, stop=count + 2) as batches:
        waited = began = 0.0
        for number, micro_batches in batches:
            if number == 2:
                waited, began = batches.seconds_waiting, time.perf_counter()
            one_step(run, number, micro_batches, meanwhile=batches.copy_ahead)
        share = (batches.seconds_waiting - waited) / (time.perf_counter() - began)
    return {"measured": {"share": round(share, 4), "workers": cfg.workers}, "holds": share <= 0.03 or not machine.gpu}


# What the rows share.


def run_of(
    machine: Machine,
    device: Any,
    method: str,
    precision: str,
    *,
    size: int = 64,
    data: Path | None = None,
    batch: int = 2,
) -> tuple[Any, list[Any]]:
    """A `Learner` of a small model without dropout, and one micro-batch with every augmentation."""
    import torch

    from datasets.loading.train import Batch
    from tests import experiment
    from utils import config, dist, transfer
    from utils.engine import learner
    from utils.shards import ShardPlan

    backbone = "vit3d" if method in TRANSFORMERS else "resnet50" if size > 64 else "resnet18"
    words = [f"model.type={method}", f"model.backbone={backbone}", f"precision={precision}", "model.num_segments=8"]
    words += [f"augmentation.input_size={size}", f"augmentation.test_resize={size + 8}", f"batch_size={batch}"]
    words += ["model.dropout=0", *options_of(method, backbone)]
    with tempfile.TemporaryDirectory(dir=machine.folder) as folder:
        exp = experiment.make(Path(folder) / "exp", data or Path(folder))
        cfg = config.load(exp, [f"common.{word}" for word in words])
    world = dist.World(device=device)
    shards = ShardPlan(total=1, batch_size=batch, world=1, rank=0, group_size=1)
    run_learner = learner.build(cfg, world, shards, None, lambda text: None)
    generator = torch.Generator().manual_seed(1)
    frames = cfg.model.num_segments * cfg.data.clip_len
    clips = torch.randint(0, 256, (batch, frames, size, size, 3), generator=generator, dtype=torch.uint8)
    jitter = torch.tensor([[[1.1, 0.9, 1.2, 0.05, 2.0, 0.0, 1.0, 3.0]]], dtype=torch.float64).repeat(batch, 1, 1)
    one = Batch(
        clips=transfer.to_device(clips, device),
        labels=transfer.to_device(torch.arange(batch) % 8, device),
        weights=transfer.to_device(torch.ones(batch), device),
        samples=list(range(batch)),
        drawn={
            "flip": (torch.arange(batch) % 2 == 0).view(-1, 1, 1),
            "colorjitter": jitter,
            "random_erasing": torch.tensor([[[1, 1, 5, 5]]]).repeat(batch, 1, 1),
        },
        shards=(0,),
        positions=list(range(batch)),
    )
    return run_learner, [one]


def options_of(method: str, backbone: str) -> list[str]:
    """Overrides without which a method cannot be built and trained; those of size for the backbone `vit3d` alone."""
    if method not in TRANSFORMERS:
        return [f"model.kwargs.{key}={value}" for key, value in METHODS[method].items()]
    sizes = _VIT if backbone != "vit3d" else {}
    options = {key: value for key, value in TRANSFORMERS[method].items() if key not in sizes}
    words = ["optimizer.type=adamw", "nesterov=false", "no_wd=false"]
    return [*words, *(f"model.kwargs.{key}={value}" for key, value in options.items())]


def one_step(run: Any, number: int, batches: list[Any], **more: Any) -> float:
    """One step of `main.train_step`; its loss."""
    import main

    return main.train_step(run, number, batches, stop=False, save=False, **more)["loss"]


def train_steps(machine: Machine, device: Any, method: str, precision: str) -> list[float]:
    """Losses of three training steps."""
    run, batches = run_of(machine, device, method, precision, size=machine.pick(64, 64, 32))
    return [one_step(run, number, batches) for number in range(3)]


def bench(machine: Machine, method: str, backbone: str, *words: str) -> dict[str, Any]:
    """Figures of `benchmark step`."""
    import main
    from tests import experiment

    size = machine.pick(224, 64, 32)
    batch = machine.pick(16, 2, 2)
    with tempfile.TemporaryDirectory(dir=machine.folder) as folder:
        exp = experiment.make(Path(folder) / "exp", Path(folder), method=method, backbone=backbone)
        options = [f"augmentation.input_size={size}", f"augmentation.test_resize={size + 32}", "model.num_segments=8"]
        options += [f"batch_size={batch}", *options_of(method, backbone)]
        sets = [word for option in options for word in ("--set", f"common.{option}")]
        shown = io.StringIO()
        iterations = machine.pick(["--iters", "10", "--warmup", "5"], *[["--iters", "1", "--warmup", "1"]] * 2)
        with contextlib.redirect_stdout(shown):
            assert main.main(["benchmark", "step", str(exp), "--json", *iterations, *sets, *words]) == 0
    return json.loads(shown.getvalue().splitlines()[-1])


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return str(getattr(importlib.import_module(name), "__version__", "installed"))
    except ImportError:
        return None


ROWS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "env": env,
    "unit": unit,
    "parity": parity,
    "sync": sync,
    "nccl1": nccl1,
    "two": two,
    "step": step,
    "transformers": transformers,
    "compile": compiled,
    "train": train,
    "dali": dali,
    "torchcodec": torchcodec,
    "data_wait": data_wait,
}


class Figures:
    """The JSON lines, on stdout and in a file; the table."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.rows: dict[str, dict[str, Any]] = {}
        if out is not None and out.exists():
            earlier = [json.loads(line) for line in out.read_text().splitlines() if line.strip()]
            self.rows = {row["row"]: row for row in earlier if row["holds"]}

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["row"]] = row
        print(json.dumps(row), flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def table(self) -> str:
        lines = ["| row | holds | seconds | measured |", "|---|---|---|---|"]
        for name, row in self.rows.items():
            text = json.dumps(row["measured"]).replace("|", "/")
            lines.append(f"| {name} | {'yes' if row['holds'] else 'NO'} | {row['seconds']} | {text[:300]} |")
        return "\n".join(lines)


def end_at(limit: float, figures: Figures) -> None:
    """End the process at the limit, whatever a row is doing."""

    def ends() -> None:
        print(figures.table(), flush=True)
        print(f"stopped at the limit of {limit:g} s; the same command measures the rest", flush=True)
        os._exit(3)

    timer = threading.Timer(limit, ends)
    timer.daemon = True
    timer.start()


def main_of(argv: list[str] | None = None) -> int:
    """Measure the rows; 0 if all of them hold."""
    parser = argparse.ArgumentParser(description="what a GPU can show of this project, in less than ten minutes")
    parser.add_argument("--rehearse", action="store_true", help="every row on the CPU or the fake GPU")
    parser.add_argument("--smoke", action="store_true", help="with --rehearse: the smallest sizes")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma separated; default: all")
    parser.add_argument("--out", type=Path, help="JSON lines; rows that hold there are not measured again")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds in all (default {LIMIT:g})")
    args = parser.parse_args(argv)
    if args.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    figures = Figures(args.out)
    end_at(args.limit, figures)
    bad = False
    with tempfile.TemporaryDirectory(prefix="one-gpu-") as folder:
        machine = Machine(rehearse=args.rehearse, smoke=args.smoke, folder=Path(folder))
        for name in args.rows.split(","):
            if name in figures.rows:
                continue
            began = time.monotonic()
            try:
                result = ROWS[name](machine)
            except BaseException as error:  # noqa: BLE001  a row that breaks does not hold; the others still run
                if isinstance(error, KeyboardInterrupt):
                    raise
                traceback.print_exc()
                result = {"measured": f"{type(error).__name__}: {error}"[:500], "holds": False}
            mode = "rehearsal" if args.rehearse else "gpu"
            figures.add({"row": name, "mode": mode, "seconds": round(time.monotonic() - began, 1), **result})
            bad |= not result["holds"]
    print(figures.table(), flush=True)
    return int(bad)


if __name__ == "__main__":
    code = main_of()
    sys.stdout.flush()
    os._exit(code)  # not through the teardown of libraries that were measured
