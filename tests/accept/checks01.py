"""The measurements behind the rows of issue 01; each returns {"measured": ..., "holds": bool}."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import ROOT, command, environment, evaluate, train

SMALL = """\
common:
    model:
        type: {method}
        backbone: resnet18
        num_segments: 2
        num_class: 8
        dropout: 0.5
        pretrained: False
        kwargs: {{bn_group_size: {group}, bn_sync_stats: {sync_stats}}}
    augmentation:
        input_size: 32
        test_resize: 36
        crop: random_resized
        colorjitter: [0.2, 0.2, 0.2, 0.1]
        random_erasing: [0.5, 0.02, 0.4, 0.3]
        mix_up: 0.2
    data: {{reader: video, sampling: tsn, flip: true}}
    val_dense: False
    workers: 1
    batch_size: 4
    lr_scheduler: {{type: COSINE, base_lr: 0.01, warmup_steps: 5, warmup_lr: 0.02, min_lr: 0.0, max_iter: {steps}}}
    label_smooth: 0.1
    no_wd: True
    momentum: 0.9
    weight_decay: 0.0001
    nesterov: True
    val_freq: {val_freq}
    print_freq: {print_freq}
    train_root: {data}
    train_source: {data}/lists/train.txt
    val_root: {data}
    val_source: {data}/lists/val.txt
"""


def small_experiment(folder: Path, data: Path, extra: str = "", **changes: object) -> Path:
    """A tiny experiment with every random part on, over demo videos."""
    values = {"method": "tsn", "group": 1, "sync_stats": True, "steps": 60, "val_freq": 20, "print_freq": 5}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(SMALL.format(data=data, **(values | changes)) + extra)
    return folder


def demo_videos(folder: Path, videos: int, val: int) -> Path:
    """A small motion data set."""
    if not (folder / "lists/val.txt").exists():
        command("main.py", "demo-data", "--out", folder, "--train", str(videos), "--val", str(val))
    return folder


# ---------------------------------------------------------------- real people


PEOPLE = """\
common:
    model: {{type: tsm, backbone: resnet18, num_segments: 8, num_class: 4, dropout: 0.5, pretrained: False}}
    augmentation:
        input_size: 56
        test_resize: 64
        crop: random_resized
        area: [0.7, 1.0]
        colorjitter: [0.2, 0.2, 0.2, 0.0]
    data: {{reader: {reader}, sampling: tsn, flip: true, class_names: {lists}/classInd.txt}}
    val_dense: False
    workers: 1
    batch_size: 8
    lr_scheduler: {{type: COSINE, base_lr: 0.002, warmup_steps: 20, warmup_lr: 0.01, min_lr: 0.0, max_iter: 300}}
    label_smooth: 0.0
    no_wd: False
    momentum: 0.9
    weight_decay: 0.001
    nesterov: True
    val_freq: 100
    print_freq: 20
    train_root: {root}
    train_source: {lists}/train.txt
    val_root: {root}
    val_source: {lists}/val.txt
"""


def weizmann_experiment(folder: Path, shared: Path, root: Path, reader: str) -> Path:
    """The issue's settings: random-resized crop .7-1, flip, jitter .2, batch 8, lr .01, wd 1e-3."""
    folder.mkdir(parents=True)
    lists = shared / "lists" / "weizmann4"
    if reader == "frames":  # the dump's folders are named like the videos, without the ending
        lists = root / "lists"
    (folder / "config.yaml").write_text(PEOPLE.format(reader=reader, root=root, lists=lists))
    return folder


