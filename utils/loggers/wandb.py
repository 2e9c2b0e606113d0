"""Weights & Biases. Offline unless $WANDB_MODE is set; send it later with `wandb sync EXP/wandb/offline-run-*`.

Host, user, command line, git remote, packages and console are not recorded.
"""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.loggers import Point

# W&B's own step may not go back and holds one point, but two points of a step may come one after the other.
STEP = "iteration"
FLUSH_SECONDS = 2.0
SETTINGS: dict[str, str | bool | float] = {  # those that the installed version does not have are left out
    "console": "off",
    "silent": True,
    "save_code": False,
    "disable_git": True,
    "disable_code": True,
    "host": "",
    "finish_timeout": 5.0,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": FLUSH_SECONDS,
}


class WandbRun:
    """A run of W&B; we choose its id."""

    settles = 2 * FLUSH_SECONDS  # W&B's process flushes its file every FLUSH_SECONDS; twice that, to be sure

    def __init__(self, folder: Path, run: str | None, metadata: Mapping[str, str | float]) -> None:
        wandb = importlib.import_module("wandb")  # the package, not this file of the same name
        self.run = run or uuid.uuid4().hex[:8]
        known = {name: value for name, value in SETTINGS.items() if name in wandb.Settings.model_fields}

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "zoetrope"),
            dir=folder,
            id=self.run,
            name=str(metadata.get("name", folder.name)),
            config=dict(metadata),
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(**known),
        )

        # All curves over our iteration, not over W&B's step
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, points: Sequence[Point]) -> None:
        """Write points to the file of the run; a process of W&B sends them."""
        for step, values in points:
            self._run.log({STEP: step, **values})

    def close(self) -> None:
        """Write the end of this part of the run."""
        self._run.finish()


def connect(folder: Path, run: str | None, metadata: Mapping[str, str | float]) -> WandbRun:
    """Open a new run, or continue one of an earlier start."""
    return WandbRun(folder, run, metadata)
