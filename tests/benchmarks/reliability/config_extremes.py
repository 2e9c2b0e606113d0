"""Row `config_extremes`: values that no experiment means, through `train`: one sentence, or a run that ends.

Values beyond the limits are refused before anything starts. Values at the limits are accepted, and the tiny run that
has them ends, with code 0 or with one sentence.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SECONDS, MEMORY_BYTES = 120.0, 1 << 30
REFUSED = [
    "print_freq=10000000000000000000000000", f"workers={10**30}", "workers=100000", "lr_scheduler.base_lr=1e308",
    "lr_scheduler.warmup_lr=1e308", "weight_decay=1e308", "augmentation.test_resize=4294967296",
    "batch_size=10000000", "model.num_segments=100000000", "data.clip_len=100000000", "data.prefetch=1000000000",
    "shards=1000000000", "precise_bn.batches=1000000000000", "data.template=../../{:05d}",
    "data.template='{:999999999d}'", f"model.num_class={2**40}", "augmentation.input_size=1000000",
    "augmentation.mix_up=1e300", "augmentation.mix_up=1e-300", "augmentation.std=[1e-300, 1, 1]",
    "augmentation.colorjitter=[1e30, 0, 0, 0]", "augmentation.random_erasing=[1, 1e-300, 1, 1]",
    "augmentation.scales=[1e-30]", f"augmentation.max_distort={10**20}", f"lr_scheduler.max_iter={10**30}",
    "lr_scheduler.max_epoch=1e300", f"lr_scheduler.warmup_steps={10**25}", "lr_scheduler.warmup_epochs=1e100",
    "lr_scheduler.min_lr=1e308", f"val_freq={10**25}", "val_freq_epochs=1e300", "save_minutes=1e300",
    "watchdog_minutes=1e300", "data.deadline_seconds=1e300", f"data.frame_interval={10**15}", "clip_grad=1e308",
    "clip_grad=1e-308", f"seed={2**63}", "distill.temperature=1e-308", "data.bad_budget=2",
    f"data.memcached.megabytes={10**20}", "data.memcached.timeout_ms=1e300", "model.kwargs.fc_std=1e308",
    f"model.kwargs.bn_group_size={10**20}", f"reference_batch={10**20}", f"published.gpus={10**20}",
    f"train_source={'x' * 5000}", r'val_root="a\0b"', "label_smooth=1", "momentum=1", "model.dropout=1",
    f"data.flip_labels=[[{10**20}, 0]]", "lr_scheduler.base_lr=.nan", "weight_decay=-1e308", "batch_size=0",
]  # fmt: skip
ACCEPTED = [
    "lr_scheduler.base_lr=1e-300", "lr_scheduler.warmup_lr=1e30", "weight_decay=100", "momentum=0.99999999",
    "label_smooth=0.99999999", "augmentation.mix_up=1000", "augmentation.mix_up=0.001", "ema=0.999999999",
    "ema=1e-12", "clip_grad=1e12", "clip_grad=1e-12", "print_freq=1000000", "val_freq=1000000000",
    "save_minutes=10000000", "save_minutes=1e-300", "watchdog_minutes=10000000", "data.deadline_seconds=86400",
    "data.bad_budget=1", "data.bad_budget=0", "data.frame_interval=100000", "model.dropout=0.99999999",
    "augmentation.colorjitter=[100, 100, 100, 0.5]", "augmentation.std=[1e-6, 1e-6, 1e-6]",
    "augmentation.std=[1000, 1000, 1000]", "augmentation.random_erasing=[1, 1, 1, 0.01]",
    "augmentation.area=[1e-4, 1e-4]", "augmentation.aspect=[0.01, 0.01]", "augmentation.max_distort=64",
    "model.kwargs.fc_std=65536", "model.kwargs.fc_std=0", f"seed={2**63 - 1}", "reference_batch=1000000000",
    "precise_bn.batches=3", "data.template='{:020d}.jpg'", f"data.memcached.namespace={'x' * 1000}",
    "lr_scheduler.warmup_steps=0", "lr_scheduler.min_lr=1e30", "data.prefetch=64", "model.num_segments=64",
    "ema=1e-400",
    "augmentation.input_size=8", "shards=64", "model.kwargs.bn_group_size=100000", "deterministic=true",
]  # fmt: skip


def row() -> dict[str, Any]:
    """Train a tiny experiment with each value."""
    import main  # noqa: F401  the children are forked from a process that has imported what training needs
    from datasets.demo import verb as demo  # noqa: F401
    from datasets.loading import loader  # noqa: F401
    from methods import tsn  # noqa: F401
    from tests.experiment import few_videos, make
    from utils.engine import setup  # noqa: F401

    wrong, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        with contextlib.redirect_stdout(io.StringIO()):
            demo.main(["--out", str(data), "--train", "16", "--val", "8", "--workers", "1"])
        for number, value in enumerate([*REFUSED, *ACCEPTED]):
            exp = make(Path(folder) / f"exp{number}", data, steps=3, val_freq=3, print_freq=1)
            few = few_videos(exp, data, 2)
            code, text, seconds, why = _train(exp, [few, value])
            slowest = max(slowest, seconds)
            sentence = code == 2 and "Traceback" not in text and text.startswith("error: ")
            good = not why and (sentence if number < len(REFUSED) else sentence or code == 0)
            if not good:
                wrong.append({"value": value[:80], "code": code, "why": why, "text": text[-300:]})
    measured = {"refused": len(REFUSED), "accepted": len(ACCEPTED), "wrong": wrong, "slowest_s": round(slowest, 1)}
    return {"measured": measured, "holds": not wrong}


def _train(exp: Path, overrides: list[str]) -> tuple[int, str, float, str]:
    """Train in a forked child: (exit code, what it wrote to stderr, seconds, why it was killed)."""
    import main

    errors = exp / "stderr"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with errors.open("w") as stderr, open(os.devnull, "w") as stdout:
                os.dup2(stderr.fileno(), 2)
                os.dup2(stdout.fileno(), 1)
                sets = [word for override in overrides for word in ("--set", override)]
                code = main.main(["train", str(exp), *sets])
        except BaseException:  # noqa: BLE001  a trace is what this looks for
            import traceback

            errors.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    base, why = _resident(child), ""
    while (waited := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - began > SECONDS:
            why = f"more than {SECONDS:g} s"
        elif _resident(child) > base + MEMORY_BYTES:
            why = f"more than {MEMORY_BYTES >> 20} MiB"
        if why:
            os.kill(child, signal.SIGKILL)
            waited = os.waitpid(child, 0)
            break
        time.sleep(0.05)
    text = errors.read_text(errors="replace") if errors.exists() else ""
    return os.waitstatus_to_exitcode(waited[1]), text, time.monotonic() - began, why


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    sys.stdout.write(json.dumps(row()) + "\n")
