"""Runs that must be equal: killed and calm, on 1, 2 and 4 ranks, by any reader; sync-BN against one batch."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.experiments import demo_videos, fingerprint, small_experiment
from tests.benchmarks.rows import ROOT, SHARED, command, environment, evaluate, run_rows, train, workspace

# ---------------------------------------------------------------- kill -9


def ranks_of(exp: Path) -> list[int]:
    """Process ids of the ranks that train this folder."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            runs_main = any(word.endswith(b"main.py") for word in words) and b"torch.distributed.run" not in words
            if runs_main and b"train" in words and os.fsencode(exp) in words:
                pids.append(int(entry.name))
    return sorted(pids)


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
    return text.count("initial weights:") + text.count("resuming from")


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
    import torch

    from datasets.lists.records import Records
    from datasets.loading import loader
    from utils import config, dist
    from utils.shards import ShardPlan

    cfg = config.load(exp)
    records = Records.load(Path(cfg.train_source), cfg.train_root, num_class=cfg.model.num_class)
    digests: dict[int, str] = {}
    for rank in range(ranks):
        shards = ShardPlan(4, cfg.batch_size, ranks, rank, 4)
        world = dist.World(rank, ranks, rank, torch.device("cpu"), None)
        batches = loader.train(cfg, world, shards, start=0, records=records)
        for step, micro_batches in batches:
            for batch in micro_batches:
                for row, position in enumerate(batch.positions):
                    digest = hashlib.sha256(batch.clips[row].numpy().tobytes())
                    for rows in (*batch.drawn.values(), batch.labels):
                        digest.update(rows[row].numpy().tobytes())
                    digests[position] = digest.hexdigest()
            if step + 1 == steps:
                break
        batches.close()
    return digests


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
    by_ranks = {}
    for ranks in (1, 2, 3):
        summary = evaluate(exp, ranks, "--list", str(data / "lists/val23.txt"), "--name", f"on-{ranks}")
        folder = exp / "results" / f"on-{ranks}"
        ids = (folder / "ids.txt").read_text().splitlines()
        by_ranks[ranks] = (ids, np.load(folder / "logits.npy"), summary["metrics"])
    ids, logits, metrics = by_ranks[1]
    once = len(set(ids)) == 23 and all(by_ranks[n][0] == ids for n in by_ranks)
    gap = max(float(np.abs(by_ranks[n][1] - logits).max()) for n in by_ranks)
    whole = ("num_videos", "top1", "top5", "mean_class_accuracy")
    same = all(by_ranks[n][2][key] == metrics[key] for n in by_ranks for key in whole) and metrics["num_videos"] == 23
    return {
        "measured": {"each_once": once, "logit_gap": gap, "metrics": metrics},
        "holds": once and same and gap <= 1e-5,
    }


# ---------------------------------------------------------------- readers


def same_clip(shared: Path) -> dict:
    """Runs the conformance test of the readers on real files."""
    chosen = ("-k", "same_clip_from_video", "-p", "no:cacheprovider")
    done = command("-m", "pytest", "-q", "tests/datasets", *chosen, check=False)
    last = done.stdout.strip().splitlines()[-1]
    return {"measured": last, "holds": done.returncode == 0 and " passed" in last and shared.is_dir()}


ROWS = {
    "kill": (
        "kill -9 of any rank at 20 random moments",
        "sha256 of weights, BN, momentum, losses equal",
        lambda: kill_and_compare(workspace(), kills=20),
    ),
    "ranks": (
        "1, 2 and 4 ranks, same global batch, float64",
        "same samples; 20 losses within 1e-9",
        lambda: compare_ranks(workspace(), steps=20),
    ),
    "sync_bn": ("sync-BN groups, 4 ranks in 2 groups, 2D and 3D", "<= 1e-12", sync_bn_differences),
    "validation": (
        "validation on 23 videos with 1, 2, 3 ranks",
        "each once, same metrics",
        lambda: validation_on_ranks(workspace()),
    ),
    "same_clip": ("same plan, video and frames of a lossless dump", "bit for bit", lambda: same_clip(SHARED)),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
