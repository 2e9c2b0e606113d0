"""Disturb training runs at drawn moments, continue them, and compare every bit with an undisturbed twin.

    make soak MINUTES=10 RANKS=1,2,3,4,6
    python -m tests.benchmarks.reliability.soak --minutes 10 --ranks 3,4 --seed 7

Number of ranks, settings and disturbances are drawn from a seed, which is printed. A disturbance is drawn before the
start that it is meant for: a phase, a named point in it, which arrival there, which rank, and what happens (SIGKILL,
SIGTERM, SIGINT, SIGUSR2 to one rank or to all, a freeze, SIGKILL to a reader process). One that never comes about is
not counted. One JSON line a run and a summary at the end; exit code 1 if anything differs, hangs or leaves a trace.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.reliability import disturbed
from tests.benchmarks.reliability.disturbed import Event
from tests.recipe import RECIPE

PHASES = ("step", "checkpoint", "validation", "precise_bn", "start")
# phase: (point, highest arrival that is drawn, whether rank 0 alone comes there)
POINTS: dict[str, list[tuple[str, int, bool]]] = {
    "step": [("phase.data", 6, False), ("phase.forward/backward", 6, False), ("phase.optimiser step", 6, False)],
    "checkpoint": [
        ("phase.writing ckpt.pth.tar", 3, False),
        ("phase.writing ckpt_best.pth.tar", 1, False),
        ("checkpoint.tmp", 3, True),
        ("checkpoint.linked", 3, True),
        ("checkpoint.replace", 3, True),
        ("checkpoint.done", 3, True),
    ],
    "validation": [("phase.validation", 2, False), ("progress.validation", 4, False)],
    "precise_bn": [("phase.precise batch norm", 2, False), ("progress.precise batch norm", 4, False)],
    "start": [
        ("start.joined", 1, False),
        ("run_dir.locked", 1, True),
        ("start.built", 1, False),
        ("phase.start", 1, False),
    ],
}
ACTIONS = {"kill": 5, "term": 2, "int": 1, "usr2": 1, "stop": 2, "reader": 4}
RUNS_A_TWIN, EVENTS_A_RUN = 3, 3
ENOUGH = 10  # hits in each phase


def draw_settings(chance: random.Random, ranks: int, teacher: Path) -> dict[str, Any]:
    """Draw the config of a run: dotted keys of `common`."""
    total = ranks * chance.choice((1, 1, 2))
    fitting = [n for n in range(1, total + 1) if total % n == 0 and (ranks % n == 0 or n % ranks == 0)]
    settings: dict[str, Any] = {
        "shards": total,
        "model.kwargs.bn_group_size": chance.choice(fitting),
        "model.kwargs.bn_sync_stats": chance.random() < 0.5,
        "precision": chance.choice(("fp32", "fp32", "bf16", "fp16", "fp64")),
        "workers": chance.choice((0, 1)),
        "save_minutes": chance.choice((1e-9, 10.0)),  # after every step; at validations only
        "data.order": chance.choice(("shuffled", "class_balanced")),
        "seed": chance.randrange(1000),
    }
    if chance.random() < 0.8:
        settings["precise_bn.batches"] = 2
    if chance.random() < 0.5:
        settings["ema"] = 0.9
    if chance.random() < 0.4:
        settings["clip_grad"] = 0.5
    if chance.random() < 0.4:
        settings["augmentation.mix_up"] = 0.2
    if chance.random() < 0.3:
        settings["augmentation.random_erasing"] = [0.5, 0.02, 0.4, 0.3]
    if chance.random() < 0.4:
        settings |= draw_recipe(chance)
    second = chance.choice((None, None, "kd", "dml"))
    if second == "dml" and settings.get("optimizer.layer_decay"):
        second = None  # the teacher's network has no blocks
    if second:
        settings |= {"distill.teacher": str(teacher), "distill.kind": second}
    return settings


def draw_recipe(chance: random.Random) -> dict[str, Any]:
    """Draw settings of video transformers: all of the recipe, or some of its parts on the soak's own network."""
    settings = RECIPE | {"model.kwargs.freeze": chance.choice((0, 1))}
    if chance.random() < 0.5:
        settings = {key: value for key, value in settings.items() if not key.startswith("model.")}
        settings["optimizer.layer_decay"] = None  # that network has no blocks
    elif chance.random() < 0.5:
        settings["optimizer.layer_decay"] = None
    return settings


