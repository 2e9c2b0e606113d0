"""Disturb a run on SLURM, 2 nodes with 2 ranks each, and compare it bit for bit with an undisturbed run.

The SLURM is a real one of several nodes on this machine (tests/slurm/cluster.py). Where it cannot start, the row is
skipped. Among the events are three lost nodes: slurmd is killed with all that it started, and SLURM requeues the job.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.cluster import slurm
from tests.benchmarks.experiments import demo_videos, logged_losses, small_experiment
from tests.benchmarks.reliability.marked import VARIABLE, Mark, wait_for
from tests.benchmarks.rows import train
from tests.slurm.cluster import LocalSlurm, NoSlurm, until

ROOT = Path(__file__).resolve().parents[3]
RANKS = 4
EVENTS = ["node_killed"] * 3 + ["preempted"] * 2 + ["rank_killed"] * 2
EVENTS += ["signalled", "requeued_by_hand", "step_daemon_killed", "srun_killed"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
STEPS = int(os.environ.get("ZOETROPE_STEPS") or 240)


class Rough(slurm.Rough):
    """A run with 4 ranks and further events. All its processes carry a mark."""

    def __init__(self, cluster: LocalSlurm, exp: Path, chance: random.Random) -> None:
        super().__init__(cluster, exp, chance)
        self.mark = Mark()
        cluster.env |= self.mark.env
        self.gone: dict[str, float | None] = {}  # event -> seconds until no process of the run was left

    def start(self) -> None:
        """Submit the job and wait for its first iteration."""
        self.job = self.cluster.submit("train", self.exp, RANKS)
        self.wait_until_it_trains(0)

    def event(self, name: str) -> None:
        """Cause an event at a drawn moment. If it ends the job, requeue the job by hand, as a user would."""
        time.sleep(self.chance.uniform(0.5, 4.0))
        starts, at = self.starts(), self.iteration()
        began = time.monotonic()
        getattr(self, name)()
        until(lambda: self.starts() > starts or self._state() in ENDED, 240, lambda: self.cluster.output(self.exp))
        state = self._state()
        if state == "COMPLETED":
            raise RuntimeError(f"the run ended after {len(self.events)} events: give it more steps ($ZOETROPE_STEPS)")
        by_hand = self.starts() == starts
        if by_hand:
            self.cluster.launch("requeue", self.exp)
        self.wait_until_it_trains(starts)
        seconds = round(time.monotonic() - began, 1)
        self.events.append({"event": name, "at": at, "seconds": seconds, "state": state, "requeued_by_hand": by_hand})
        print(f"slurm_events: {json.dumps(self.events[-1])} gone={self.gone}", file=sys.stderr, flush=True)

    def signalled(self) -> None:
        """SLURM sends the signal that announces the time limit."""
        self.cluster.run("scancel", "--signal=USR2", self.job)

    def rank_killed(self) -> None:
        """kill -9 of one rank."""
        self._kill("rank", [pid for pid in self.mark.processes() if self._is_rank(str(pid))])

    def step_daemon_killed(self) -> None:
        """kill -9 of the slurmstepd of one node's step: the parent of two ranks."""
        ranks = [pid for pid in self.mark.processes() if self._is_rank(str(pid))]
        self._kill("slurmstepd", [_parent(pid) for pid in ranks])

    def srun_killed(self) -> None:
        """kill -9 of the srun that has started the ranks."""
        processes = self.mark.processes().items()
        steps = [pid for pid, words in processes if words.startswith("srun ") and "_submit" in words]
        self._kill("srun", [pid for pid in steps if _parent(pid) not in steps])  # its own child is a helper

    def _kill(self, name: str, victims: list[int]) -> None:
        """Kill one of them; measure how long processes that were there live on."""
        before = set(self.mark.processes())
        victim = self.chance.choice(victims)
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        gone = wait_for(lambda: not before & set(self.mark.processes()), 60)
        seconds = round(time.monotonic() - began, 1) if gone else None
        earlier = self.gone.get(name, 0.0)
        self.gone[name] = None if seconds is None or earlier is None else max(seconds, earlier)

    def _state(self) -> str:
        return self.cluster.job(self.job)["JobState"]


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def fingerprint(exp: Path) -> dict[str, str]:
    """Return sha256 of weights with buffers, momentum, moving average, best checkpoint and loss curve."""
    import torch

    def digest(tensors: dict[str, Any]) -> str:
        total = hashlib.sha256()
        for key, tensor in sorted(tensors.items()):
            total.update(key.encode() + tensor.contiguous().numpy().tobytes())
        return total.hexdigest()

    latest, best = (torch.load(exp / name, weights_only=True) for name in ("ckpt.pth.tar", "ckpt_best.pth.tar"))
    momentum = {str(key): values["momentum_buffer"] for key, values in latest["optimizer"]["state"].items()}
    curve = json.dumps([sorted(logged_losses(exp).items()), latest["best_metric"], best["step"]])
    digests = {"weights": digest(latest["model"]), "momentum": digest(momentum), "ema": digest(latest["ema"])}
    return digests | {"best": digest(best["model"]), "curve": hashlib.sha256(curve.encode()).hexdigest()}


