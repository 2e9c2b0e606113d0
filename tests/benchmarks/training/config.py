"""The config of a published experiment, its learning rates, and a file with twelve planted faults."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.rows import ROOT, command, run_rows

RATES = {0: 0.01, 10: 0.0106, 490: 0.0394, 500: 0.04, 1000: 0.039883, 7500: 0.021104, 15000: 0.0}


def seed_config() -> dict:
    """The text as the shipped experiment holds it, and the seven learning rates of its published log."""
    from utils import config, lr_schedule

    folder = next(
        (ROOT / "exps").rglob("colorjitter_random_erasing_labelsmooth_0.1_nowd_coslr_bn16_gpu32_lr0.04_epoch100")
    )
    cfg = config.load(folder)
    schedule = cfg.lr_scheduler
    names = ("type", "base_lr", "warmup_steps", "warmup_lr", "min_lr", "max_iter", "lr_steps", "lr_mults")
    options = {name: getattr(schedule, name) for name in names}
    rates = {k: round(lr_schedule.lr_at(k, **options), 6) for k in RATES}
    return {"measured": rates, "holds": all(abs(rates[k] - RATES[k]) < 1e-9 for k in RATES)}


def config_errors() -> dict:
    """The planted file of the tests through the user's own command: lines, wall time, and no torch."""
    from tests.utils.test_config import FAULTS, PLANTED

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(PLANTED)
        program = "import sys, main; main.main(['config', sys.argv[1]]); sys.exit('torch' in sys.modules)"
        done, seconds = None, []
        for _ in range(3):
            started = time.monotonic()
            done = command("-c", program, folder, check=False)
            seconds.append(time.monotonic() - started)
        assert done is not None
        message = done.stderr
        right = sum(f"config.yaml:{line}: {text}" in message for line, text in FAULTS.items())
    measured = {"right_line": right, "faults": len(FAULTS), "seconds": round(min(seconds), 3), "torch": done.returncode}
    return {"measured": measured, "holds": right == len(FAULTS) == 12 and min(seconds) < 1 and not done.returncode}


ROWS = {
    "published_config": ("the shipped config's text and learning rates", "accepted; 7 points equal", seed_config),
    "config_errors": ("12 planted config faults", "12 with the right line, < 1 s, no torch", config_errors),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
