"""Checks of one experiment: config, files, lists, weights, memory, and whether its readers can feed the device."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from anal_tools.doctor.finding import AVERAGES, NONE, Finding, Subject, cores, ok, size, warning
from anal_tools.doctor.finding import error as bad
from utils.errors import UserError, listed

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from utils.config import Config

FEED_SECONDS, FEED_CLIPS = 4.0, 32  # how long, and over how many clips, the readers are measured
# Of a progress line: average time of a step, and average wait for data in it
_PACE = re.compile(r"Iter: \[\d+/\d+\] Time \S+ \((\S+)\) Data \S+ \((\S+)\)")


def config(subject: Subject) -> Iterator[Finding]:
    """Load the config, and keep it for later checks."""
    from utils import config as configs

    if subject.exp is None:
        yield ok(NONE)
        return
    subject.cfg = cfg = configs.load(subject.exp, subject.overrides)  # its UserError names each wrong line
    yield ok(
        f"{configs.config_file(subject.exp)}: {cfg.model.type} {cfg.model.backbone}, {cfg.model.num_class} classes"
    )


def files(subject: Subject) -> Iterator[Finding]:
    """Look at every file and folder that the config names, as `main.py config` does, and read the lists."""
    from anal_tools.check_config import problems
    from datasets.lists import first_look
    from datasets.lists.records import records_of

    if subject.cfg is None:
        yield ok(NONE)
        return

    wrong = problems(subject.cfg)
    yield from (bad(line, "correct it, or put it there") for line in wrong)
    for split in ("train", "val"):
        if Path(getattr(subject.cfg, f"{split}_source")).is_file():
            try:
                subject.lists[split] = records_of(subject.cfg, split)
            except UserError:
                continue  # `problems` has reported it

    # The same video in both lists makes the validation useless
    if len(subject.lists) == 2:
        for text in first_look.both_lists(*subject.lists.values()):
            yield warning(text.removeprefix("WARNING: "), "split the videos again: `main.py lists`")

    if not wrong:
        yield ok(", ".join(f"{len(records):,} {split} videos" for split, records in subject.lists.items()))


def classes(subject: Subject) -> Iterator[Finding]:
    """Find classes without videos in one of the lists."""
    if subject.cfg is None or not subject.lists:
        yield ok(NONE)
        return

    complete = True
    for split, records in subject.lists.items():
        none = missing(records, subject.cfg.model.num_class)
        if none:
            complete = False
            what = listed(
                f"{len(none)} of {subject.cfg.model.num_class} classes have no video in the {split} list", none
            )
            advice = "split again so that each class has some" if split == "val" else "add videos, or lower num_class"
            yield warning(what, advice)

    if complete:
        yield ok(f"all {subject.cfg.model.num_class} classes have videos in {' and '.join(subject.lists)}")


def missing(records: Records, count: int) -> list[str]:
    """Return the numbers of the classes without a video."""
    import numpy as np

    # Multi-label lists have `targets`, (N, K) of 0 and 1, in place of one label per video
    targets = records.targets
    present = np.unique(records.labels) if targets is None else np.flatnonzero(targets.any(axis=0))
    return [str(label) for label in sorted(set(range(count)) - set(present.tolist()))]


def weights(subject: Subject) -> Iterator[Finding]:
    """Build the model with the weights that it starts from."""
    if subject.cfg is None:
        yield ok(NONE)
        return
    import methods
    from methods.macs import count_parameters
    from utils.engine.network import model_arguments

    pretrained = subject.cfg.model.pretrained
    if isinstance(pretrained, str) and not Path(pretrained).exists():
        return  # the check `files` reports it

    net = methods.build(**model_arguments(subject.cfg, pretrained=pretrained))
    subject.parameters = count_parameters(net)
    note = getattr(net, "pretrained_note", "") or "initial weights: random"
    yield ok(f"{subject.parameters / 1e6:.1f} M parameters; {note}")


def memory(subject: Subject) -> Iterator[Finding]:
    """Estimate the memory of a training step, and compare it with the free memory of the device."""
    if subject.cfg is None:
        yield ok(NONE)
        return
    import torch

    cfg = subject.cfg
    fixed, clip = needed(cfg)
    total = fixed + cfg.batch_size * clip

    if torch.cuda.is_available():
        free, where = torch.cuda.mem_get_info()[0], "GPU 0"
    else:
        free, where = free_memory(), "this machine"

    text = f"a step takes about {size(total)} ({size(clip)} per clip), and {where} has {size(free)} free"
    # A tenth stays free for kernels' workspaces and fragmentation
    if total > 0.9 * free:
        fits = max(0, int((0.9 * free - fixed) / clip))
        advice = f"set common.batch_size to {fits}" if fits else "choose a smaller model or fewer frames"
        advice += ", or precision: bf16" if cfg.precision == "fp32" else ""
        # The estimate is rough: only a large excess is an error
        yield (bad if total > 1.3 * free else warning)(text, advice)
    else:
        yield ok(text)


def needed(cfg: Config) -> tuple[float, float]:
    """Return the bytes of weights, gradients and momentum, and the bytes that the backward pass of one clip keeps.

    The model runs forward on the meta device, whose tensors have shapes but no memory. Autograd reports each tensor
    that it keeps for the backward pass.
    """
    import torch

    import methods
    from utils.engine.network import model_arguments

    with torch.device("meta"):
        net = methods.build(**model_arguments(cfg, pretrained=False)).train()
    # Weights are counted once, below; views share a storage, hence storages as keys
    model_storages = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in model_storages:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    side, frames = cfg.augmentation.input_size, int(net.frames_per_clip)  # pyright: ignore[reportArgumentType]
    clips = torch.empty((2, 3, frames, side, side), device="meta")  # B=2: batch norm wants more than one value
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = net(clips)  # noqa: F841  it holds the graph, and the graph the storages

    # Half the bytes under autocast; double precision takes twice as many
    half = {"fp32": 1.0, "fp64": 2.0}.get(cfg.precision, 0.5)
    # Weights, gradients, the averages of the optimiser, and perhaps the moving average of the weights
    copies = 2 + AVERAGES[cfg.optimizer.type] + bool(cfg.ema)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    # The clips above were two
    return 4.0 * copies * parameters, half * sum(kept.values()) / 2


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the bytes that this machine, or this container, has free."""
    import psutil

    free = float(psutil.virtual_memory().available)
    # cgroup v2; other systems have no such files
    try:
        limit, used = ((group / name).read_text("utf-8").strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used)) if limit != "max" else free
    except (OSError, ValueError):
        return free