def draw_event(chance: random.Random, phase: str, ranks: int, *, readers: bool) -> Event:
    """Draw what happens in one start, in a given phase."""
    point, last, main_only = chance.choice(POINTS[phase])
    actions = {name: weight for name, weight in ACTIONS.items() if name != "reader" or (readers and phase != "start")}
    action = chance.choices(list(actions), list(actions.values()))[0]
    everyone = action in ("term", "usr2") and chance.random() < 0.5
    return Event(phase, point, 0 if main_only else chance.randrange(ranks), chance.randint(1, last), action, everyone)


class Soak:
    """Runs and counts. `folder` receives data, experiments and what is left of runs that differ."""

    def __init__(self, folder: Path, seed: int, ranks: Sequence[int]) -> None:
        self.folder, self.chance, self.ranks = folder, random.Random(seed), ranks
        self.seed, self.twins, self.runs = seed, 0, 0
        self.hits: Counter[str] = Counter()  # by phase
        self.kinds: Counter[str] = Counter()  # by action
        self.missed = 0
        self.faults: list[dict[str, Any]] = []
        self.teacher = folder / "teacher"

    def train_teacher(self) -> None:
        """Make the experiment that distillation learns from."""
        disturbed.write_experiment(self.teacher, self.folder / "data", {"lr_scheduler.max_iter": 4})
        if not disturbed.run_ranks(self.teacher, 1).is_finished:
            raise RuntimeError(f"the teacher did not train: {(self.folder / 'teacher.out').read_text()[-2000:]}")

    def until(self, end: float, hits: int) -> None:
        """Go on until the time is over, or there are so many hits and `ENOUGH` in each phase."""

        def is_over() -> bool:
            enough = sum(self.hits.values()) >= hits and all(self.hits[phase] >= ENOUGH for phase in PHASES)
            return time.monotonic() > end or bool(hits and enough)

        while not is_over():
            ranks = self.chance.choice(self.ranks)
            settings = draw_settings(self.chance, ranks, self.teacher)
            self.twins += 1
            twin = self.folder / f"twin{self.twins}"
            expected = self.undisturbed(twin, ranks, settings)
            for _ in range(RUNS_A_TWIN):
                if expected is not None and not is_over():
                    self.disturb(ranks, settings, self._events(ranks, settings), expected)
            shutil.rmtree(twin)

    def _events(self, ranks: int, settings: dict[str, Any]) -> list[Event]:
        """Events for the starts of one run, most of them in the phases that have the fewest hits so far."""
        possible = [phase for phase in PHASES if phase != "precise_bn" or "precise_bn.batches" in settings]
        weights = [1 / (1 + self.hits[phase]) for phase in possible]
        phases = self.chance.choices(possible, weights, k=EVENTS_A_RUN)
        return [draw_event(self.chance, phase, ranks, readers=settings["workers"] > 0) for phase in phases]

    def undisturbed(self, exp: Path, ranks: int, settings: dict[str, Any]) -> dict[str, str] | None:
        """Train the twin; its hashes, None if it did not finish."""
        disturbed.write_experiment(exp, self.folder / "data", settings)
        start = disturbed.run_ranks(exp, ranks)
        if start.is_finished:
            return disturbed.outcome(exp)
        self._fault("the undisturbed run did not finish", ranks, settings, [], start)
        return None

    def disturb(self, ranks: int, settings: dict[str, Any], events: list[Event], expected: dict[str, str]) -> bool:
        """Train with one event in each start, then to the end; true if every bit is as expected."""
        self.runs += 1
        exp = disturbed.write_experiment(self.folder / f"run{self.runs}", self.folder / "data", settings)
        with disturbed.kept_only_if_different(exp) as different:
            hit = self._to_the_end(exp, ranks, settings, events, different)
            if not different:
                outcome = disturbed.outcome(exp)
                different += [name for name in outcome | expected if outcome.get(name) != expected.get(name)]
                if different:
                    self._fault(f"other bits in {', '.join(different)}", ranks, settings, hit, None)
        for event in hit:
            self.hits[event.phase] += 1
            self.kinds[event.action] += 1
        self.missed += len(events) - len(hit)
        line = {"run": self.runs, "ranks": ranks, "equal": not different}
        line |= {"hits": [f"{e.point}:{e.rank}:{e.count}:{e.action}" for e in hit], "settings": settings}
        print(json.dumps(line), flush=True)
        return not different

    def _to_the_end(
        self, exp: Path, ranks: int, settings: dict[str, Any], events: list[Event], different: list[str]
    ) -> list[Event]:
        """Start after start; the events that came about. What went wrong is added to `different`."""
        hit: list[Event] = []
        for event in [*events, None]:
            start = disturbed.run_ranks(exp, ranks, event)
            if event and start.hit:
                hit.append(event)
            wrong = _wrong(start, event)
            if wrong:
                different.append(wrong)
                self._fault(wrong, ranks, settings, [*hit, *([event] if event and not start.hit else [])], start)
                break
            if start.is_finished:
                break
        return hit

    def _fault(
        self, what: str, ranks: int, settings: dict[str, Any], hit: list[Event], start: disturbed.Start | None
    ) -> None:
        fault: dict[str, Any] = {"what": what, "ranks": ranks, "settings": settings}
        fault["events"] = [dataclasses.asdict(event) for event in hit]
        if start:
            fault |= {"codes": start.codes, "output": start.output[-3000:]}
        self.faults.append(fault)
        print(json.dumps({"fault": fault}), flush=True)

    def summary(self) -> dict[str, Any]:
        """What the programme found."""
        hits = {phase: self.hits[phase] for phase in PHASES}
        return {
            "seed": self.seed,
            "hits": sum(hits.values()),
            "by_phase": hits,
            "by_action": dict(self.kinds),
            "missed": self.missed,
            "runs": self.runs,
            "twins": self.twins,
            "faults": len(self.faults),
        }


