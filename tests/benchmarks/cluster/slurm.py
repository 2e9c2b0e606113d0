"""Runs on a SLURM of this machine: from a clone, disturbed, preempted, requests of 32, hostile names."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.experiments import demo_videos, fingerprint, logged_losses, small_experiment
from tests.benchmarks.rows import ROOT, command, evaluate, run_rows, train, workspace
from tests.slurm.cluster import PARTITION, LocalSlurm, NoSlurm, until

THREADS = {"OMP_NUM_THREADS": "1"}
EVENT_SECONDS = 90.0


def slurm(work: Path, gpus_per_node: int = 2, *, term_only: bool = False) -> LocalSlurm:
    """The cluster, or a row that says why there is none."""
    os.environ.update(THREADS)
    (work / "slurm").mkdir(exist_ok=True)
    return LocalSlurm(work / "slurm", gpus_per_node=gpus_per_node, term_only=term_only)


def skipped(row: Callable[[], dict]) -> Callable[[], dict]:
    """A row that is skipped, and says why, where SLURM cannot start."""

    def run() -> dict:
        try:
            return row()
        except NoSlurm as reason:
            return {"measured": f"skipped, no SLURM here: {reason}", "holds": True, "skipped": True}

    return run


def clean_clone(target: Path) -> Path:
    """A git clone of the working tree as it stands, with the virtual environment linked."""
    from launch import snapshot

    shutil.rmtree(target, ignore_errors=True)
    source = target.with_name("source")
    shutil.rmtree(source, ignore_errors=True)
    for name in snapshot.files(ROOT):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "as it stands"]):
        subprocess.run(["git", *words], cwd=source, check=True, capture_output=True)
    subprocess.run(["git", "clone", "-q", str(source), str(target)], check=True, capture_output=True)
    (target / ".venv").symlink_to(Path(sys.executable).parents[1])
    return target


def from_a_clone(work: Path) -> dict:
    """`train.sh VI_SP_VA_1080TI 4` on 2 nodes x 2 and `train.sh local 4`, from a clean clone."""
    cluster = slurm(work)
    clone = clean_clone(work / "clone")
    data = demo_videos(work / "clone-data", 64, 24)
    source = small_experiment(work / "clone-config", data, steps=12, val_freq=6, print_freq=2)
    marks = {}
    for name, place in (("slurm", PARTITION), ("local", "local")):
        exp = clone / "exps" / "demo_exps" / name
        cluster.run(sys.executable, "main.py", "new", exp, "--from", source, cwd=clone)
        output = cluster.run(exp / "train.sh", place, "4", cwd=Path("/")).stdout
        if name == "slurm":
            job = output.split("submitted job ")[1].split()[0]
            shown = cluster.wait_for_end(job, exp)
        marks[name] = fingerprint(exp)
    measured = {"state": shown["JobState"], "nodes": shown["NumNodes"], "tasks": shown["NumTasks"], "sha256": marks}
    return {"measured": measured, "holds": shown["JobState"] == "COMPLETED" and marks["slurm"] == marks["local"]}


class Rough:
    """A training run on SLURM that events disturb."""

    def __init__(self, cluster: LocalSlurm, exp: Path, chance: random.Random) -> None:
        self.cluster, self.exp, self.chance = cluster, exp, chance
        self.job = ""
        self.events: list[dict] = []

    def iteration(self) -> int:
        """The last iteration in the log, of all turns."""
        log = self.exp / "log.txt"
        steps = [int(step) for step in re.findall(r"Iter: \[(\d+)/", log.read_text())] if log.exists() else []
        return max(steps, default=0)

    def starts(self) -> int:
        """How often a process has started to train here."""
        log = self.exp / "log.txt"
        return log.read_text().count("] ranks ") if log.exists() else 0

    def start(self) -> None:
        """`train.sh`."""
        self.job = self.cluster.submit("train", self.exp, 2)
        self.wait_until_it_trains(0)

    def wait_until_it_trains(self, starts: int) -> None:
        """Until a new start has logged an iteration."""
        until(lambda: self.starts() > starts, 240, lambda: self.cluster.output(self.exp))
        lines = (self.exp / "log.txt").read_text().count("Iter: [")
        log = self.exp / "log.txt"
        until(lambda: log.read_text().count("Iter: [") > lines, 240, lambda: self.cluster.output(self.exp))

    def event(self, name: str) -> None:
        """Let something happen, and wait until the run trains again."""
        time.sleep(self.chance.uniform(0.5, 4.0))
        starts, at = self.starts(), self.iteration()
        began = time.monotonic()
        getattr(self, name)()
        self.wait_until_it_trains(starts)
        self.events.append({"event": name, "at": at, "seconds": round(time.monotonic() - began, 1)})

    def preempted(self) -> None:
        """A job of the urgent partition needs all nodes."""
        self.cluster.preempt()

    preempted_by_sigterm = preempted  # the same on a cluster that sends nothing but SIGTERM

    def time_limit(self) -> None:
        """Less than a minute is left."""
        hours, minutes, _ = self.cluster.job(self.job)["RunTime"].split(":")
        self.cluster.run("scontrol", "update", f"JobId={self.job}", f"TimeLimit={int(hours) * 60 + int(minutes) + 1}")

    def requeued_by_hand(self) -> None:
        """`launch requeue`."""
        self.cluster.launch("requeue", self.exp)

    def node_killed(self) -> None:
        """The power of one of its nodes fails, and comes back when SLURM has noticed."""
        name = self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(self.job)["NodeList"]).stdout.split()
        victim = self.chance.choice(name)
        self.cluster.node("node-kill", victim)
        restarts = self.cluster.job(self.job)["Restarts"]
        until(lambda: self.cluster.job(self.job)["Restarts"] != restarts, 120)
        self.cluster.node("node-start", victim)

    def rank_killed(self) -> None:
        """kill -9 of one rank ends the step; a person starts it again."""
        ranks = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and self._is_rank(pid)]
        os.kill(self.chance.choice(ranks), 9)
        shown = self.cluster.wait_for_end(self.job, self.exp, 60)
        if shown["JobState"] != "FAILED":
            raise RuntimeError(f"a killed rank left {shown['JobState']} {shown['ExitCode']}")
        self.cluster.launch("requeue", self.exp)

    def _is_rank(self, pid: str) -> bool:
        try:
            words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return (
            b"submitit.core._submit" in words and words[0] != b"srun" and os.fsencode(self.exp / "jobs/slurm") in words
        )


def disturbed(work: Path, seed: int | None = None) -> dict:
    """Six kinds of events in random order, and the seventh on a cluster that sends SIGTERM only."""
    seed = int(time.time()) if seed is None else seed
    chance = random.Random(seed)
    cluster = slurm(work, gpus_per_node=1)
    data = demo_videos(work / "rough-data", 64, 24)
    settings = {"steps": 240, "val_freq": 60, "print_freq": 1}
    extra = "    save_minutes: 0.02\n"
    calm = small_experiment(work / "calm-slurm", data, extra, **settings)
    train(calm, 2)
    rough = Rough(cluster, small_experiment(work / "rough-slurm", data, extra, **settings), chance)
    events = ["preempted", "time_limit", "node_killed", "rank_killed", "requeued_by_hand"]
    chance.shuffle(events)
    rough.start()
    for event in events:
        rough.event(event)
    restarts = int(cluster.job(rough.job)["Restarts"])
    log = (rough.exp / "log.txt").read_text()
    counted = log.count(f"of job {rough.job} on node")
    cluster.launch("cancel", rough.exp)  # it saves; the last event needs SLURM's other way
    cluster.wait_for_end(rough.job, rough.exp)
    cluster = rough.cluster = slurm(work, gpus_per_node=1, term_only=True)
    starts = rough.starts()
    rough.job = cluster.submit("train", rough.exp, 2)
    rough.wait_until_it_trains(starts)
    rough.event("preempted_by_sigterm")
    shown = cluster.wait_for_end(rough.job, rough.exp, 300)
    slurm(work, gpus_per_node=1)
    same = fingerprint(calm) == fingerprint(rough.exp) and logged_losses(calm) == logged_losses(rough.exp)
    longest = max(event["seconds"] for event in rough.events)
    measured = {
        "seed": seed,
        "equal": same,
        "state": shown["JobState"],
        "restarts": restarts,
        "counted_in_log": counted,
    }
    measured |= {"longest_event_s": longest, "events": rough.events}
    good = same and shown["JobState"] == "COMPLETED" and restarts == counted and len(rough.events) >= 5
    return {"measured": measured, "holds": good and longest <= EVENT_SECONDS}


def preempted_evaluation(work: Path) -> dict:
    """`eval.sh VI_SP_VA_1080TI 4`, preempted once, against `eval.sh local 1`."""
    import numpy as np

    cluster = slurm(work)
    data = demo_videos(work / "eval-data", 64, 24)
    lists = [(data / "lists" / name).read_text() for name in ("val.txt", "train.txt")]
    (data / "lists/all.txt").write_text("".join(lists))
    exp = small_experiment(work / "evaluation", data, steps=6, val_freq=6)
    train(exp, 0)
    words = ["--list", str(data / "lists/all.txt"), "--set", "common.val_dense=True"]
    words += ["--set", "common.augmentation.input_size=96", "--set", "common.augmentation.test_resize=112"]
    alone = evaluate(exp, 1, *words, "--name", "alone")
    job = cluster.submit("eval", exp, 4, *words, "--name", "together")
    until(lambda: (exp / "results/together/parts.json").exists(), 120, lambda: cluster.output(exp))
    time.sleep(1.0)
    cluster.preempt()
    shown = cluster.wait_for_end(job, exp, 240)
    log = (exp / f"jobs/slurm/{job}_0_log.out").read_text()
    resumed = re.search(r"resuming: (\d+) of (\d+) videos", log)
    summary = json.loads((exp / "results/together.json").read_text())
    ids = [(exp / "results" / name / "ids.txt").read_text().splitlines() for name in ("alone", "together")]
    logits, scores = (
        [np.load(exp / "results" / n / f"{k}.npy") for n in ("alone", "together")] for k in ("logits", "scores")
    )
    gap = float(max(np.abs(pair[0] - pair[1]).max() for pair in (logits, scores)))
    measured = {"state": shown["JobState"], "restarts": shown["Restarts"], "scored_before": resumed and resumed[1]}
    measured |= {"videos": summary["metrics"]["num_videos"], "largest_difference": gap}
    once = ids[0] == ids[1] and summary["metrics"]["num_videos"] == 88 and summary["counts"]["scored"] == 88
    same = once and alone["metrics"]["top1"] == summary["metrics"]["top1"] and gap <= 1e-5
    went = resumed is not None and 0 < int(resumed[1]) < 88
    return {"measured": measured, "holds": same and went and shown["Restarts"] == "1"}


def shape_of_32(work: Path) -> dict:
    """What `scontrol show job` says about a request of 32."""
    cluster = slurm(work, gpus_per_node=8)
    exp = small_experiment(work / "shape", demo_videos(work / "clone-data", 64, 24))
    sleep = ["--wrap", "sleep 300", "-o", "/dev/null"]
    blocker = cluster.run("sbatch", "--parsable", "-p", PARTITION, *sleep).stdout.strip()
    try:
        job = cluster.submit("train", exp, 32, "--dependency", f"afterok:{blocker}")
        shown = cluster.job(job)
        cluster.launch("cancel", exp)
    finally:
        cluster.run("scancel", blocker)
    names = ("NumNodes", "NumTasks", "NtasksPerN:B:S:C", "TresPerNode", "Requeue")
    measured = {name: shown[name] for name in names}
    measured["signal"] = "#SBATCH --signal=USR2@30" in (exp / f"jobs/slurm/{job}_submission.sh").read_text()
    nodes = shown["NumNodes"].split("-")[0] == "4" and shown["NtasksPerN:B:S:C"].startswith("8:")
    asked = shown["NumTasks"] == "32" and shown["TresPerNode"].endswith("gpu:8") and shown["Requeue"] == "1"
    return {"measured": measured, "holds": nodes and asked and measured["signal"]}


EVIL = ["a b", "a'b", 'a"b', "a\nb", "a;touch canary", "$(touch canary)", "`touch canary`", "x\n#SBATCH --wrap=x"]


def hostile(work: Path) -> dict:
    """Hostile partition, account, path and class names: refused, or quoted through a whole job."""
    cluster = slurm(work)
    data = demo_videos(work / "clone-data", 64, 24)
    arena = work / "hostile"
    arena.mkdir(exist_ok=True)
    exp = small_experiment(arena / 'it\'s $(touch canary); `touch canary` "q" é', data, steps=2, val_freq=2)
    names = exp / "classes $(touch canary).txt"
    evil = ["a b", "a'b", 'a"b', "a;touch canary", "$(touch canary)", "`touch canary`", "<b>", "é"]
    names.write_text("\n".join(evil) + "\n")
    sets = ["--set", f"common.data.class_names={names}", "--set", "common.lr_scheduler.warmup_steps=1"]
    refused = sum(cluster.launch("train", exp, word, "2", check=False).returncode == 2 for word in EVIL)
    for flag in ("--account", "--qos", "--constraint", "--nodelist", "--exclude", "--dependency", "--time"):
        for word in EVIL:
            refused += cluster.launch("train", exp, PARTITION, "2", flag, word, check=False).returncode == 2
    broken = small_experiment(arena / "new\ntouch canary\n", data)
    refused += cluster.launch("train", broken, PARTITION, "2", check=False).returncode == 2
    states = []
    for verb, words in (("train", sets), ("eval", sets)):
        job = cluster.submit(verb, exp, 2, *words)
        states.append(cluster.wait_for_end(job, exp)["JobState"])
    command("main.py", "analyze", exp)
    canaries = [str(path) for place in (arena, ROOT) for path in place.rglob("canary") if ".venv" not in path.parts]
    measured = {"refused": refused, "of": 8 * len(EVIL) + 1, "quoted": states, "canaries": canaries}
    return {"measured": measured, "holds": refused == measured["of"] and states == ["COMPLETED"] * 2 and not canaries}


ROWS = {
    "clone": (
        "train.sh VI_SP_VA_1080TI 4, 2 nodes x 2, from a clean clone",
        "sha256 as local 4",
        skipped(lambda: from_a_clone(workspace())),
    ),
    "events": (
        "preempted (both signal styles), time limit, node killed, rank killed -9, requeued by hand",
        "sha256 of weights, BN, momentum, loss log as undisturbed; restarts counted; each <= 90 s",
        skipped(lambda: disturbed(workspace())),
    ),
    "eval": (
        "eval.sh VI_SP_VA_1080TI 4, preempted once",
        "each once, local 1 within 1e-5",
        skipped(lambda: preempted_evaluation(workspace())),
    ),
    "shape": (
        "32-task request",
        "4 nodes x 8 tasks, GPUs, requeue on, signal set",
        skipped(lambda: shape_of_32(workspace())),
    ),
    "hostile": (
        "hostile partition, account, class name, path",
        "refused or quoted; no canary",
        skipped(lambda: hostile(workspace())),
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
