"""One rank of a job in the conformance test: `scheduled_rank.py FOLDER meet|wait`.

meet: find the other ranks and sum their numbers. wait: until a signal, then save and leave with 75. Both write what the
rank sees of its job to FOLDER/STARTS.RANK.json.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from utils import errors, schedulers

folder, mode = Path(sys.argv[1]), sys.argv[2]
seen: list[int] = []
if mode == "wait":
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: seen.append(number))
place = schedulers.here()
rank = errors.rank_from_environment()
about: dict[str, object] = vars(place) if place else {}
if mode == "meet":
    import torch

    from utils import dist

    world = dist.join(device="cpu")
    total = world.sum_(torch.tensor(1.0 + world.rank)).item()
    dist.leave()
    about |= {"size": world.size, "total": total}
    rank = world.rank
file = folder / f"{place.restarts if place else 0}.{rank}.json"
file.with_suffix(".tmp").write_text(json.dumps(about))
file.with_suffix(".tmp").rename(file)
if mode == "wait":
    while not seen:
        time.sleep(0.05)
    file.with_suffix(".saved").touch()
    sys.exit(errors.leave_exit_code(75))
errors.write_exit_code(0)
