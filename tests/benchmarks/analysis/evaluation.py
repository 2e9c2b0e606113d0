"""Evaluations: exact on any world size and chunk, killed, rescored; metrics; time and memory beside MMAction2."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.experiments import demo_videos
from tests.benchmarks.rows import ROOT, SHARED, command, environment, run_rows, workspace

PEERS = ROOT.parent / "shared/tools/peers"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

EXPERIMENT = """\
common:
    model: {{type: {method}, backbone: {backbone}, num_segments: 1, num_class: {classes}, kwargs: {{{kwargs}}}}}
    augmentation: {{input_size: {crop}, test_resize: {scale}}}
    data: {{reader: video, sampling: {sampling}, clip_len: 8, frame_interval: {interval}}}
    workers: {workers}
    batch_size: 4
    lr_scheduler: {{type: COSINE, base_lr: 0.01, max_iter: 10}}
    val_freq: 10
    train_root: {root}
    train_source: {source}
    val_root: {root}
    val_source: {source}
"""


def experiment(folder: Path, **values: Any) -> Path:
    """An experiment with random weights whose scores differ from view to view."""
    import torch

    from tests import models
    from utils import checkpoint

    defaults = {"method": "slowonly", "backbone": "resnet18", "classes": 8, "kwargs": "", "sampling": "pyslowfast"}
    values = defaults | {"interval": 1, "crop": 56, "scale": 64, "workers": 1} | values
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(EXPERIMENT.format(**values))
    torch.manual_seed(0)
    net = models.build(
        type=values["method"], backbone=values["backbone"], num_class=values["classes"], num_segments=8,
        zero_init_residual=False,
    )  # fmt: skip
    torch.nn.init.normal_(net.classifier.weight, std=0.5)
    with torch.inference_mode():
        grey = net.eval()(torch.zeros(1, 3, 8, 64, 64))[0]
    net.classifier.bias.data -= grey  # what all clips have in common
    checkpoint.save(folder, checkpoint.LATEST, {"model": net.state_dict(), "step": 0})
    return folder


def videos_of(work: Path, count: int) -> dict[str, Path]:
    """A list of so many demo videos, as config values."""
    data = demo_videos(work / "videos", 48, 24)
    lines = [*(data / "lists/val.txt").read_text().splitlines(), *(data / "lists/train.txt").read_text().splitlines()]
    source = data / f"first{count}.txt"
    source.write_text("\n".join(lines[:count]) + "\n")
    names = data / "lists/classInd.txt"
    if names.is_file():
        (data / "classInd.txt").write_bytes(names.read_bytes())
    return {"root": data, "source": source}


def load(exp: Path, name: str) -> Any:
    """The results of one evaluation."""
    from anal_tools.evaluate.results import Results

    return Results.load(exp, name)


# ---------------------------------------------------------------------------------------------------------------- rows


def exact(work: Path) -> dict:
    """23 videos x 30 views on 1, 2 and 3 ranks, 1, 7 and 30 views at once: scores of every view."""
    from utils.metrics import probabilities

    exp = experiment(work / "exact", **videos_of(work, 23))
    reference, worst, once = None, 0.0, True
    for ranks in (1, 2, 3):
        for chunk in (1, 7, 30):
            name = f"r{ranks}c{chunk}"
            options = ("--views", "10x3", "--chunk", str(chunk), "--name", name)
            command("-m", "launch", "eval", exp, "local", str(ranks), *options, env=ONE_THREAD)
            results = load(exp, name)
            scores = probabilities(np.asarray(results.logits))
            reference = scores if reference is None else reference
            worst = max(worst, float(np.abs(scores - reference).max()))
            counts = results.summary["counts"]
            once &= counts["videos"] == counts["scored"] == results.summary["metrics"]["num_videos"] == 23
            once &= len(set(results.ids)) == 23
    return {"measured": {"largest_difference": worst, "each_once": once}, "holds": once and worst <= 1e-5}


def kill(work: Path) -> dict:
    """kill -9 at ten moments of an evaluation of 64 videos; it is started again each time."""
    exp = experiment(work / "killed", crop=112, scale=112, **videos_of(work, 64))
    options = ["--views", "10x1", "--chunk", "5"]
    command("main.py", "eval", exp, *options, "--name", "calm", env=ONE_THREAD)
    generator, kills, resumed, name = random.Random(4), 0, 0, "killed"
    argv = [sys.executable, "main.py", "eval", str(exp), *options, "--name", name]
    env, log = environment(ONE_THREAD), work / "killed.out"
    while True:
        with log.open("wb") as output:
            process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True)
            try:
                if kills == 1:  # so that at least one start finds something to resume from
                    _wait_for_part(process, exp / "results" / name)
                # Parts are written every 10 s after a start of some 5 s: most moments fall before the first, between
                # two or into the writing of one, and the evaluation outlasts ten of them.
                limit = 1.0 if kills == 0 else generator.uniform(0, 3) if kills == 1 else generator.uniform(2, 20)
                code = process.wait(limit if kills < 10 else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
                kills += 1
        resumed += b"resuming: " in log.read_bytes()
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise RuntimeError(f"eval left with {code}: {log.read_text()[-1500:]}")
    calm, rough = load(exp, "calm"), load(exp, name)
    same = all(
        np.array_equal(getattr(calm, key), getattr(rough, key)) for key in ("logits", "scores", "labels", "frames")
    )
    same &= calm.ids == rough.ids and calm.summary["metrics"] == rough.summary["metrics"]
    left = [path.name for path in (exp / "results" / name).iterdir() if path.name.startswith("part")]
    measured = {"kills": kills, "starts_that_resumed": resumed, "identical": same, "left_over": left}
    return {"measured": measured, "holds": kills == 10 and resumed > 0 and same and not left}


def _wait_for_part(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until an evaluation has kept something, or ended."""
    while process.poll() is None and not list(folder.glob("part*")):
        time.sleep(0.05)


