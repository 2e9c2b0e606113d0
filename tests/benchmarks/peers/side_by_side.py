"""One recipe trained by MMAction2 1.2.0 and here: accuracy, cost of whole epochs, peak memory.

`$ZOETROPE_MMACTION_PYTHON` names the interpreter of a virtual environment with mmaction2 1.2.0. Data: UCF Sports as
data/README.md lays it out, or in $ZOETROPE_RESULTS_DATA. Both sides have the same lists, the same initial weights (the
peer writes them, we convert), batches, frames, crops, schedule and optimiser, one process and one thread; each draws
its own order, crops and dropout. Every training is a file in $ZOETROPE_ACCEPT_DIR: a row that was stopped resumes.

$ZOETROPE_ACCEPT_RUNS=1 trains fewer seeds than five, $ZOETROPE_ACCEPT_ONLY=tsm one recipe; such a row does not hold.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.analysis.answers import data_folder
from tests.benchmarks.rows import ROOT, environment, run_rows, workspace

WORKER = Path(__file__).with_name("mmaction_trainer.py")
PYTHON = os.environ.get("ZOETROPE_MMACTION_PYTHON", "")
NO_PEER = {"measured": "not measured: $ZOETROPE_MMACTION_PYTHON names no interpreter with mmaction2", "holds": True}
DATA, CLASSES, FOLDS = "ucf_sports", 10, ("01", "02", "03", "04", "05")
RUNS = 5
SIDES = ("ours", "theirs")
WEIGHTS = "pretrained/mobilenetv2_imagenet_features.pth"


@dataclass(frozen=True)
class Recipe:
    """What both sides train with.

    Attributes:
        method, backbone: our `model.type` and `model.backbone`.
        images: whether the backbone starts from ImageNet features.
        frames, interval: of a clip; an interval of 0 takes one frame of each part of the video.
        size: side of a clip, pixels.
        area: range of a training crop's share of the frame.
        epochs, warmup_epochs, batch: length, and clips of a step.
        first_rate, rate: at iteration 0 and at the end of the warm-up.
        decay, clip_grad, dropout: weight decay, largest norm of the gradient, dropout before the classifier.
    """

    method: str
    backbone: str
    images: bool
    frames: int
    interval: int
    size: int
    area: tuple[float, float]
    epochs: int
    warmup_epochs: float
    first_rate: float
    rate: float
    batch: int = 8
    decay: float = 5e-4
    clip_grad: float = 20.0
    dropout: float = 0.5

    def request(self, verb: str, fold: str, seed: int, initial: Path, out: Path) -> dict[str, Any]:
        """What the peer is asked to do."""
        folder = data_folder(DATA)
        lists = {split: str((folder / f"lists/fold{fold}_{split}.txt").resolve()) for split in ("train", "val")}
        places = {"root": str((folder / "videos").resolve()), "initial": str(initial), "out": str(out)}
        images = str((ROOT / WEIGHTS).resolve()) if self.images else ""
        return {**asdict(self), **lists, **places, "images": images, "verb": verb, "seed": seed, "classes": CLASSES}

    def config(self, fold: str, seed: int, initial: Path) -> str:
        """Our config of the same training."""
        folder = data_folder(DATA).resolve()
        shape = f"clip_len: {self.frames}, frame_interval: {self.interval}, " if self.interval else ""
        kwargs = "{zero_init_residual: False}" if self.method == "slowonly" else "{fc_std: 0.001}"
        return f"""\
common:
    model: {{type: {self.method}, backbone: {self.backbone}, num_segments: {1 if self.interval else self.frames},
            num_class: {CLASSES}, dropout: {self.dropout}, pretrained: {initial}, kwargs: {kwargs}}}
    augmentation: {{input_size: {self.size}, test_resize: {self.size}, crop: random_resized, area: {list(self.area)}}}
    data: {{reader: video, sampling: mmaction2_1x, {shape}flip: True}}
    workers: 0
    batch_size: {self.batch}
    shards: 1
    lr_scheduler: {{type: COSINE, base_lr: {self.first_rate}, warmup_epochs: {self.warmup_epochs},
                   warmup_lr: {self.rate}, min_lr: 0.0, max_epoch: {self.epochs}}}
    no_wd: False
    momentum: 0.9
    nesterov: True
    weight_decay: {self.decay}
    clip_grad: {self.clip_grad}
    seed: {seed}
    val_freq_epochs: {self.epochs}
    save_minutes: 600
    print_freq: 1
    train_root: {folder}/videos
    val_root: {folder}/videos
    train_source: {folder}/lists/fold{fold}_train.txt
    val_source: {folder}/lists/fold{fold}_val.txt
