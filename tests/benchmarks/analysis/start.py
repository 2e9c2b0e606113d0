"""`main.py start` on three folders of real videos with nothing else typed, beside a ridge regression on the same split.

The folders hold links to the videos of ../shared/data, one folder a class. The ridge regression is that of `ridge.py`.
$ZOETROPE_ACCEPT_SEEDS=0 measures fewer seeds than three; such a row does not hold.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.analysis import ridge
from tests.benchmarks.methods.by_tests import passed
from tests.benchmarks.rows import ROOT, SHARED, Row, command, run_rows, workspace

WEIGHTS = ROOT / "pretrained/mobilenetv2_imagenet_features.pth"
MINUTES = 15


def class_folders(name: str, folder: Path) -> Path:
    """Links to the videos of a data set, in a folder for each class."""
    names = [line.split()[1] for line in (SHARED / f"lists/{name}/classInd.txt").read_text().splitlines()]
    lists = ("train_videos.txt", "val_videos.txt") if name == "weizmann4" else ("all.txt",)
    for line in (line for one in lists for line in (SHARED / f"lists/{name}/{one}").read_text().splitlines()):
        path, label = line.rsplit(None, 1)
        target = folder / names[int(label)] / Path(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(SHARED / path)
    return folder


def ridge_on(exp: Path, root: Path) -> float:
    """Accuracy of the ridge regression of docs/results.md on the lists of an experiment."""
    lists = []
    for name in ("train", "val"):
        rows = [line.split("\t") for line in (exp / f"lists/{name}.txt").read_text().splitlines()]
        videos = np.array([ridge.maps(root / path) for path, _ in rows])
        lists.append((videos, np.array([int(label) for _, label in rows])))
    (train, labels), (val, expected) = lists
    return float((ridge.predict(train, labels, val) == expected).mean())


def start(name: str, figure: float) -> dict:
    """One seed after the other, each as a user would type it but for --out and --seed."""
    from anal_tools.evaluate.results import Results

    work = workspace()
    root = class_folders(name, work / "videos" / name)
    given = not WEIGHTS.exists()
    if given:
        WEIGHTS.symlink_to(SHARED / "weights" / WEIGHTS.name)
    seeds = [int(seed) for seed in os.environ.get("ZOETROPE_ACCEPT_SEEDS", "0,1,2").split(",")]
    rows = []
    try:
        for seed in seeds:
            exp, began, before = work / f"{name}_{seed}", time.monotonic(), _cpu()
            command("main.py", "start", root, "--out", exp, "--seed", str(seed), "--yes")
            results = Results.load(exp)
            numbers = {"top1": round(results.numbers["top1"] / 100, 3), "ridge": round(ridge_on(exp, root), 3)}
            numbers |= {"videos": len(results.ids), "minutes": round((time.monotonic() - began) / 60, 1)}
            rows.append({"seed": seed, **numbers, "cpu_minutes": round((_cpu() - before) / 60, 1)})
    finally:
        if given:
            WEIGHTS.unlink()
    mean, base = (statistics.mean(float(row[key]) for row in rows) for key in ("top1", "ridge"))
    above = name == "weizmann4" or mean > base
    in_time = all(float(row["minutes"]) <= MINUTES for row in rows)
    return {
        "measured": {"mean": round(mean, 3), "ridge": round(base, 3), "seeds": rows},
        "holds": len(seeds) == 3 and mean >= figure and above and in_time,
    }


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def folds() -> dict:
    """Folds that are killed and started again, on this machine and as an array of a real SLURM."""
    tests = ("tests/launch/test_folds.py", "tests/slurm/test_folds.py")
    outcomes = {test: passed("--tier", "nightly", test) for test in tests}
    return {"measured": outcomes, "holds": not any(text.startswith("failed") for text in outcomes.values())}


def shapes() -> dict:
    """Blanks, unicode, nested folders, tables, clips of long videos, broken files, classes of one video."""
    outcome = passed("--tier", "nightly", "tests/anal_tools/test_start.py")
    return {"measured": outcome, "holds": not outcome.startswith("failed")}


ROWS: dict[str, tuple[str, str, Row]] = {
    f"start_{name}": (
        f"main.py start on class folders of {name}, nothing else typed, its own split, mean of 3 seeds",
        f">= {figure:.2f}" + ("" if name == "weizmann4" else ", above ridge") + f", <= {MINUTES} min a seed on 2 cores",
        lambda name=name, figure=figure: start(name, figure),
    )
    for name, figure in (("weizmann4", 0.90), ("ut_interaction2", 0.75), ("ucf_sports", 0.65))
}
ROWS["start_shapes"] = (
    "main.py start on blanks, unicode, nested folders, a csv, clips by times, broken files, a class of one video",
    "right, or one sentence that says what to change; nothing lost",
    shapes,
)
ROWS["folds"] = (
    "folds locally and on SLURM (array), killed and restarted",
    "same numbers; no fold run twice",
    folds,
)

if __name__ == "__main__":
    sys.exit(run_rows(ROWS, issue="11"))
