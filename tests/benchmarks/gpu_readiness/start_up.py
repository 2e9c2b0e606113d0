"""Row: CPU seconds from the start of `main.py train` to the end of step 1, outside the step; a list of a million.

Before: the same program with torch's own optimiser class, whose decorators import torch._dynamo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

PROGRAM = """
import json, resource, sys, time
import main
from pathlib import Path
before, exp = sys.argv[1] == "before", sys.argv[2]
inside = []
step = main.train_step
class Done(Exception): pass

def timed(*arguments, **more):
    began = time.process_time()
    found = step(*arguments, **more)
    inside.append(time.process_time() - began)
    raise Done

main.train_step = timed
if before:
    import utils.optim
    utils.optim._SGD = utils.optim.SGD
try:
    main.train(Path(exp))
except Done:
    pass
print(json.dumps({"outside": time.process_time() - inside[0], "dynamo": "torch._dynamo" in sys.modules}))
"""


def measure(exp: Path, when: str) -> dict[str, Any]:
    """CPU seconds of the training process alone; its readers have their own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PROGRAM, when, str(exp)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(rounds: int = 3) -> dict[str, Any]:
    """Medians of some rounds, both in turn."""
    from datasets.demo import verb as demo
    from tests import experiment

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo.main(["--out", str(folder / "data"), "--train", "16", "--val", "8", "--workers", "1"])
        found: dict[str, list[float]] = {"before": [], "now": [], "million": []}
        dynamo = False
        for number in range(rounds):
            for when in ("before", "now"):
                exp = experiment.make(folder / f"{when}{number}", folder / "data", workers=1)
                figures = measure(exp, when)
                found[when].append(figures["outside"])
                dynamo |= when == "now" and figures["dynamo"]
        lines = (folder / "data" / "lists" / "train.txt").read_text().splitlines()
        long = folder / "data" / "lists" / "long.txt"
        long.write_text("".join(f"{lines[i % len(lines)]}\n" for i in range(1_000_000)))
        exp = experiment.make(folder / "million", folder / "data", workers=1)
        text = (exp / "config.yaml").read_text().replace("lists/train.txt", "lists/long.txt")
        (exp / "config.yaml").write_text(text)
        found["million"].append(measure(exp, "now")["outside"])
    medians = {when: round(sorted(values)[len(values) // 2], 2) for when, values in found.items()}
    ratio, more = round(medians["now"] / medians["before"], 3), round(medians["million"] - medians["now"], 2)
    measured = {**medians, "ratio": ratio, "million_costs": more, "dynamo_is_imported": dynamo}
    return {"measured": measured, "holds": ratio <= (0.75 if dynamo else 0.6) and more <= 6}


if __name__ == "__main__":
    print(json.dumps(row()))
