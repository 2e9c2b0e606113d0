"""Stands in for main.py in the launcher's tests: `rank_script.py FOLDER MODE`, no torch, the same exit protocol.

MODE: a number = leave with it at once (3,4: each rank with its own); error = rank 1 alone has a mistake of the user,
alike = all have the same, lost = the others notice; wait = until a signal, then save for SECONDS and leave with 75.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import signals  # noqa: E402

signals.follow_launcher()
folder, mode = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ.get("RANK", "0"))
seen: list[int] = []


def leave(code: int) -> None:
    """As main.py leaves: the code goes to the launcher's file, and torchrun need not know of it."""
    path = os.environ.get("ZOETROPE_EXIT_FILE")
    if path:
        Path(f"{path}.{rank}").write_text(f"{code}\n")
        code = 0 if code in (2, 75) else code
    sys.exit(code)


kept = ("RANK", "WORLD_SIZE", "ZOETROPE_RANKS", "OMP_NUM_THREADS", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")
about = {"argv": sys.argv[1:], **{name: os.environ.get(name) for name in kept}}
if mode == "wait":
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
(folder / f"started.{rank}").write_text(json.dumps(about))
if mode == "early":
    time.sleep(60)
if mode == "wait":
    while not seen:
        time.sleep(0.02)
    time.sleep(float(sys.argv[3]))
    (folder / f"saved.{rank}").write_text(signal.Signals(seen[0]).name)
    leave(75)
if mode in ("error", "alike", "lost"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from utils import errors

    def verb() -> int:
        if rank == 1 or mode == "alike":
            raise errors.UserError("b.mp4 does not decode")
        time.sleep(1)
        raise (
            errors.RankLostError(f"rank {rank} lost contact with another rank (x)") if mode == "lost" else SystemExit(0)
        )

    sys.exit(errors.leave_exit_code(errors.run_cli(verb)))
codes = [int(code) for code in mode.split(",")]
leave(codes[rank % len(codes)])
