"""Row: the n-th call to the file system fails in train, eval, dump and scan; each ends in a right state.

A drawn sample of all (kind, number, error), at least `$ZOETROPE_TRAIN` (default 100) hits in train and the rest of
`$ZOETROPE_CASES` (default 320) spread over the others; `ZOETROPE_CASES=all` takes every one.

    python -m tests.benchmarks.reliability.nth_call
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.inject import Fault
from tests.faults.nth_call import Bench, Case, kinds_of


def chosen(rng: random.Random, faults: list[Fault], count: int | None) -> list[Fault]:
    """`count` of the faults, spread evenly over the kinds of calls; None: all."""
    if count is None or count >= len(faults):
        return faults
    waiting = [rng.sample(of_kind, len(of_kind)) for of_kind in kinds_of(faults).values()]
    picked: list[Fault] = []
    while len(picked) < count:
        for of_kind in waiting:
            if of_kind and len(picked) < count:
                picked.append(of_kind.pop())
    return picked


def row(counts: dict[str, int | None] | None = None, data: Path | None = None) -> dict[str, Any]:
    """Inject faults.

    Args:
        counts: how many into each command; None: from the environment.
        data: a small data set; None: it is made.

    Returns:
        measured: hits and wrong ends of each command, the seed; holds.
    """
    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(10**6))
    rng, hits, codes = random.Random(seed), Counter(), Counter()
    wrong: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="zoetrope-nth-") as name:
        if data is None:
            from datasets.demo import verb as demo

            data = Path(name) / "data"
            demo.main(["--out", str(data), "--train", "48", "--val", "24", "--workers", "1"])
        (Path(name) / "bench").mkdir()
        bench = Bench(data, Path(name) / "bench")
        for command, count in (counts or _counts(list(bench.commands))).items():
            for fault in chosen(rng, list(bench.faults(command)), count):
                case = bench.run(command, fault)
                if not case.hit:
                    continue
                hits[command] += 1
                codes[str(case.code)] += 1
                if case.wrong:
                    wrong.append(case)
                    print(json.dumps(case.__dict__), file=sys.stderr, flush=True)
    measured = {"seed": seed, "hits": dict(hits), "all": hits.total(), "exit_codes": dict(codes), "wrong": len(wrong)}
    enough = counts is not None or (hits["train"] >= min(100, _train()) and hits.total() >= min(300, _cases()))
    return {"measured": measured, "holds": not wrong and enough}


def _train() -> int:
    return int(os.environ.get("ZOETROPE_TRAIN") or 100)


def _cases() -> int:
    text = os.environ.get("ZOETROPE_CASES") or "320"
    return 10**9 if text == "all" else int(text)


def _counts(commands: list[str]) -> dict[str, int | None]:
    if _cases() == 10**9:
        return dict.fromkeys(commands)
    others = [name for name in commands if name != "train"]
    each, rest = divmod(max(0, _cases() - _train() - 4), len(others))
    counts: dict[str, int | None] = {"train": _train() + 4}
    return counts | {name: each + (index < rest) for index, name in enumerate(others)}


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", help="such as train=8,scan=4 (default: see above)")
    parser.add_argument("--data", type=Path, help="a small data set of the demo's kind (default: it is made)")
    args = parser.parse_args()
    counts: dict[str, int | None] | None = None
    if args.counts:
        counts = {name: int(count) for name, count in (word.split("=") for word in args.counts.split(","))}
    print(json.dumps(row(counts, args.data)))


if __name__ == "__main__":
    _main()
