"""Row `fuzz`: damaged copies of valid inputs for every parser. $ZOETROPE_FUZZ_COUNT inputs a target (20,000)."""

from __future__ import annotations

import json
import os
import random
from typing import Any

from tests.fuzz import runner

COUNT = int(os.environ.get("ZOETROPE_FUZZ_COUNT", "20000"))
EXPECTED = {"config", "list_files", "weights", "result_parts", "memcached_wire", "video_index", "hf_folders"}


def row() -> dict[str, Any]:
    """Run all targets; they are the parsers that read what others write."""
    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(10**6))
    outcomes = {name: runner.fuzz(name, count=COUNT, seed=seed) for name in runner.targets()}
    measured: dict[str, Any] = {"seed": seed, "count": COUNT, "missing": sorted(EXPECTED - outcomes.keys())}
    measured |= {name: outcome.summary() for name, outcome in outcomes.items()}
    measured["corpora_bytes"] = sum(outcome.corpus_bytes for outcome in outcomes.values())
    measured["failed"] = [failure for outcome in outcomes.values() for failure in outcome.failures][:20]
    holds = not measured["missing"] and measured["corpora_bytes"] <= runner.CORPUS_BYTES
    return {"measured": measured, "holds": holds and all(outcome.holds(COUNT) for outcome in outcomes.values())}


if __name__ == "__main__":
    print(json.dumps(row()))
