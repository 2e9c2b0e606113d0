"""main.py that stops after a given iteration and writes down what each step trained on; for the checks of elasticity.

ELASTIC_STOP: finished iterations after which the run stops, as if a signal had come. ELASTIC_FILE: each rank appends a
JSON line a step to ELASTIC_FILE.<rank>: step, loss of the global batch, position -> [sample, sha256 of the clip].
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import main

train_step = main.train_step


def observed(run, step, micro_batches, *, stop, save, **others):  # noqa: ANN001, ANN201
    """`main.train_step`, watched."""
    clips = {}
    for batch in micro_batches:
        for position, sample, clip in zip(batch.positions, batch.samples, batch.clips, strict=True):
            clips[position] = [sample, hashlib.sha256(clip.numpy().tobytes()).hexdigest()]
    stop = stop or step + 1 == int(os.environ.get("ELASTIC_STOP", "0"))
    numbers = train_step(run, step, micro_batches, stop=stop, save=save, **others)
    with open(f"{os.environ['ELASTIC_FILE']}.{run.world.rank}", "a") as file:
        file.write(json.dumps({"step": step, "loss": numbers["loss"], "clips": clips}) + "\n")
    return numbers


def trained(folder: Path, name: str) -> tuple[dict[int, float], dict[str, list]]:
    """What all ranks wrote: step -> loss, position -> [sample, hash]."""
    losses: dict[int, float] = {}
    clips: dict[str, list] = {}
    for file in sorted(folder.glob(f"{name}.*")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            assert losses.setdefault(row["step"], row["loss"]) == row["loss"], "the ranks disagree"
            assert not set(row["clips"]) & set(clips), "a clip was trained on twice"
            clips |= row["clips"]
    return losses, clips


if __name__ == "__main__":
    main.train_step = observed
    sys.exit(main.main(sys.argv[1:]))