def dump_weizmann(shared: Path, target: Path) -> Path:
    """JPEG folders (quality 95) of weizmann4 and lists with their frame counts; made once."""
    import av
    import simplejpeg

    if (target / "lists").exists():
        return target
    for path in sorted((shared / "weizmann4").rglob("*.mp4")):
        folder = target / path.relative_to(shared).with_suffix("")
        folder.mkdir(parents=True)
        with av.open(str(path)) as container:
            for number, frame in enumerate(container.decode(video=0), start=1):
                pixels = frame.to_ndarray(format="rgb24")
                (folder / f"img_{number:05d}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, quality=95))
    (target / "lists").mkdir()
    for name in ("train.txt", "val.txt", "classInd.txt"):
        text = (shared / "lists/weizmann4" / name).read_text()
        (target / "lists" / name).write_text(text.replace(".mp4 ", " "))
    return target


# ---------------------------------------------------------------- kill -9


def fingerprint(exp: Path) -> str:
    """sha256 over weights, BN buffers, momentum and every logged loss (of each iteration the last record)."""
    import torch

    state = torch.load(exp / "ckpt.pth.tar", weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in sorted(state["model"].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    for key, values in sorted(state["optimizer"]["state"].items()):
        digest.update(str(key).encode() + values["momentum_buffer"].numpy().tobytes())
    digest.update(json.dumps(sorted(logged_losses(exp).items())).encode())
    digest.update(repr((state["step"], state["best_prec1"])).encode())
    return digest.hexdigest()


def logged_losses(exp: Path) -> dict[int, str]:
    """Iteration -> the loss and accuracy text of its log line; a re-run iteration must have logged the same."""
    found: dict[int, str] = {}
    for match in re.finditer(
        r"Iter: \[(\d+)/\d+\].*?(Loss \S+ \(\S+\)\s+Prec@1 .*?)\s+LR", (exp / "log.txt").read_text()
    ):
        step, text = int(match[1]), match[2]
        if found.setdefault(step, text) != text:
            raise RuntimeError(f"iteration {step} logged {found[step]!r}, and {text!r} when it was run again")
    return found


def ranks_of(exp: Path) -> list[int]:
    """Process ids of the ranks that train this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            runs_main = any(word.endswith(b"main.py") for word in words) and b"torch.distributed.run" not in words
            if runs_main and b"train" in words and os.fsencode(exp) in words:
                found.append(int(entry.name))
    return sorted(found)


def start_training(exp: Path, ranks: int, *overrides: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    """`train.sh local N` in the background."""
    sets = [word for override in overrides for word in ("--set", override)]
    argv = [sys.executable, "-m", "launch", "train", str(exp), "local", str(ranks), *sets]
    output = open(exp.parent / f"{exp.name}.out", "ab")  # noqa: SIM115  lives as long as the process
    return subprocess.Popen(argv, cwd=ROOT, env=environment(env), stdout=output, stderr=output, start_new_session=True)


def started_times(exp: Path) -> int:
    """How often a process of this run came as far as its first step."""
    log = exp / "log.txt"
    text = log.read_text() if log.exists() else ""
    return text.count("initial weights:") + text.count("going on from")


FAILPOINTS = ("checkpoint.tmp", "checkpoint.linked", "checkpoint.replace")


def kill_and_compare(work: Path, kills: int, ranks: int = 2, seed: int | None = None) -> dict:
    """Train undisturbed; train again while random ranks are killed -9 at random moments; compare fingerprints."""
    seed = int(time.time()) if seed is None else seed
    chance = random.Random(seed)
    data = demo_videos(work / "kill-data", 64, 24)
    settings = ("common.save_minutes=0.02",)
    calm = small_experiment(work / "calm", data, steps=160, val_freq=40)
    seconds, _ = train(calm, ranks, *settings)
    rough = small_experiment(work / "rough", data, steps=160, val_freq=40)
    events: list[str] = []
    while len(events) < kills:
        point = chance.choice(FAILPOINTS) if chance.random() < 0.25 else None
        env = {"ZOETROPE_FAILPOINT": f"{point}:0:{chance.randint(1, 2)}"} if point else None
        process = start_training(rough, ranks, *settings, env=env)
        if point is None:
            starts = started_times(rough)
            if chance.random() < 0.3:
                while not ranks_of(rough) and process.poll() is None:
                    time.sleep(0.05)
                time.sleep(chance.uniform(0.0, 8.0))  # anywhere in the start: imports, meeting, lock, checkpoint
            else:
                while started_times(rough) == starts and process.poll() is None:
                    time.sleep(0.05)
                time.sleep(chance.uniform(0.0, 5.0))  # anywhere in training, validating and saving
            alive = ranks_of(rough)
            if alive and process.poll() is None:
                victim = chance.choice(alive)
                os.kill(victim, signal.SIGKILL)
                when = "in training" if started_times(rough) > starts else "at start"
                events.append(f"{when}: process {alive.index(victim)} of {len(alive)}")
            elif process.poll() == 0:
                raise RuntimeError(f"the run ended after {len(events)} kills: give it more steps")
        else:
            process.wait(timeout=300)
            events += [point] if process.returncode else []
        process.wait(timeout=300)
    train(rough, ranks, *settings)
    same = fingerprint(calm) == fingerprint(rough)
    early = sum(event.startswith("at start") for event in events)
    measured = {"seed": seed, "kills": len(events), "before_first_step": early, "equal": same, "events": events}
    return {"measured": measured, "holds": same and len(events) >= kills}


# ---------------------------------------------------------------- ranks, BN, validation


def compare_ranks(work: Path, steps: int) -> dict:
    """Losses of every step and hashes of every clip on 1, 2 and 4 ranks."""
    data = demo_videos(work / "rank-data", 64, 16)
    losses, clips = {}, {}
    for ranks in (1, 2, 4):
        extra = "    precision: fp64\n    shards: 4\n    deterministic: True\n"
        exp = small_experiment(
            work / f"ranks-{ranks}", data, extra, method="tsm", group=4, steps=steps, val_freq=steps, print_freq=1
        )
        train(exp, ranks)
        records = [json.loads(line) for line in (exp / "events/scalars.jsonl").read_text().splitlines()]
        losses[ranks] = {r["step"]: r["loss_train"] for r in records if "loss_train" in r}
        clips[ranks] = clip_hashes(exp, ranks, steps)
    difference = max(abs(losses[1][k] - losses[n][k]) for n in (2, 4) for k in losses[1])
    same = clips[1] == clips[2] == clips[4]
    complete = all(len(losses[n]) == steps for n in losses) and len(clips[1]) == steps * 16
    measured = {"largest_loss_difference": difference, "clips": len(clips[1]), "same_clips": same}
    return {"measured": measured, "holds": complete and same and difference <= 1e-9}


def clip_hashes(exp: Path, ranks: int, steps: int) -> dict[int, str]:
    """Position -> sha256 of the decoded clip and of everything that its plan drew, as each rank's loader gives it."""
    sys.path.insert(0, str(ROOT))
    import torch

    from datasets.lists.records import Records
    from datasets.loading import loader
    from utils import config, dist
    from utils.shards import ShardPlan

    cfg = config.load(exp)
    records = Records.load(Path(cfg.train_source), cfg.train_root, num_class=cfg.model.num_class)
    found: dict[int, str] = {}
    for rank in range(ranks):
        shards = ShardPlan(4, cfg.batch_size, ranks, rank, 4)
        world = dist.World(rank, ranks, rank, torch.device("cpu"), None)
        batches = loader.build(cfg, "train", world, shards, start=0, records=records)
        for step, micro_batches in batches:
            for batch in micro_batches:
                for row, position in enumerate(batch.positions):
                    digest = hashlib.sha256(batch.clips[row].numpy().tobytes())
                    for rows in (*batch.drawn.values(), batch.labels):
                        digest.update(rows[row].numpy().tobytes())
                    found[position] = digest.hexdigest()
            if step + 1 == steps:
                break
        batches.close()
    return found


def sync_bn_differences() -> dict:
    """Runs the check that the tests use, as a program."""
    done = command("tests/utils/sync_bn_check.py")
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    return {"measured": measured, "holds": max(measured.values()) <= 1e-12}


def validation_on_ranks(work: Path) -> dict:
    """One checkpoint, 23 videos, three world sizes: ids, scores and metrics must agree."""
    import numpy as np

    data = demo_videos(work / "val-data", 40, 24)
    (data / "lists/val23.txt").write_text("".join((data / "lists/val.txt").read_text().splitlines(True)[:23]))
    exp = small_experiment(work / "validation", data, steps=8, val_freq=8)
    train(exp, 0)
    found = {}
    for ranks in (1, 2, 3):
        summary = evaluate(exp, ranks, "--list", str(data / "lists/val23.txt"), "--name", f"on-{ranks}")
        folder = exp / "results" / f"on-{ranks}"
        ids = (folder / "ids.txt").read_text().splitlines()
        found[ranks] = (ids, np.load(folder / "logits.npy"), summary["metrics"])
    ids, logits, metrics = found[1]
    once = len(set(ids)) == 23 and all(found[n][0] == ids for n in found)
    gap = max(float(np.abs(found[n][1] - logits).max()) for n in found)
    whole = ("num_videos", "top1", "top5", "mean_class_accuracy")
    same = all(found[n][2][key] == metrics[key] for n in found for key in whole) and metrics["num_videos"] == 23
    return {
        "measured": {"each_once": once, "logit_gap": gap, "metrics": metrics},
        "holds": once and same and gap <= 1e-5,
    }


# ---------------------------------------------------------------- reader, loop, config


def same_clip(shared: Path) -> dict:
    """Runs the conformance test of the readers on real files."""
    chosen = ("-k", "same_clip_from_video", "-p", "no:cacheprovider")
    done = command("-m", "pytest", "-q", "tests/datasets", *chosen, check=False)
    last = done.stdout.strip().splitlines()[-1]
    return {"measured": last, "holds": done.returncode == 0 and " passed" in last and shared.is_dir()}


def loop_overhead(rounds: int) -> dict:
    """Steps of ours and of a bare loop in turn in one process; the ratio of CPU seconds, median over processes."""
    ratios = []
    for _ in range(rounds):
        done = command("tests/accept/loop_overhead.py", env={"OMP_NUM_THREADS": "1"})
        ratios.append(json.loads(done.stdout.strip().splitlines()[-1])["ours_over_bare"])
    median = statistics.median(ratios)
    return {"measured": {"median": round(median, 4), "rounds": [round(r, 4) for r in ratios]}, "holds": median <= 1.02}


RATES = {0: 0.01, 10: 0.0106, 490: 0.0394, 500: 0.04, 1000: 0.039883, 7500: 0.021104, 15000: 0.0}


def seed_config() -> dict:
    """Seed 004's text as the shipped experiment holds it, and the seven learning rates of its published log."""
    sys.path.insert(0, str(ROOT))
    from utils import config, lr_schedule

    folder = next(
        (ROOT / "exps").rglob("colorjitter_random_erasing_labelsmooth_0.1_nowd_coslr_bn16_gpu32_lr0.04_epoch100")
    )
    cfg = config.load(folder)
    plain = cfg.lr_scheduler
    names = ("type", "base_lr", "warmup_steps", "warmup_lr", "min_lr", "max_iter", "lr_steps", "lr_mults")
    options = {name: getattr(plain, name) for name in names}
    found = {k: round(lr_schedule.lr_at(k, **options), 6) for k in RATES}
    return {"measured": found, "holds": all(abs(found[k] - RATES[k]) < 1e-9 for k in RATES)}


def config_errors() -> dict:
    """The planted file of the tests through the user's own command: lines, wall time, and no torch."""
    sys.path.insert(0, str(ROOT))
    from tests.utils.test_config import FAULTS, PLANTED

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(PLANTED)
        program = "import sys, main; main.main(['config', sys.argv[1]]); sys.exit('torch' in sys.modules)"
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            done = command("-c", program, folder, check=False)
            seconds.append(time.monotonic() - started)
        told = done.stderr
        right = sum(f"config.yaml:{line}: {text}" in told for line, text in FAULTS.items())
    measured = {"right_line": right, "faults": len(FAULTS), "seconds": round(min(seconds), 3), "torch": done.returncode}
    return {"measured": measured, "holds": right == len(FAULTS) == 12 and min(seconds) < 1 and not done.returncode}
