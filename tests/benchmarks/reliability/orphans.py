"""Kill one process of a run with SIGKILL, and look for any process of the run 10 seconds later."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.experiments import demo_videos, small_experiment
from tests.benchmarks.reliability.marked import Mark, wait_for
from utils import processes

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 10.0
SETS = ("common.model.backbone=mobilenetv2", "common.workers=2")
Case = tuple[str, int, str, str]  # verb, ranks, victim, moment

CASES: list[Case] = [
    *(
        ("train", ranks, victim, moment)
        for ranks in (2, 3)
        for victim in ("launcher", "torchrun", "rank")
        for moment in ("start", "running")
    ),
    ("train", 2, "torchrun, launcher frozen", "running"),
    ("train", 1, "rank", "running"),
    *(("eval", 2, victim, "running") for victim in ("launcher", "torchrun", "rank")),
    ("predict", 0, "launcher", "running"),
    ("scan", 0, "launcher", "running"),
    ("dump", 0, "launcher", "running"),
    ("demo-data", 0, "launcher", "running"),
]


class Trial:
    """One start of one case."""

    def __init__(self, work: Path, data: Path, case: Case, chance: random.Random) -> None:
        self.work, self.data, self.chance = work, data, chance
        self.verb, self.ranks, self.victim, self.moment = case
        self.mark = Mark()

    def result(self) -> dict:
        """Start, kill, look. `hit` is False where the run had ended before the kill."""
        out = self.work / "out.txt"
        with out.open("wb") as stream:
            env = os.environ | self.mark.env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            launcher = subprocess.Popen(self._words(), cwd=ROOT, env=env, stdout=stream, stderr=stream)
        try:
            self._await_moment(launcher)
            processes = len(self.mark.processes())
            victim = self._victim_of(launcher.pid)
            frozen = "frozen" in self.victim
            if frozen:
                os.kill(launcher.pid, signal.SIGSTOP)
            hit = launcher.poll() is None and victim is not None
            if hit and victim is not None:
                os.kill(victim, signal.SIGKILL)
            seconds = self.mark.seconds_until_gone(LIMIT, {launcher.pid} if frozen else frozenset())
            left = [] if seconds is not None else sorted(self.mark.processes().values())
        finally:
            self.mark.kill()
            launcher.kill()
            launcher.wait()
        case = f"{self.verb}, {self.ranks} ranks, {self.victim}, {self.moment}"
        return {
            "case": case,
            "hit": hit,
            "processes": processes,
            "seconds": seconds and round(seconds, 1),
            "left": left,
        }

    def _words(self) -> list[str | Path]:
        lists, folder = self.data / "lists", self.work
        if self.verb == "demo-data":
            return [
                sys.executable,
                "main.py",
                "demo-data",
                "--out",
                folder / "demo",
                "--train",
                "4000",
                "--workers",
                "2",
            ]
        if self.verb == "predict":
            weights = trained(folder.parent / "trained", self.data)
            many = [
                folder / f"copy-{number}" for number in range(40)
            ]  # the same video under another name is read again
            for copy in many:
                copy.symlink_to(self.data / "videos")
            return [sys.executable, "main.py", "predict", weights, *many, "--out", folder / "out"]
        if self.verb in ("scan", "dump"):
            many = folder / "many.txt"
            many.write_text((lists / "train.txt").read_text() * (1 if self.verb == "dump" else 300))
            scan: list[str | Path] = [sys.executable, "main.py", "scan", many, "--root", self.data]
            dump: list[str | Path] = [sys.executable, "main.py", "dump", "--as", "clips", "--root", self.data, many]
            return [*(scan if self.verb == "scan" else [*dump, folder / "dump"]), "--workers", "2"]
        exp = small_experiment(folder / "exp", self.data, steps=100000, val_freq=100000, print_freq=1)
        words: list[str | Path] = [sys.executable, "-m", "launch", self.verb, exp, "local", str(self.ranks)]
        if self.verb == "eval":
            many = folder / "many.txt"
            many.write_text((lists / "val.txt").read_text() * 300)
            weights = trained(folder.parent / "trained", self.data)
            words += ["--checkpoint", weights, "--list", many, "--root", self.data]
        return [*words, *(word for text in SETS for word in ("--set", text))]

    def _await_moment(self, launcher: subprocess.Popen[bytes]) -> None:
        def readers() -> int:
            commands = self.mark.processes().values()
            return sum("datasets.loading.workers" in words or "spawn_main" in words for words in commands)

        if self.moment == "start":
            time.sleep(self.chance.uniform(0.0, 8.0))
            return
        wait_for(lambda: readers() >= max(1, self.ranks) or launcher.poll() is not None, 120)
        time.sleep(self.chance.uniform(0.0, 4.0))

    def _victim_of(self, launcher: int) -> int | None:
        if self.victim == "launcher" or self.ranks <= 1:
            return launcher
        torchrun = [pid for pid in processes.children(launcher) if pid in self.mark.processes()]
        if self.victim.startswith("torchrun") and torchrun:
            return torchrun[0]
        ranks = processes.children(torchrun[0]) if torchrun else []
        # Before there is such a process, a kill of what would have started it is the nearest case.
        return self.chance.choice(ranks) if ranks else torchrun[0] if torchrun else launcher


def trained(folder: Path, data: Path) -> Path:
    """Train a model for two iterations, once, for the evaluations."""
    weights = folder / "ckpt.pth.tar"
    if not weights.exists():
        exp = small_experiment(folder, data, steps=6, val_freq=6)
        sets = [word for text in SETS for word in ("--set", text)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "main.py", "train", str(exp), *sets]
        subprocess.run(words, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    return weights


def row(cases: Sequence[Case] = CASES) -> dict:
    """Run each case at a moment drawn from $ZOETROPE_SEED; misses are drawn again, at most three times."""
    seed = int(os.environ.get("ZOETROPE_SEED") or time.time())
    print(f"orphans: seed={seed}", file=sys.stderr, flush=True)
    chance, results = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="zoetrope-orphans-") as folder:
        data = demo_videos(Path(folder) / "data", 64, 24)
        for number, case in enumerate(cases):
            for attempt in range(3):
                work = Path(folder) / f"{number}-{attempt}"
                work.mkdir()
                result = Trial(work, data, case, chance).result()
                print(f"orphans: {json.dumps(result)}", file=sys.stderr, flush=True)
                if result["hit"]:
                    results.append(result)
                    break
    gone = sum(result["seconds"] is not None for result in results)
    times = [result["seconds"] for result in results if result["seconds"] is not None]
    measured = {"seed": seed, "gone": gone, "of": len(results), "longest_seconds": max(times, default=None)}
    measured |= {"left": [result for result in results if result["left"]]}
    return {"measured": measured, "holds": gone == len(results) == len(cases) >= 20}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(row()))