def run(subject: Subject) -> Iterator[Finding]:
    """Read the checkpoint from which a run would resume, and report a process that trains in the folder."""
    from utils import checkpoint, run_lock

    if subject.exp is None:
        yield ok(NONE)
        return
    saved = checkpoint.find(subject.exp)  # its UserError reports that none of them can be read

    for text in saved.messages if saved else ():
        if "is skipped" in text:
            yield warning(text, "the run would resume from an older checkpoint; look at the disk")

    holder = run_lock.living(subject.exp / "jobs" / "lock.json")
    texts = [f"process {holder.pid} on {holder.host} has been training here since {holder.since}"] if holder else []
    texts += [f"{saved.path.name}, iteration {saved.state['step']}"] if saved else []
    yield ok("; ".join(texts) or NONE)


def feed(subject: Subject) -> Iterator[Finding]:
    """Compare the clips per second that the readers deliver with those that the device consumes."""
    if subject.cfg is None or "train" not in subject.lists:
        yield ok(NONE)
        return

    # Supply: what the readers deliver
    given, bad_clips, asked = reading_rate(subject)
    if given == 0:
        yield bad(f"none of {asked} training clips could be read", "`main.py scan` names what is wrong with each file")
        return
    if bad_clips:
        text = f"{bad_clips} of {asked} training clips could not be read"
        yield warning(text, "`main.py scan` names what is wrong with each file")

    # Demand: the log of an earlier run is better than a measurement of one step
    taken = logged_rate(subject.exp, subject.cfg.batch_size) if subject.exp else None
    source = "from its log" if taken else "measured"
    taken = taken or compute_rate(subject)

    text = f"readers deliver {given:.1f} clips/s, the device uses {taken:.1f} ({source})"
    if given < taken:
        processes = max(1, subject.cfg.workers)
        more = (
            # Half a reader more than the ratio, so that the result is rounded up
            f"set common.workers to {min(cores(), round(processes * taken / given + 0.5))}, "
            if processes < cores()
            else ""
        )
        yield warning(
            text, f"{more}`main.py dump` makes files that are cheaper to read, as docs/data_speed.md explains"
        )
    else:
        yield ok(text)


def reading_rate(subject: Subject) -> tuple[float, int, int]:
    """Return (clips/s of all reader processes together, clips that could not be read, clips asked for)."""
    from anal_tools.benchmark.reader_stages import Bench

    assert subject.cfg is not None, "the caller has looked"
    bench = Bench(subject.cfg, subject.cfg.data.reader, "", clips=FEED_CLIPS)
    try:
        answers = [bench.ask(0)]  # not timed: it opens what all clips share
        end = min(time.monotonic() + FEED_SECONDS, subject.deadline - 1)
        began, cpu, good = time.monotonic(), time.process_time(), 0
        # If a slow disk gave no clip in time, wait for up to three more: a rate needs one
        while len(answers) <= FEED_CLIPS and (time.monotonic() < end or good == 0 and len(answers) < 4):
            answers.append(bench.ask(len(answers)))
            good += answers[-1].ok
        wall, busy = time.monotonic() - began, time.process_time() - cpu
    finally:
        bench.close()

    # One reader was measured: more scale it, until the cores are used up
    processes = max(1, subject.cfg.workers)
    rate = min(processes * good / wall, cores() * good / max(busy, 1e-9))
    return rate, sum(not answer.ok for answer in answers), len(answers)


def logged_rate(exp: Path, batch: int) -> float | None:
    """Return the clips/s of a rank without its waits for clips, from the last progress line; None without one."""
    try:
        paces = _PACE.findall((exp / "log.txt").read_text("utf-8", errors="replace")[-20_000:])
        seconds = float(paces[-1][0]) - float(paces[-1][1])
    except (OSError, IndexError, ValueError):
        return None
    return batch / seconds if seconds > 0 else None


def compute_rate(subject: Subject) -> float:
    """Return the clips/s of a training step on random clips; a CPU gets at most two clips."""
    import torch

    from anal_tools.benchmark.step import Step
    from utils import dist

    cfg = subject.cfg
    assert cfg is not None, "the caller has looked"
    on_gpu = torch.cuda.is_available()
    # Compilation would take longer than the whole check
    cfg = cfg.model_copy(update={"compile": False, "batch_size": cfg.batch_size if on_gpu else min(2, cfg.batch_size)})
    step = Step(cfg, dist.World(device=torch.device("cuda", 0) if on_gpu else torch.device("cpu")), bare=False)
    if on_gpu:
        step.run()  # warm-up: the first step selects kernels
    began = time.perf_counter()
    step.run()
    return cfg.batch_size / (time.perf_counter() - began)