"""


# As short as the comparison allows: 50 trainings of each, five seeds on five folds on both sides.
RECIPES = {
    "tsm": Recipe("tsm", "mobilenetv2", True, 8, 0, 96, (0.5, 1.0), 6, 1, 4e-4, 4e-3),
    "slowonly": Recipe("slowonly", "resnet50", False, 4, 8, 64, (0.5, 1.0), 6, 1, 1e-3, 1e-2),
}


@dataclass(frozen=True)
class Training:
    """One training of one side: where its files are, and how it is run."""

    work: Path
    name: str
    recipe: Recipe
    side: str
    fold: str
    seed: int

    @property
    def out(self) -> Path:
        """The answer: curve, scores, CPU seconds and peak memory."""
        return self.work / f"{self.name}-{self.fold}-{self.seed}-{self.side}.json"

    @property
    def initial(self) -> Path:
        """Weights of both sides; those of a seed serve all folds."""
        return self.work / f"{self.name}-{self.seed}-initial.pth"

    def answer(self) -> dict[str, Any]:
        """Train, unless that was done with the same recipe; return the answer."""
        if not (self.out.exists() and self._asked()):
            self._write_initial()
            answer, cost = self._theirs() if self.side == "theirs" else self._ours()
            part = self.out.with_suffix(".part")
            part.write_text(json.dumps(answer | cost))
            part.replace(self.out)
            print(f"{self.out.stem}: {cost['cpu']:.0f} s of CPU time", file=sys.stderr, flush=True)
        return json.loads(self.out.read_text())

    def _asked(self) -> bool:
        """Return True if the files of the training that is there say what this one would."""
        if self.side == "ours":
            return (self.out.with_suffix("") / "config.yaml").read_text() == self._config()
        raw = self.out.with_suffix(".raw")
        return json.loads(raw.with_suffix(".request").read_text()) == json.loads(
            json.dumps(self._request("train", raw))
        )

    def _config(self) -> str:
        return self.recipe.config(self.fold, self.seed, self.initial)

    def _request(self, verb: str, out: Path) -> dict[str, Any]:
        return self.recipe.request(verb, self.fold, self.seed, self.initial, out)

    def _write_initial(self) -> None:
        if not self.initial.exists():
            self._ask("initial", self.initial.with_suffix(".json"))

    def _ask(self, verb: str, out: Path) -> dict[str, float]:
        request = out.with_suffix(".request")
        request.write_text(json.dumps(self._request(verb, out)))
        return _run([PYTHON, "-W", "ignore", str(WORKER), str(request)], self.work, {})

    def _theirs(self) -> tuple[dict[str, Any], dict[str, float]]:
        raw = self.out.with_suffix(".raw")
        cost = self._ask("train", raw)
        return json.loads(raw.read_text()), cost

    def _ours(self) -> tuple[dict[str, Any], dict[str, float]]:
        exp = self.out.with_suffix("")
        exp.mkdir(exist_ok=True)
        (exp / "config.yaml").write_text(self._config())
        main = [sys.executable, str(ROOT / "main.py")]
        cost = _run([*main, "train", str(exp), "--fresh"], ROOT, environment())
        _run([*main, "eval", str(exp), "--checkpoint", "latest", "--name", "latest"], ROOT, environment())
        lines = (exp / "events/scalars.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "loss_train" in row]
        scores = np.load(exp / "results/latest/scores.npy")
        return {"curve": [[row["loss_train"], row["lr"]] for row in rows], "scores": scores.tolist()}, cost


def _run(argv: list[str], folder: Path, env: dict[str, str]) -> dict[str, float]:
    """Run a process to its end; return its CPU and wall seconds and its peak memory, MB."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    log = folder if folder != ROOT else Path(argv[3])
    with (log / "said.txt").open("ab") as output:
        began = time.perf_counter()
        process = subprocess.Popen(argv, cwd=folder, env={**os.environ, **env, **threads}, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        text = (log / "said.txt").read_text(errors="replace")
        raise RuntimeError(f"{' '.join(argv)} left with {process.returncode}: {text[-1500:]}")
    wall = time.perf_counter() - began
    return {"cpu": used.ru_utime + used.ru_stime, "wall": wall, "peak_mb": used.ru_maxrss / 1024}


def chosen() -> dict[str, Recipe]:
    """The recipes that $ZOETROPE_ACCEPT_ONLY names, else all."""
    only = os.environ.get("ZOETROPE_ACCEPT_ONLY")
    return {name: RECIPES[name] for name in (only.split(",") if only else RECIPES)}


# ------------------------------------------------------------------------------------------------------------- accuracy


def labels_of(fold: str) -> np.ndarray:
    """Labels of the held-out videos of a fold."""
    lines = (data_folder(DATA) / f"lists/fold{fold}_val.txt").read_text().splitlines()
    return np.array([int(line.rsplit(None, 1)[1]) for line in lines if line.strip()])


def accuracy(work: Path) -> dict:
    """Each seed on each fold, ours and theirs in turn; difference of the accuracies with a bootstrap over videos."""
    runs = int(os.environ.get("ZOETROPE_ACCEPT_RUNS", RUNS))
    measured: dict[str, Any] = {}
    for name, recipe in chosen().items():
        right: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}  # of each seed (videos,)
        losses: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        for seed in range(runs):
            of_folds: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
            for fold in FOLDS:
                for side in SIDES:
                    answer = Training(work, name, recipe, side, fold, seed).answer()
                    of_folds[side].append(np.array(answer["scores"]).argmax(axis=1) == labels_of(fold))
                    losses[side].append(_quarters([loss for loss, _ in answer["curve"]]))
            for side in SIDES:
                right[side].append(np.concatenate(of_folds[side]))
        measured[name] = _difference(right) | _curves(losses)
    whole = runs >= RUNS and len(measured) == len(RECIPES)
    good = all(one["mean"] >= -0.02 and one["low"] > -0.06 and one["within_spread"] for one in measured.values())
    return {"measured": {"runs": runs, **measured}, "holds": whole and good}