def _wrong(start: disturbed.Start, event: Event | None) -> str:
    """What a start may not do: hang, end without need, leave a trace or an exit code that says nothing true."""
    if start.hung:
        return "ranks were left that did not end by themselves"
    if "Traceback" in start.output:
        return "a trace was printed"
    codes = set(start.codes.values())
    if not (event and start.hit):
        return "" if codes == {0} else f"exit codes {start.codes} without a disturbance"
    if event.action in ("stop", "reader"):
        return "" if codes == {0} else f"exit codes {start.codes} after a {event.action}"
    if event.action == "kill":
        died = start.codes[event.rank] == -9 and codes <= {-9, 0, disturbed.STOPPED, disturbed.LOST}
        return "" if died else f"exit codes {start.codes} after a kill"
    return "" if codes <= _CODES_OF_A_STOP[event.phase == "start"] else f"exit codes {start.codes} after a signal"


# Before the first step nothing handles a signal, for there is nothing to save; after the last one 0 is right.
_CODES_OF_A_STOP = {False: {0, disturbed.STOPPED}, True: {0, disturbed.STOPPED, disturbed.LOST, 130, -2, -12, -15}}


def inside(folder: Path, seed: int, ranks: Sequence[int], minutes: float, hits: int, plan: Path | None) -> int:
    """Run in the copy of the code; see `main`."""
    disturbed.warm_up()
    soak = Soak(folder, seed, ranks)
    cases = json.loads(plan.read_text(encoding="utf-8")) if plan else []
    if not plan or any("distill.kind" in case["settings"] for case in cases):
        soak.train_teacher()
    if plan:
        for case in cases:
            if "distill.kind" in case["settings"]:
                case["settings"]["distill.teacher"] = str(soak.teacher)
            soak.twins += 1
            twin = soak.folder / f"twin{soak.twins}"
            expected = soak.undisturbed(twin, case["ranks"], case["settings"])
            if expected is not None:
                soak.disturb(case["ranks"], case["settings"], [Event(**event) for event in case["events"]], expected)
    else:
        soak.until(time.monotonic() + 60 * minutes, hits)
    print(json.dumps({"summary": soak.summary()}), flush=True)
    return 1 if soak.faults else 0


