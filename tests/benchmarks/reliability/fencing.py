"""Row `fencing`: a writer frozen inside a save wakes up after its successor has finished the run.

Each case: a run is frozen (SIGSTOP) at one of six points of a save, its lock is aged as a silent machine's would be, a
successor on "another machine" takes the folder and trains to the end, then the first one wakes up. It must leave with
an error, and readers must find the successor's state: the bits of a run that nothing disturbed.

In the *late* cases the temporary files are out of the successor's sight while it starts, as a directory cache of a
network file system may hide them: then the renames of the woken process do happen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import main
from datasets.demo import verb as demo
from tests import users
from tests.experiment import few_videos, make
from utils import checkpoint, checkpoint_names, log

POINTS = ("begin", "tmp", "linked", "checked", "replace", "done")
SAVES = {1: "the first latest", 2: "the first best", 3: "a later latest"}
LATE = [("checked", 1), ("checked", 2), ("checked", 3), ("replace", 3), ("linked", 2), ("tmp", 3)]
CASES = [(point, save, False) for point in POINTS for save in SAVES] + [(*case, True) for case in LATE]
LAST = 6
_TRIED_SEEDS = 12


class Bench:
    """A small experiment and what it ends with when nothing disturbs it.

    Args:
        root: an empty folder.
        seed: of the experiment; the first one from here on is taken whose best checkpoint is not its first.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.data = root, root / "data"
        users.run(root / "data.out", lambda: demo.main(_demo_words(self.data)))
        for self.seed in range(seed, seed + _TRIED_SEEDS):
            calm = self.experiment(f"calm-{self.seed}")
            assert self.train(calm) == 0, (root / "calm.out").read_text()
            self.expected = contents(calm)
            if checkpoint.load(calm / checkpoint.BEST)["step"] > 2:  # a later start has a best of its own to lose
                return
        raise RuntimeError(f"no seed from {seed} on gives a best checkpoint after the first validation")

    def experiment(self, name: str) -> Path:
        """Make a new folder of the experiment."""
        return make(self.root / name, self.data, steps=LAST, val_freq=2)

    def words(self, exp: Path) -> list[str]:
        """Return the command line that trains a folder."""
        return ["train", str(exp), "--set", few_videos(exp, self.data, 8), "--set", f"common.seed={self.seed}"]

    def train(self, exp: Path) -> int:
        """Train in a child process; returns its exit code."""
        return users.run(self.root / f"{exp.name}.out", lambda: main.main(self.words(exp)))


def _demo_words(data: Path) -> list[str]:
    return ["--out", str(data), "--train", "48", "--val", "24", "--workers", "1"]


def contents(exp: Path) -> dict[str, str]:
    """Return what readers find: sha256 over weights and momentum of the latest and the best state, and the curve."""
    digests = {}
    for name in (checkpoint.LATEST, checkpoint.BEST):
        path = checkpoint.newest(exp, name)
        assert path is not None
        state = checkpoint.load(path)
        digest = hashlib.sha256(json.dumps([state["step"], state["validated_step"], state["best_metric"]]).encode())
        for key, tensor in sorted(state["model"].items()):
            digest.update(key.encode() + tensor.numpy().tobytes())
        for key, values in sorted(state["optimizer"]["state"].items()):
            digest.update(str(key).encode() + values["momentum_buffer"].numpy().tobytes())
        digests[name] = digest.hexdigest()
    curve = log.read_scalars(exp / "events" / log.SCALARS)
    digests["curves"] = hashlib.sha256(json.dumps(curve, sort_keys=True).encode()).hexdigest()
    return digests


def on_another_machine(words: list[str]) -> int:
    """Train as a process of another host would: no process table in common with the frozen one."""
    import socket

    from utils import processes

    socket.gethostname = lambda: "node8"
    processes.machine = lambda: "node8 another boot"
    return main.main(words)


@contextlib.contextmanager
def out_of_sight(exp: Path) -> Iterator[None]:
    """Hide temporary files for the duration of the block."""
    hidden = {path: path.with_name(f"hidden-{path.name}") for path in exp.glob("ckpt*.tmp-*")}
    for path, other in hidden.items():
        path.rename(other)
    try:
        yield
    finally:
        for path, other in hidden.items():
            other.rename(path)


def is_hidden(exp: Path) -> bool:
    """Report whether a plain name stands for an older state than readers find: a late rename has happened."""
    return any(checkpoint.newest(exp, name) != exp / name for name in (checkpoint.LATEST, checkpoint.BEST))


def one_case(bench: Bench, point: str, save: int, late: bool) -> tuple[list[str], bool]:
    """Play one case; returns what is wrong, nothing if it held, and whether a late rename happened."""
    exp = bench.experiment(f"{point}-{save}-{'late' if late else 'seen'}")
    output = bench.root / f"{exp.name}.out"
    words = bench.words(exp)
    frozen = users.start(output, lambda: main.main(words), ZOETROPE_FAILPOINT=f"checkpoint.{point}:0:{save}:stop")
    try:
        _, status = os.waitpid(frozen, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return [f"it was not frozen at {point} (status {status})"], False
        old = time.time() - 1000
        os.utime(exp / "jobs/lock.json", (old, old))
        with out_of_sight(exp) if late else contextlib.nullcontext():
            successor = users.run(output, lambda: on_another_machine(words))
        before = contents(exp)
        os.kill(frozen, signal.SIGCONT)
        _, status = os.waitpid(frozen, 0)
        writer = os.waitstatus_to_exitcode(status)
    except BaseException:
        os.kill(frozen, signal.SIGKILL)
        raise
    after = contents(exp)
    wrong = [f"the successor left with {successor}"] if successor else []
    wrong += [f"the writer left with {writer}"] if writer != 2 else []
    wrong += [f"{key}: before the writer woke up" for key in bench.expected if before[key] != bench.expected[key]]
    wrong += [f"{key}: after the writer woke up" for key in bench.expected if after[key] != bench.expected[key]]
    hidden = is_hidden(exp)
    wrong += next_start(bench, exp)
    if wrong:
        print(f"{exp.name}: {wrong}\n{output.read_text()}", file=sys.stderr)
    return wrong, hidden


def next_start(bench: Bench, exp: Path) -> list[str]:
    """Start the finished run once more: it must find the newest state and leave the three plain names, put right."""
    before = bench.expected
    if (code := bench.train(exp)) != 0:
        return [f"the next start left with {code}"]
    wrong = [f"{key}: after the next start" for key, value in contents(exp).items() if value != before[key]]
    left = [path.name for path in [*checkpoint_names.kept(exp), *(exp / "jobs").iterdir()]]
    return wrong + ([f"left behind: {left}"] if left else [])


def row(cases: list[tuple[str, int, bool]] | None = None) -> dict:
    """Play all cases; returns how many held."""
    torch.set_num_threads(1)
    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(1 << 20))
    chosen = CASES if cases is None else cases
    root = Path(tempfile.mkdtemp(prefix="zoetrope-fencing-"))
    try:
        bench = Bench(root, seed)
        wrong = {f"{p}:{s}:{'late' if late else 'seen'}": one_case(bench, p, s, late) for p, s, late in chosen}
    finally:
        shutil.rmtree(root)
    bad = {name: what for name, (what, _) in wrong.items() if what}
    late_renames = sum(hidden for _, hidden in wrong.values())
    measured = {"held": len(wrong) - len(bad), "cases": len(wrong), "late_renames": late_renames, "wrong": bad}
    return {"seed": seed, "measured": measured, "holds": not bad and (late_renames >= 3 or cases is not None)}


if __name__ == "__main__":
    print(json.dumps(row()))