def rescoring(work: Path) -> dict:
    """1, 3 and 10 views out of 30 kept ones, three averages, against evaluations of their own."""
    from anal_tools.evaluate import scoring

    exp = experiment(work / "rescored", **videos_of(work, 23))
    command("main.py", "eval", exp, "--views", "10x3", "--name", "thirty", env=ONE_THREAD)
    large = load(exp, "thirty")
    gaps, notes = {}, []
    for views in ("1x1", "1x3", "10x1"):
        for average in ("prob", "logit", "sum"):
            name = f"{views}-{average}"
            command("main.py", "eval", exp, "--views", views, "--average", average, "--name", name, env=ONE_THREAD)
            chosen = scoring.smaller(scoring.kept_protocol(large), views, average)
            notes += [chosen.note] if chosen.note else []
            gaps[name] = float(np.abs(scoring.scores_of(large, chosen) - load(exp, name).scores).max())
    return {
        "measured": {"largest_difference": gaps, "notes": notes},
        "holds": max(gaps.values()) <= 1e-5 and not notes,
    }


def metrics() -> dict:
    """Every metric on random data, against scikit-learn or the formula."""
    done = command("-m", "pytest", "-q", "tests/utils/test_metrics.py", "tests/utils/test_ranking.py", check=False)
    worst = differences()
    measured = {"worst": worst, "tests": done.stdout.strip().splitlines()[-1]}
    return {"measured": measured, "holds": done.returncode == 0 and max(worst.values()) <= 1e-9}


def differences() -> dict[str, float]:
    """Largest distance of each metric to its reference over ten random lists."""
    from sklearn.metrics import average_precision_score, precision_score, recall_score, top_k_accuracy_score

    from utils import metrics as ours
    from utils import ranking

    each: Any = None  # scikit-learn annotates neither None nor nan here
    no_video: Any = np.nan
    worst: dict[str, float] = {}
    for seed in range(10):
        generator = np.random.default_rng(seed)
        scores = ours.probabilities(generator.normal(size=(500, 12)) * 2)
        labels = np.concatenate([np.arange(12), generator.integers(0, 12, 488)])
        targets = np.eye(12, dtype=bool)[labels] | (generator.random((500, 12)) < 0.1)
        predicted = ranking.predictions(scores)
        precision, recall = ours.precision_and_recall(predicted, labels, 12)
        known = np.asarray(recall_score(labels, predicted, average=each))
        pairs = {
            "top1": (ours.top_k_accuracy(scores, labels, 1), top_k_accuracy_score(labels, scores, k=1)),
            "top5": (ours.top_k_accuracy(scores, labels, 5), top_k_accuracy_score(labels, scores, k=5)),
            "class_mean": (ours.mean_class_accuracy(predicted, labels, 12), known.mean()),
            "precision": (precision, precision_score(labels, predicted, average=each, zero_division=no_video)),
            "recall": (recall, known),
        }
        reference = average_precision_score(targets, scores, average=each)
        pairs["average_precision"] = (ranking.average_precision(scores, targets), reference)
        for name, (value, reference) in pairs.items():
            gap = float(np.nanmax(np.abs(np.asarray(value) - np.asarray(reference))))
            worst[name] = max(worst.get(name, 0.0), gap)
    return worst


