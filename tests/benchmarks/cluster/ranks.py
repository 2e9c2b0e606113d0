"""Other numbers of ranks in one run, ranks that hang, and sweeps."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.cluster import slurm
from tests.benchmarks.experiments import demo_videos, small_experiment
from tests.benchmarks.rows import ROOT, command, environment, run_rows, workspace

SETTINGS = ("common.precision=fp64", "common.deterministic=true")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> float:
    """Seconds until `condition` is true."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise RuntimeError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)
    return time.monotonic() - began


# ---------------------------------------------------------------- another number of ranks


def elastic_ranks(work: Path, steps: int = 20) -> dict:
    """A run that stays on 4 ranks, and one on 4, then 2, then 4; every clip's bytes and every loss."""
    from tests.elastic_rank import trained

    data = demo_videos(work / "elastic-data", 64, 16)
    options = {"method": "tsm", "group": 2, "steps": steps, "val_freq": steps}  # dropout and mixup are on in SMALL
    fixed = small_experiment(work / "elastic-fixed", data, **options)
    assert _elastic(fixed, 4, 0).returncode == 0
    moved = small_experiment(work / "elastic-moved", data, **options)
    codes = [_elastic(moved, 4, steps // 3).returncode]
    state = (moved / "ckpt.pth.tar").read_bytes()
    refused = _elastic(moved, 3, 0)
    kept = state == (moved / "ckpt.pth.tar").read_bytes()
    named = "use 1, 2, 4 ranks" in refused.stderr
    codes += [_elastic(moved, 2, 2 * steps // 3).returncode, _elastic(moved, 4, 0).returncode]
    losses, clips = trained(work, f"{fixed.name}.clips")
    moved_losses, moved_clips = trained(work, f"{moved.name}.clips")
    gap = max(abs(losses[step] - moved_losses.get(step, float("nan"))) for step in losses)
    same = clips == moved_clips and len(clips) == 16 * steps
    measured = {"largest_loss_difference": gap, "clips": len(clips), "same_clips": same, "exit_codes": codes}
    measured |= {"refused_with_legal_counts": named, "refused_code": refused.returncode, "checkpoint_untouched": kept}
    holds = same and gap <= 1e-9 and codes == [75, 75, 0] and refused.returncode == 2 and named and kept
    return {"measured": measured, "holds": holds}


def _elastic(exp: Path, ranks: int, stop: int) -> subprocess.CompletedProcess:
    program = (
        "import sys; from pathlib import Path; from launch import local; "
        "sys.exit(local.run(sys.argv[2:], int(sys.argv[1]), script=Path('tests/elastic_rank.py').resolve()))"
    )
    env = ONE_THREAD | {"ELASTIC_STOP": str(stop), "ELASTIC_FILE": str(exp.parent / f"{exp.name}.clips")}
    sets = [word for item in SETTINGS for word in ("--set", item)]
    return command("-c", program, str(ranks), "train", exp, *sets, env=env, check=False)


# ---------------------------------------------------------------- hanging


STUCK = """\
import sys, time, main
from datasets.loading.workers import ReadHandler
train = ReadHandler._train
def stuck(handler, request):
    if request["position"] == 21:
        time.sleep(1000)
    return train(handler, request)
ReadHandler._train = stuck
sys.exit(main.main(sys.argv[1:]))
"""


def hangs(work: Path, watchdog_minutes: float = 0.2) -> dict:
    """A rank stopped by SIGSTOP in training, and a decode that never returns: who is named, when, and the exit code."""
    data = demo_videos(work / "hang-data", 64, 16)
    frozen, decode = _frozen_rank(work, data, watchdog_minutes), _stuck_decode(work, data, watchdog_minutes)
    holds = all(
        one["named"] and one["exit_code"] == 70 and one["seconds"] <= 60 * watchdog_minutes + 2
        for one in (frozen, decode)
    )
    limit = {"watchdog_seconds": 60 * watchdog_minutes}
    return {"measured": limit | {"frozen_rank": frozen, "stuck_decode": decode}, "holds": holds}


def _frozen_rank(work: Path, data: Path, minutes: float) -> dict:
    exp = small_experiment(work / "frozen", data, steps=5000, val_freq=5000, print_freq=1)
    log = exp / "log.txt"
    argv = [sys.executable, "-m", "launch", "train", str(exp), "local", "3", "--set", f"watchdog_minutes={minutes}"]
    with open(work / "frozen.out", "wb") as out:
        process = subprocess.Popen(argv, cwd=ROOT, env=environment(ONE_THREAD), stdout=out, stderr=out)
    wait_for(lambda: log.exists() and "Iter: [5/" in log.read_text(), 180, "training")
    victim = json.loads((exp / "jobs/heartbeat-train-2").read_text())
    os.kill(victim["pid"], signal.SIGSTOP)
    seconds = wait_for(lambda: "Waiting for: " in log.read_text(), 60 * minutes + 60, "a line in log.txt")
    code = process.wait(timeout=90)
    text = log.read_text()
    named = f"Waiting for: rank 2 on {victim['host']} (process {victim['pid']}) is silent" in text
    reports = [path.read_text() for path in (exp / "jobs").glob("hang-*.txt")]
    stacks = bool(reports) and all("rank: " in text and "sample: " in text and "File " in text for text in reports)
    return {"seconds": round(seconds, 1), "named": named and stacks, "exit_code": code, "reports": len(reports)}


def _stuck_decode(work: Path, data: Path, minutes: float) -> dict:
    exp = small_experiment(work / "stuck", data, steps=50, val_freq=50, print_freq=1)
    program = exp.parent / "stuck_main.py"
    program.write_text(STUCK)
    log = exp / "log.txt"
    start = (
        "import sys; from pathlib import Path; from launch import local; "
        "sys.exit(local.run(sys.argv[2:], 2, script=Path(sys.argv[1])))"
    )
    words = ["train", str(exp), "--set", "workers=0", "--set", f"watchdog_minutes={minutes}"]
    argv = [sys.executable, "-c", start, str(program), *words]
    with open(work / "stuck.out", "wb") as out:
        process = subprocess.Popen(argv, cwd=ROOT, env=environment(ONE_THREAD), stdout=out, stderr=out)
    wait_for(lambda: log.exists() and "Iter: [2/" in log.read_text(), 180, "training")  # position 21 is in step 3
    seconds = wait_for(
        lambda: " hangs: data of iteration 3 " in log.read_text(), 60 * minutes + 60, "a line in log.txt"
    )
    code = process.wait(timeout=120)
    sample = _path_at(21, data)
    reports = [path.read_text() for path in (exp / "jobs").glob("hang-*-rank1.txt")]
    named = sample in log.read_text() and any(f"{sample}\n" in text and "in stuck" in text for text in reports)
    return {"seconds": round(seconds, 1), "named": named, "exit_code": code, "sample": sample}


def _path_at(position: int, data: Path) -> str:
    from datasets.lists.records import Records
    from datasets.plan.order import Order

    records = Records.load(data / "lists/train.txt", str(data), num_class=8)
    return records.path(Order("shuffled", 0, records)(position).sample)


# ---------------------------------------------------------------- sweep


CLUSTER = "defaults: {gpus_per_node: 8, cpus_per_gpu: 1, time: 20, signal_seconds: 10, max_stalled: 5}\n"
RATES = ("0.01", "0.02", "0.03", "1e30", "0.04", "0.05")  # the fourth diverges: its trial fails


def sweep_on_slurm(work: Path, partition: str = "VI_SP_VA_1080TI") -> dict:
    """6 trials as a job array, two at a time; one fails, the last one gets a signal to stop and requeues itself.

    Needs $SLURM_CONF of a running SLURM.
    """
    data = demo_videos(work / "sweep-data", 64, 16)
    exp = small_experiment(work / "swept", data, steps=30, val_freq=30, print_freq=1)
    (work / "cluster.yaml").write_text(CLUSTER)
    env = ONE_THREAD | {"ZOETROPE_CLUSTER": str(work / "cluster.yaml"), "XDG_STATE_HOME": str(work / "state")}
    folder = work / "sweeps" / "rates"
    grid = f"common.lr_scheduler.warmup_lr={','.join(RATES)}"
    words = ["rates", partition, "1", "--exp", exp, "--grid", grid, "--parallel", "2", "--into", work / "sweeps"]
    command("-m", "launch", "sweep", *words, env=env)
    rows = _attempts(folder)
    trials = [row["trial"] for row in rows if row["event"] == "submit"]
    array = rows[0]["job"].partition("_")[0]
    shown = subprocess.run(["scontrol", "show", "job", array], capture_output=True, text=True, check=True).stdout
    last = folder / "trials" / trials[-1] / "log.txt"
    wait_for(lambda: last.exists() and "Iter: [3/" in last.read_text(), 400, "the last trial")
    subprocess.run(["scancel", "--signal=USR2", f"{array}_{len(trials) - 1}"], check=True)
    wait_for(lambda: not _queue(array), 400, "the end of the array")
    first = _attempts(folder)
    collected = command("-m", "launch", "collect", "rates", "--into", work / "sweeps", env=env, check=False)
    with (folder / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    failures = [line for line in collected.stdout.splitlines() if line.startswith("failed: ")]
    again = command("-m", "launch", "sweep", *words, env=env)  # the same command: what is missing
    second = _attempts(folder)[len(first) :]
    wait_for(lambda: not _queue(second[0]["job"]), 200, "the end of the retry")
    second = _attempts(folder)[len(first) :]
    starts = {trial: sum(row["event"] == "start" and row["trial"] == trial for row in first) for trial in trials}
    measured = {
        "rows": len(table),
        "failures": [line[:160] for line in failures],
        "parallel_two": "ArrayTaskThrottle=2" in shown,
        "starts": list(starts.values()),
        "requeued_last": "job: restart number=1 " in last.read_text(),
        "retried": sorted({trials.index(row["trial"]) for row in second}),
        "said": again.stdout.splitlines()[0],
    }
    once = [starts[trial] for trial in trials[:-1]] == [1] * 5 and starts[trials[-1]] == 2
    holds = len(table) == 5 and len(failures) == 1 and trials[3] in failures[0] and once and measured["retried"] == [3]
    return {"measured": measured, "holds": holds and measured["requeued_last"] and measured["parallel_two"]}


def _attempts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]


def _queue(job: str) -> str:
    argv = ["squeue", "--noheader", "--jobs", job, "--states", "all", "--format", "%T"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
    return "\n".join(state for state in done.stdout.split() if state not in ended)


def sweep() -> dict:
    """Six trials as a real job array; one fails, the last is requeued, the retry runs one."""
    work = workspace()
    os.environ.update(slurm.slurm(work).env)  # the sweep runs in this SLURM
    return sweep_on_slurm(work)


ROWS = {
    "elastic": (
        "4 -> 2 -> 4 ranks in one run, bn_group_size 2, dropout and mixup on, float64",
        "same samples; losses equal to the fixed-world run within 1e-9",
        lambda: elastic_ranks(workspace()),
    ),
    "hang": (
        "a SIGSTOPped rank; a decode that hangs",
        "named within watchdog_minutes, exit non-zero",
        lambda: hangs(workspace()),
    ),
    "sweep": (
        "sweep of 6 trials, parallel 2, one trial fails, the last trial is requeued",
        "5 rows, 1 named failure; the retry runs only that one; no finished trial ran twice",
        slurm.skipped(sweep),
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
