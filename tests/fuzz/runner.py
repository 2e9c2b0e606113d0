"""Feed damaged copies of valid inputs to the parsers, and count what breaks.

A target is a file `tests/fuzz/NAME.py` with these names:

| name | meaning |
|---|---|
| `NAME: str` | name of the target, equal to the name of the file |
| `MODULES: list[str]` | the files under test, relative to the repository; their line coverage is measured |
| `seeds() -> list[bytes]` | valid inputs: `run` answers "ok" for each of them |
| `mutate(rng: random.Random, data: bytes) -> bytes` | a damaged copy of a valid input; the same for the same `rng` |
| `run(data: bytes, folder: Path) -> str` | parse it as the product does |
| `EXPECTED_EVENTS: frozenset[str]` | optional: audit events that `run` itself causes, for example `socket.connect` |

`run` returns "ok" where the input is accepted, "refused" where the product refuses it with its own error (a `UserError`
or `MediaError`) after the first stage of the parser, and "stage0" where already the first stage refuses it (no YAML, no
zip file, no text). Any other exception is a failure. `folder` is empty at the start of a worker process and stays
between the inputs: `run` overwrites its own files there.

The targets run in worker processes (`worker.py`), one at a time, thousands of inputs each. The parent watches from
outside, because neither an alarm nor a signal ends a loop in C: an input that takes longer than 10 s, or needs more
than 1 GiB beyond the valid inputs, ends the worker and is a failure. An audit hook reports code that is compiled or
run, processes, sockets, and files that are written outside `folder`.

    python -m tests.fuzz.runner [--count 20000] [--targets config,list_files] [--seed 7] [--only INDEX]

Input number INDEX of a target depends on (seed, NAME, INDEX) alone, so `--seed S --targets NAME --only INDEX` repeats
a failure; its bytes are kept as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
NO_TARGETS = {"__init__", "runner", "worker", "mutators"}
HANG_SECONDS = 10.0
START_SECONDS = 300.0  # import of torch on a busy machine
MEMORY_BYTES = 1 << 30
MOST_FAILURES = 20  # of one target; a target that fails everywhere is not worth 20,000 restarts
POLL_SECONDS = 0.02
CORPUS_BYTES = 2_000_000
MOST_INPUT_BYTES = 4 << 20
PASSING_SHARE, COVERED_SHARE = 0.3, 0.8


class Board:
    """A few numbers in shared memory, which the worker writes and the parent reads.

    Attributes (all settable):
        index: number of the input that is being parsed; -1 before the first.
        began: monotonic time at which that began [s]; 0 before the valid inputs have been parsed, far in the future
            while no input is being parsed.
        baseline: resident bytes after the valid inputs.
        ok, refused, stage0: answers so far.
        bytes_seen: sum of the inputs' lengths.
    """

    FORMAT = struct.Struct("<qdqqqqq")
    NAMES = ("index", "began", "baseline", "ok", "refused", "stage0", "bytes_seen")

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(self.FORMAT.pack(-1, 0.0, 0, 0, 0, 0, 0))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.FORMAT.size)

    def read(self) -> dict[str, Any]:
        """Return all numbers by name."""
        return dict(zip(self.NAMES, self.FORMAT.unpack(self._memory[:]), strict=True))

    def write(self, **numbers: float) -> None:
        """Change some numbers."""
        now = self.read() | numbers
        self._memory[:] = self.FORMAT.pack(*(now[name] for name in self.NAMES))


@dataclasses.dataclass
class Outcome:
    """What one target showed.

    Attributes:
        inputs: mutants that were parsed, failures included.
        answers: how many of them gave ok, refused and stage0.
        failures: dicts with kind (trace, hang, memory, executed, crash), index, text, file.
        coverage: share of the executable lines of `MODULES` that ran, valid inputs included.
        coverage_in_functions: the same without what runs at import.
        missed: file -> lines that never ran.
        corpus_bytes: sum of the lengths of the seeds.
        peak_bytes: most resident memory beyond the valid inputs.
        slowest_seconds: of one input.
    """

    name: str
    seed: int
    inputs: int = 0
    answers: dict[str, int] = dataclasses.field(default_factory=dict)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    coverage: float = 0.0
    coverage_in_functions: float = 0.0
    missed: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    corpus_bytes: int = 0
    peak_bytes: int = 0
    slowest_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def passing(self) -> float:
        """Share of the inputs that pass the first stage of the parser."""
        total = sum(self.answers.values())
        return (self.answers["ok"] + self.answers["refused"]) / total if total else 0.0

    def holds(self, count: int) -> bool:
        """Whether the claims about one target hold for `count` inputs."""
        return (
            not self.failures
            and self.inputs >= count
            and self.passing >= PASSING_SHARE
            and self.coverage >= COVERED_SHARE
            and self.corpus_bytes <= CORPUS_BYTES
        )

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "inputs": self.inputs,
            **self.answers,
            "passing": round(self.passing, 3),
            "coverage": round(self.coverage, 3),
            "coverage_in_functions": round(self.coverage_in_functions, 3),
            "failures": len(self.failures),
            "kinds": sorted({failure["kind"] for failure in self.failures}),
            "corpus_bytes": self.corpus_bytes,
            "peak_mib": round(self.peak_bytes / 2**20, 1),
            "slowest_s": round(self.slowest_seconds, 3),
            "seconds": round(self.seconds, 1),
        }


def targets() -> list[str]:
    """Return the names of all targets in this folder."""
    names = (file.stem for file in HERE.glob("*.py"))
    return sorted(name for name in names if name not in NO_TARGETS and not name.startswith(("_", "test_")))


def fuzz(
    name: str,
    *,
    count: int,
    seed: int,
    seconds: float | None = None,
    only: int | None = None,
    trace_every: int = 10,
    keep: Path | None = None,
) -> Outcome:
    """Feed mutants of one target's seeds to it.

    Args:
        name: the target.
        count: number of mutants.
        seed: decides on all mutants.
        seconds: stop this long after the first input, in the middle of `count`; None = no limit.
        only: parse this one input.
        trace_every: measure the lines of every n-th mutant (and of all seeds); 0 = measure none.
        keep: folder for inputs that fail; None = a new one, if there are any.
    """
    outcome = Outcome(name, seed)
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="zoetrope-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    first, last = (0, count) if only is None else (only, only + 1)
    plan = {"name": name, "seed": seed, "last": last, "trace_every": trace_every, "work": str(work)}
    plan |= {"seconds": seconds, "memory_bytes": MEMORY_BYTES}
    board = Board(work / "board", create=True)
    try:
        while first < last and len(outcome.failures) < MOST_FAILURES:
            ended = _worker(plan | {"first": first}, board, work)
            if ended["kind"] == "done":
                break
            outcome.failures.append(ended | {"seed": seed, "target": name})
            first = ended["index"] + 1
            if ended["index"] < 0:  # the seeds themselves fail: no mutant will tell more
                break
        _collect(outcome, work, board)
        for failure in outcome.failures:
            keep = keep or Path(tempfile.mkdtemp(prefix="zoetrope-fuzz-failures-"))
            failure["file"] = str(_keep(failure, keep, work))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    outcome.seconds = time.monotonic() - began
    return outcome


def _worker(plan: dict[str, Any], board: Board, work: Path) -> dict[str, Any]:
    """Run one worker to its end; how it ended: done, or a failure at an index."""
    board.write(index=-1, began=0.0)
    shutil.rmtree(work / "folder", ignore_errors=True)
    (work / "folder").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    environment |= {"OMP_NUM_THREADS": "1"}
    with (work / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", json.dumps(plan)],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        killed_for = _watch(process, board)
    finally:
        process.kill()
        process.wait()
    index = board.read()["index"]
    if killed_for is not None:
        return {"kind": killed_for[0], "index": index, "text": killed_for[1]}
    report = work / "failure.json"
    if report.is_file():
        text = json.loads(report.read_text())
        report.unlink()
        return text
    if process.returncode:
        text = (work / "output").read_text(errors="replace")[-2000:]
        return {"kind": "crash", "index": index, "text": f"exit code {process.returncode}: {text}"}
    return {"kind": "done"}


def _watch(process: subprocess.Popen[bytes], board: Board) -> tuple[str, str] | None:
    """Wait for the end of a worker; (kind, text) if it had to be killed."""
    started = time.monotonic()
    while process.poll() is None:
        now, state = time.monotonic(), board.read()
        if state["began"] == 0.0:
            if now - started > START_SECONDS:
                return "hang", f"the seeds took more than {START_SECONDS:g} s"
        elif _resident(process.pid) > state["baseline"] + MEMORY_BYTES:
            return "memory", f"more than {MEMORY_BYTES >> 20} MiB beyond the valid inputs"
        elif now - state["began"] > HANG_SECONDS:
            # The stack, for the report: the worker has registered faulthandler for this signal.
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.2)
            return "hang", f"more than {HANG_SECONDS:g} s"
        time.sleep(POLL_SECONDS)
    return None


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * mmap.PAGESIZE


def _collect(outcome: Outcome, work: Path, board: Board) -> None:
    """Put the answers and the lines of all workers of one target together."""
    state = board.read()
    outcome.answers = {answer: state[answer] for answer in ("ok", "refused", "stage0")}
    outcome.inputs = sum(outcome.answers.values()) + sum(failure["index"] >= 0 for failure in outcome.failures)
    covered: dict[str, set[int]] = {}
    for file in sorted(work.glob("worker-*.json")):
        part = json.loads(file.read_text())
        outcome.corpus_bytes = part["corpus_bytes"]
        outcome.peak_bytes = max(outcome.peak_bytes, part["peak_bytes"])
        outcome.slowest_seconds = max(outcome.slowest_seconds, part["slowest_seconds"])
        for name, lines in part["covered"].items():
            covered.setdefault(name, set()).update(lines)
    inside = at_import = seen = 0
    for name, lines in covered.items():
        functions, others = executable_lines(ROOT / name)
        outcome.missed[name] = sorted(functions - lines)
        inside += len(functions)
        at_import += len(others)
        seen += len(functions & lines)
    outcome.coverage = (seen + at_import) / max(1, inside + at_import)
    outcome.coverage_in_functions = seen / max(1, inside)


def executable_lines(file: Path) -> tuple[set[int], set[int]]:
    """Return the lines of a file that run in functions, and those that run at import (module and class bodies)."""
    inside: set[int] = set()
    outside: set[int] = set()

    def walk(code: Any, in_function: bool) -> None:
        lines = {line for *_, line in code.co_lines() if line is not None and line > 0}
        is_function = in_function or bool(code.co_flags & 0x2)  # CO_NEWLOCALS: not the body of a module or class
        if is_function:
            # The line of `def` holds no statement of the function; one-line lambdas and comprehensions do.
            inside.update(lines - {code.co_firstlineno} if not code.co_name.startswith("<") else lines)
        else:
            outside.update(lines)
        for constant in code.co_consts:
            if hasattr(constant, "co_lines"):
                walk(constant, is_function)

    walk(compile(file.read_text("utf-8"), str(file), "exec", dont_inherit=True), False)
    return inside, outside - inside


def mutant(module: Any, seed: int, index: int, seeds: list[bytes]) -> bytes:
    """Return input number `index` of a target, cut where it is larger than a sane `mutate` makes."""
    rng = random.Random(f"{seed}:{module.NAME}:{index}")
    return module.mutate(rng, rng.choice(seeds))[:MOST_INPUT_BYTES]


def _keep(failure: dict[str, Any], keep: Path, work: Path) -> Path:
    keep.mkdir(parents=True, exist_ok=True)
    stem = f"{failure['target']}-{failure['seed']}-{failure['index']}"
    data = work / "input"
    if failure["index"] >= 0 and data.is_file():
        # The worker that failed has written its input only if it could; the others are made again by `--only`.
        saved = json.loads((work / "input.json").read_text()) if (work / "input.json").is_file() else {}
        if saved.get("index") == failure["index"]:
            shutil.copy(data, keep / f"{stem}.bin")
    (keep / f"{stem}.json").write_text(json.dumps(failure, indent=1))
    return keep / f"{stem}.json"


def main(argv: list[str]) -> int:
    """Print one JSON line for each target, and each failure; exit code 1 if something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.runner", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=20_000, help="mutants of each target")
    parser.add_argument("--targets", default="all", help="comma separated: " + ", ".join(targets()))
    parser.add_argument("--seed", type=int, help="default: drawn, and printed")
    parser.add_argument("--seconds", type=float, help="stop each target after this time")
    parser.add_argument("--only", type=int, metavar="INDEX", help="parse this one mutant")
    parser.add_argument("--missed", action="store_true", help="print the lines that never ran")
    args = parser.parse_args(argv)
    names = targets() if args.targets in ("all", "") else args.targets.split(",")
    if unknown := set(names) - set(targets()):
        parser.error(f"no target called {', '.join(sorted(unknown))}; there are {', '.join(targets())}")
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(json.dumps({"seed": seed, "count": args.count}), flush=True)
    code = 0
    for name in names:
        outcome = fuzz(name, count=args.count, seed=seed, seconds=args.seconds, only=args.only)
        short = args.seconds is not None or args.only is not None
        holds = not outcome.failures if short else outcome.holds(args.count)
        code |= not holds
        print(json.dumps({"target": name, **outcome.summary(), "holds": holds}), flush=True)
        for failure in outcome.failures:
            print(json.dumps(failure), flush=True)
        if args.missed:
            print(json.dumps(outcome.missed), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