def _difference(right: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Ours less theirs: mean over videos and seeds, and a 95 % interval that draws videos."""
    ours, theirs = (np.mean(right[side], axis=0) for side in SIDES)  # (videos,): share of the seeds that are right
    draws = np.random.Generator(np.random.Philox(0)).integers(0, len(ours), (5000, len(ours)))
    low, high = np.quantile((ours - theirs)[draws].mean(axis=1), [0.025, 0.975])
    numbers = {"ours": ours.mean(), "theirs": theirs.mean(), "mean": (ours - theirs).mean(), "low": low, "high": high}
    return {key: round(float(value), 3) for key, value in numbers.items()}


def _quarters(losses: list[float]) -> list[float]:
    """Mean loss of each quarter of a training."""
    return [float(np.mean(part)) for part in np.array_split(losses, 4)]


def _curves(losses: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Mean training loss of each quarter; within the spread: closer than two standard deviations of single runs."""
    ours, theirs = (np.array(losses[side]) for side in SIDES)  # (trainings, 4)
    spread = 2 * np.maximum(ours.std(axis=0, ddof=1), theirs.std(axis=0, ddof=1))
    near = bool((np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= spread).all())
    shown = {f"{side}_loss": [round(float(v), 3) for v in np.mean(losses[side], axis=0)] for side in SIDES}
    return shown | {"within_spread": near}


# ----------------------------------------------------------------------------------------------------------------- cost


def costs(work: Path, rounds: int = 3, epochs: int = 3) -> dict[str, dict[str, list[float]]]:
    """CPU and wall seconds of an epoch and peak memory of each side, in turn.

    An epoch is what a training of `epochs` costs above one of a single epoch, divided by their difference: starting and
    the last validation are not in it.
    """
    figures: dict[str, dict[str, list[float]]] = {}
    for name, recipe in chosen().items():
        one = figures[name] = {f"{side}_{what}": [] for side in SIDES for what in ("cpu", "wall", "peak_mb")}
        for turn in range(rounds):
            for side in SIDES:
                runs = []
                for length in (1, epochs):
                    short = replace(recipe, epochs=length, warmup_epochs=0.5)
                    runs.append(Training(work, f"cost{turn}-{length}-{name}", short, side, "01", 0).answer())
                for what in ("cpu", "wall"):
                    one[f"{side}_{what}"].append((runs[1][what] - runs[0][what]) / (epochs - 1))
                one[f"{side}_peak_mb"].append(runs[1]["peak_mb"])
    return figures


def cost(work: Path, what: str, *more: str) -> dict:
    """Ours over theirs, the median of the rounds, for each recipe; `what` is judged, `more` is only shown."""
    measured: dict[str, dict[str, Any]] = {}
    for name, one in costs(work).items():
        measured[name] = {}
        for figure in (what, *more):
            pairs = list(zip(one[f"ours_{figure}"], one[f"theirs_{figure}"], strict=True))
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            rounds = [[round(value, 1) for value in pair] for pair in pairs]
            measured[name][figure] = {"ours_over_theirs": round(ratio, 3), "rounds": rounds}
    good = all(one[what]["ours_over_theirs"] <= 0.8 for one in measured.values())
    return {"measured": measured, "holds": len(measured) == len(RECIPES) and good}


ROWS = {
    "peer_accuracy": (
        "the same recipe here and by MMAction2 1.2.0, 5 runs each, pooled over all held-out videos of ucf_sports",
        "mean difference >= -.02, lower 95 % bound > -.06; training loss within the spread of the runs",
        lambda: accuracy(workspace()) if PYTHON else NO_PEER,
    ),
    "peer_epoch_cpu": (
        "CPU seconds of a whole epoch, reading included, ours / MMAction2 1.2.0, 3 rounds in turn",
        "<= .80",
        lambda: cost(workspace(), "cpu", "wall") if PYTHON else NO_PEER,
    ),
    "peer_memory": (
        "peak memory of a training, ours / MMAction2 1.2.0, 3 rounds in turn",
        "<= .80",
        lambda: cost(workspace(), "peak_mb") if PYTHON else NO_PEER,
    ),
}

if __name__ == "__main__":
    sys.exit(run_rows(ROWS, issue="12"))
