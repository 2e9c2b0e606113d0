"""Weights & Biases. Offline unless $WANDB_MODE says otherwise; `wandb sync EXP/wandb/offline-run-*` sends it later.

Host, user, command line, git remote, packages and console are not recorded.
"""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.loggers import Point

STEP = "iteration"  # W&B's own step may not go back, and holds one point: two of a step come one after the other
FLUSH_SECONDS = 2.0
SETTINGS: dict[str, str | bool | float] = {  # versions differ: those that one does not have are left out
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


class Run:
    """A run of W&B; its id is ours."""

    settles = 2 * FLUSH_SECONDS

    def __init__(self, folder: Path, run: str | None, facts: Mapping[str, str | float]) -> None:
        wandb = importlib.import_module("wandb")  # not this file
        self.run = run or uuid.uuid4().hex[:8]
        known = {name: value for name, value in SETTINGS.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "zoetrope"),
            dir=folder,
            id=self.run,
            name=str(facts.get("name", folder.name)),
            config=dict(facts),
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(**known),
        )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, points: Sequence[Point]) -> None:
        """Write points to the file of the run, which a process of W&B sends."""
        for step, values in points:
            self._run.log({STEP: step, **values})

    def close(self) -> None:
        """Write the end of this part of the run."""
        self._run.finish()


def connect(folder: Path, run: str | None, facts: Mapping[str, str | float]) -> Run:
    """Open a new run, or the next part of one."""
    return Run(folder, run, facts)