def run(
    ranks: Sequence[int], minutes: float = 60.0, hits: int = 0, *, seed: int = 0, plan: list[dict] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the programme in a process of its own.

    Args:
        ranks: numbers of ranks to draw from.
        minutes: at most so long.
        hits: end earlier when so many disturbances hit, `ENOUGH` in each phase; 0: use the whole time.
        seed: of everything that is drawn.
        plan: cases (`ranks`, `settings`, `events`) to run instead of drawn ones.

    Returns:
        The lines of the runs and faults, and the summary.
    """
    folder = Path(tempfile.mkdtemp(prefix="zoetrope-soak-"))
    code = disturbed.copy_code(folder / "code")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ZOETROPE_", "MASTER_"))}
    env |= {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    data = ["main.py", "demo-data", "--out", str(folder / "data"), "--train", "24", "--val", "9", "--workers", "1"]
    subprocess.run([sys.executable, *data], cwd=code, env=env, check=True, stdout=subprocess.DEVNULL)
    argv = ["-m", "tests.benchmarks.reliability.soak", "--inside", str(folder), "--seed", str(seed)]
    argv += ["--minutes", str(minutes), "--hits", str(hits), "--ranks", ",".join(map(str, ranks))]
    if plan:
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        argv += ["--plan", str(folder / "plan.json")]
    lines = []
    with subprocess.Popen([sys.executable, *argv], cwd=code, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            lines.append(json.loads(text))
            print(text, end="", file=sys.stderr, flush=True)
    if not lines or "summary" not in lines[-1]:
        raise RuntimeError(f"the soak programme left with {process.returncode}; see above and {folder}")
    summary = lines.pop()["summary"]
    if summary["faults"]:
        print(f"what differs is in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return lines, summary


def main(argv: Sequence[str]) -> int:
    """Run the programme and print its summary."""
    parser = argparse.ArgumentParser(prog="soak", description="Disturb training runs and compare every bit.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--hits", type=int, default=0, help="end earlier at so many hits, 10 in each phase")
    parser.add_argument("--ranks", default="1,2,3,4,6", help="numbers of ranks to draw from")
    parser.add_argument("--seed", type=int, help="default: $ZOETROPE_SEED, else a drawn one")
    parser.add_argument("--plan", type=Path, help="JSON file of cases to run instead: what a fault line shows")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    ranks = [int(word) for word in args.ranks.split(",")]
    if args.inside:
        return inside(args.inside, args.seed, ranks, args.minutes, args.hits, args.plan)
    seed = args.seed if args.seed is not None else drawn_seed()
    plan = json.loads(args.plan.read_text(encoding="utf-8")) if args.plan else None
    _, summary = run(ranks, args.minutes, args.hits, seed=seed, plan=plan)
    print(json.dumps(summary))
    return 1 if summary["faults"] else 0


def drawn_seed() -> int:
    """$ZOETROPE_SEED, else a new one."""
    return int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(2**31))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
