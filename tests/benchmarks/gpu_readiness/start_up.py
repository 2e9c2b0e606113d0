"""Row: CPU seconds from the start of `main.py train` to the end of step 1, outside the step; a list of a million.

Before: the same config at commit 176f066, whose optimiser imports torch._dynamo, on the same machine in turn.
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
inside = []
step = main.train_step
class Done(BaseException): pass

def timed(*arguments, **more):
    began = time.process_time()
    found = step(*arguments, **more)
    inside.append(time.process_time() - began)
    raise Done

main.train_step = timed
try:
    main.main(["train", sys.argv[1]])
except Done:
    pass
print(json.dumps({"outside": time.process_time() - inside[0], "dynamo": "torch._dynamo" in sys.modules}))
"""


def measure(exp: Path, root: Path = ROOT) -> dict[str, Any]:
    """Return the CPU seconds of the training process alone, with the code in `root`; its readers have their own."""
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # users have bytecode from the second start on
    command = [sys.executable, "-c", PROGRAM, str(exp)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(rounds: int = 5, base: str = "176f066") -> dict[str, Any]:
    """Return the medians of some rounds, base commit and work tree in turn."""
    from datasets.demo import verb as demo
    from tests import experiment
    from tests.benchmarks.house.guard import checkout

    with tempfile.TemporaryDirectory() as name, checkout(base) as before:
        folder = Path(name)
        demo.main(["--out", str(folder / "data"), "--train", "16", "--val", "8", "--workers", "1"])
        seconds: dict[str, list[float]] = {"before": [], "now": []}
        dynamo = False
        for number in range(-1, rounds):
            for when, root in (("before", before.root), ("now", ROOT)):
                exp = experiment.make(folder / f"{when}{number}", folder / "data", workers=1)
                figures = measure(exp, root)
                if number >= 0:  # the first start of each wrote the bytecode
                    seconds[when].append(figures["outside"])
                dynamo |= when == "now" and figures["dynamo"]

        lines = (folder / "data" / "lists" / "train.txt").read_text().splitlines()
        long = folder / "data" / "lists" / "long.txt"
        long.write_text("".join(f"{lines[i % len(lines)]}\n" for i in range(1_000_000)))
        exp = experiment.make(folder / "million", folder / "data", workers=1)
        text = (exp / "config.yaml").read_text().replace("lists/train.txt", "lists/long.txt")
        (exp / "config.yaml").write_text(text)
        seconds["million"] = [measure(exp)["outside"]]

    medians = {when: round(sorted(values)[len(values) // 2], 2) for when, values in seconds.items()}
    ratio, more = round(medians["now"] / medians["before"], 3), round(medians["million"] - medians["now"], 2)
    measured = {**medians, "ratio": ratio, "million_costs": more, "dynamo_is_imported": dynamo}
    return {"measured": measured, "holds": ratio <= (0.75 if dynamo else 0.6) and more <= 6}


if __name__ == "__main__":
    print(json.dumps(row()))
