"""A training step beside MMAction2's on one CPU thread, and beside plain PyTorch on a GPU."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.interop.weights import MODELS, TOOLS, experiment
from tests.benchmarks.rows import ROOT, command, environment, run_rows, workspace

BOUNDS = {"slowfast": 0.97, "tpn_slowonly": 1.03, "tsm": 1.03}  # ours / theirs


def steps(work: Path, rounds: int = 5) -> dict:
    """Forward and backward, CPU seconds on one thread, ours and the peer's in turn; ours / theirs."""
    measured, holds = {}, True
    for model, bound in BOUNDS.items():
        exp = experiment(work / model, model)
        ours = f"{sys.executable} main.py benchmark step {exp} --json --threads 1"
        argv = [TOOLS / "peers", "pair", "--rounds", rounds, "--field", "train_cpu_ms", "--lower-is-better", "--json"]
        argv += ["--ours", ours, "--theirs", f"bench-step {model} --size 96"]
        done = subprocess.run(
            [sys.executable, *map(str, argv)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            return {"measured": done.stderr[-500:], "holds": False}
        pair = json.loads(done.stdout.splitlines()[-1])
        ratios = [mine / theirs for mine, theirs in zip(pair["ours"], pair["theirs"], strict=True)]
        measured[model] = {
            "ours_over_theirs": round(statistics.median(ratios), 3),
            "bound": bound,
            "rounds": pair["ratios"],
        }
        holds &= statistics.median(ratios) <= bound
    return {"measured": measured, "holds": holds}


def gpu_steps(work: Path) -> dict:
    """Our fastest configuration against plain PyTorch (fp32 with TF32, channels first) on a GPU, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return {"measured": "not measured: no GPU on this machine", "holds": True, "skipped": True}
    measured = {}
    for model in MODELS:
        exp = experiment(work / model, model, size=224, batch=64 if model in ("tsn", "tsm") else 32)
        lines = {}
        for name, words in (("ours", ("--amp", "bf16", "--compile")), ("plain", ("--plain", "--amp", "fp32"))):
            done = command("main.py", "benchmark", "step", exp, "--json", "--iters", "20", *words)
            lines[name] = json.loads(done.stdout.splitlines()[-1])
        measured[model] = {
            "speed_up": round(lines["plain"]["step_ms"] / lines["ours"]["step_ms"], 2),
            "mfu": lines["ours"]["mfu"],
            "clips_per_s": lines["ours"]["clips_per_s"],
        }
    return {"measured": measured, "holds": all(row["speed_up"] >= 2 for row in measured.values())}


ROWS = {
    "step": (
        "train step / MMAction2's, CPU seconds, one thread",
        "<= 1.03; SlowFast <= .97",
        lambda: steps(workspace()),
    ),
    "gpu_step": (
        "train step on one GPU / fp32-tf32 eager channels-first",
        ">= 2x faster, MFU reported",
        lambda: gpu_steps(workspace()),
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
