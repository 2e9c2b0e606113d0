"""What training reaches: the demo, and real people from scratch, over three seeds."""

from __future__ import annotations

import concurrent.futures
import statistics
import sys
import time

from tests.benchmarks.experiments import dump_weizmann, weizmann_experiment
from tests.benchmarks.rows import SHARED, command, copy_experiment, evaluate, run_rows, train, train_cpu, workspace

SEEDS = (0, 1, 2)


def demo() -> dict:
    """The demo's own two commands on fresh folders, three seeds of TSM, and TSN on motion and on shape."""
    work = workspace()
    data = work / "motion8"
    started = time.monotonic()
    command("main.py", "demo-data", "--out", data)
    at_data = time.monotonic() - started
    places = [f"common.{part}_{key}" for part in ("train", "val") for key in ("root", "source")]
    accuracies = {"tsm": [], "tsn": [], "tsn_shape": []}
    wall = []
    for kind, source, lists, seeds in (
        ("tsm", "demo_exps/tsm_resnet18/motion8", "", SEEDS),
        ("tsn", "demo_exps/tsn_resnet18/motion8", "", (0,)),
        ("tsn_shape", "demo_exps/tsn_resnet18/shape", "_shape", (0,)),
    ):
        files = (data, data / f"lists/train{lists}.txt", data, data / f"lists/val{lists}.txt")
        sets = [f"{key}={value}" for key, value in zip(places, files, strict=True)]
        sets.append(f"common.data.class_names={data}/lists/classInd{lists}.txt")
        for seed in seeds:
            exp = copy_experiment(source, work / f"{kind}-{seed}")
            started = time.monotonic()
            train(exp, 2, *sets, f"common.seed={seed}")
            summary = evaluate(exp, 2, *[word for item in sets for word in ("--set", item)])
            wall.append(time.monotonic() - started)
            accuracies[kind].append(summary["metrics"]["top1"] / 100)
    minutes = (at_data + wall[0]) / 60
    mean = statistics.mean(accuracies["tsm"])
    holds = minutes <= 6 and mean >= 0.90 and accuracies["tsn"][0] <= 0.60 and accuracies["tsn_shape"][0] >= 0.90
    return {"measured": {"demo_minutes": round(minutes, 2), "tsm_mean": mean, **accuracies}, "holds": holds}


def real_people() -> dict:
    """TSM ResNet-18 from scratch on weizmann4, both readers, three seeds, last checkpoint of 300 steps."""
    work = workspace()
    frames_root = dump_weizmann(SHARED, work / "weizmann_frames")
    roots = {"video": SHARED, "frames": frames_root}

    def one(case: tuple[str, int]) -> tuple[float, float]:
        reader, seed = case
        exp = weizmann_experiment(work / f"people-{reader}-{seed}", SHARED, roots[reader], reader)
        minutes = train_cpu(exp, 0, f"common.seed={seed}")
        return evaluate(exp, 0, "--checkpoint", "latest")["metrics"]["top1"] / 100, minutes

    cases = [(reader, seed) for reader in roots for seed in SEEDS]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # one thread each, two cores
        outcomes = dict(zip(cases, pool.map(one, cases), strict=True))
    scores = {reader: [outcomes[reader, seed][0] for seed in SEEDS] for reader in roots}
    longest = max(minutes for _, minutes in outcomes.values())
    holds = all(statistics.mean(each) >= 0.9 for each in scores.values()) and longest <= 6
    return {"measured": {**scores, "longest_cpu_minutes": round(longest, 2)}, "holds": holds}


ROWS = {
    "demo": ("make demo; TSM sees order, TSN does not", "<= 6 min; TSM >= .90, TSN <= .60, TSN by shape >= .90", demo),
    "people": (
        "weizmann4 from scratch, readers video and frames",
        "mean of 3 seeds >= 0.9, each <= 6 min CPU",
        real_people,
    ),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