# -------------------------------------------------------------------------------------------------------- bench_dense

MODELS = {"slowonly": ("slowonly", 0.85), "tpn": ("tpn_slowonly", 0.95)}  # ours: (theirs, bound on the ratio of CPU)


def bench_dense(work: Path) -> dict:
    """30 views at 112, ours and mmaction2's own test alternately on the same videos, one thread."""
    sources = [SHARED / "single/mmaction2" / name for name in ("demo.mp4", "test.mp4")]
    data = work / "bench"
    _peers("data", "--out", data, "--videos", *sources)
    measured, holds = {}, True
    for ours, (theirs, bound) in MODELS.items():
        values = {
            "root": data / "videos",
            "source": data / "list_videos.txt",
            "classes": 400,
            "sampling": "mmaction2_1x",
        }
        sizes = {"backbone": "resnet50", "interval": 8, "crop": 112, "scale": 112, "workers": 0}
        exp = experiment(work / f"bench-{ours}", method=ours, kwargs="zero_init_residual: False", **values, **sizes)
        words = ["main.py", "benchmark", "eval", exp, "--protocol", "k400-10x3", "--scale", "112", "--json"]
        words += ["--videos", "2", "--warmup", "0", "--threads", "1"]
        line = shlex.join([sys.executable, *map(str, words)])
        default, five = (
            _pair(line, "cpu_s_per_video", "cpu_s_per_video", [theirs, "--data", str(data), *more], rounds)
            for more, rounds in (([], 5), (["--max-views", "5"], 3))
        )
        memory = _pair(line, "memory_above_model_mb", "rss_above_model_mb", [theirs, "--data", str(data)], 1)
        figures = {"cpu_of_default": default, "cpu_of_max_views_5": five, "memory_of_default": memory}
        measured[ours] = {name: round(1 / pair["median"], 3) for name, pair in figures.items()}
        measured[ours] |= {"rounds": [round(1 / ratio, 3) for ratio in default["ratios"]]}
        holds &= measured[ours]["cpu_of_default"] <= bound and measured[ours]["cpu_of_max_views_5"] <= 1.0
        holds &= measured[ours]["memory_of_default"] <= 0.45
    return {"measured": measured, "holds": holds}


def _peers(*words: object) -> str:
    argv = [str(PEERS), *map(str, words)]
    done = subprocess.run(argv, env=environment(ONE_THREAD), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peers {words[0]}: {(done.stdout + done.stderr)[-1500:]}")
    return done.stdout


def _pair(ours: str, field: str, their_field: str, theirs: list[str], rounds: int) -> dict[str, Any]:
    """What `peers pair` prints; its ratios are theirs/ours."""
    words = ["pair", "--ours", ours, "--theirs", shlex.join(["bench-dense", *theirs]), "--field", field]
    words += ["--their-field", their_field, "--lower-is-better", "--rounds", str(rounds), "--threads", "1", "--json"]
    return json.loads(_peers(*words).strip().splitlines()[-1])


ROWS = {
    "exact": (
        "world size 1, 2, 3 and chunk 1, 7, 30 on 23 videos",
        "per-view scores <= 1e-5, each video once",
        lambda: exact(workspace()),
    ),
    "bench_dense": (
        "30 views at 112 on CPU, paired against mmaction2 1.2.0's own test, CPU-seconds, one thread",
        "SlowOnly <= 0.85x, TPN <= 0.95x; <= 1.0x its --max-views 5; memory above the model <= 0.45x",
        lambda: bench_dense(workspace()),
    ),
    "kill": ("kill -9 at 10 moments of an evaluation", "continues, result identical", lambda: kill(workspace())),
    "metrics": ("metrics on random data", "scikit-learn or the formula, 1e-9", metrics),
    "rescoring": ("1, 3, 10 out of 30 kept views", "running those protocols, 1e-5", lambda: rescoring(workspace())),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