def row(names: list[str] | None = None) -> dict:
    """Measure the events in an order drawn from $ZOETROPE_SEED; ZOETROPE_EVENTS=a,b measures some of them."""
    seed = int(os.environ.get("ZOETROPE_SEED") or time.time())
    print(f"slurm_events: seed={seed}", file=sys.stderr, flush=True)
    chosen = os.environ.get("ZOETROPE_EVENTS")
    events = names or (chosen.split(",") if chosen else list(EVENTS))
    with tempfile.TemporaryDirectory(prefix="zoetrope-slurm-events-") as folder:
        try:
            return _measure(Path(folder), events, seed)
        except NoSlurm as reason:
            return {"measured": f"skipped, no SLURM here: {reason}", "holds": True, "skipped": True}


def _measure(work: Path, events: list[str], seed: int) -> dict:
    chance = random.Random(seed)
    chance.shuffle(events)
    cluster = slurm.slurm(work, gpus_per_node=2)
    data = demo_videos(work / "data", 64, 24)
    settings = {"steps": STEPS, "val_freq": STEPS // 4, "print_freq": 1}
    extra = "    save_minutes: 0.02\n    ema: 0.9\n"
    rough = Rough(cluster, small_experiment(work / "rough", data, extra, **settings), chance)
    try:
        rough.start()
        for event in events:
            rough.event(event)
        state = cluster.wait_for_end(rough.job, rough.exp, 600)["JobState"]
    except (AssertionError, RuntimeError, subprocess.SubprocessError):
        print(cluster.output(rough.exp), file=sys.stderr)
        raise
    finally:
        cluster.run("scancel", rough.job, check=False)
        cluster.close()
        os.environ.pop(VARIABLE, None)
    calm = small_experiment(work / "calm", data, extra, **settings)
    train(calm, RANKS)
    marks = {"calm": fingerprint(calm), "rough": fingerprint(rough.exp)}
    equal = [name for name in marks["calm"] if marks["calm"][name] == marks["rough"][name]]
    measured = {"seed": seed, "state": state, "equal": equal, "events": rough.events, "gone_after_seconds": rough.gone}
    lost = sum(event["event"] == "node_killed" for event in rough.events)
    alone = all(not event["requeued_by_hand"] for event in rough.events if event["event"] == "node_killed")
    gone = all(seconds is not None and seconds <= 10 for seconds in rough.gone.values())
    holds = len(equal) == len(marks["calm"]) and state == "COMPLETED" and alone and gone
    return {"measured": measured, "holds": holds and len(rough.events) >= 10 and lost >= 3}


if __name__ == "__main__":
    print(json.dumps(row()))
