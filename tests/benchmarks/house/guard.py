"""Compare the numbers of the work tree with those of a base commit: a refactoring must not change one bit.

    python -m tests.benchmarks.house.guard --base COMMIT [--only tsn_2_ranks,eval]

Both trees run the same commands, one after the other, in the same folders on this machine: float64 training steps on
1, 2 and 3 ranks, a kill and a resume, an evaluation, its analysis and its report. Only the command line and the files
that a user keeps are looked at, so code may move freely. Hashes of weights depend on the machine; nothing is stored.

A name that was changed on purpose stands in `RENAMED`: old key -> new key, applied to the base before comparing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import renamed

ROOT = Path(__file__).resolve().parents[3]

# Keys of checkpoints, curves and summaries that the work tree calls otherwise: old name -> new name.
RENAMED = renamed.CHECKPOINT_KEYS | renamed.METERS | renamed.CURVES

# What depends on the moment or the revision of a run, not on its mathematics.
VOLATILE = {
    "time",
    "data",
    "seconds",
    "date",
    "code",
    "versions",
    "host",
    "command",
    "wall",
    "token",
    "created",
    "finished",
}

CONFIG = """\
common:
    model:
        type: {method}
        backbone: {backbone}
        num_segments: 2
        num_class: 8
        dropout: 0.5
        pretrained: False
        kwargs: {{bn_group_size: {group}, bn_sync_stats: {sync_stats}}}
    augmentation:
        input_size: 32
        test_resize: 36
        crop: random_resized
        colorjitter: [0.2, 0.2, 0.2, 0.1]
        random_erasing: [0.5, 0.02, 0.4, 0.3]
        mix_up: 0.2
    data: {{reader: video, sampling: tsn}}
    precision: {precision}
    deterministic: True
    workers: {workers}
    batch_size: 2
    {more}
    lr_scheduler: {{type: COSINE, base_lr: 0.01, warmup_steps: 2, warmup_lr: 0.02, max_iter: 4}}
    label_smooth: 0.1
    no_wd: True
    momentum: 0.9
    weight_decay: 0.0001
    nesterov: True
    val_freq: 2
    print_freq: 1
    train_root: {data}
    train_source: {data}/lists/train.txt
    val_root: {data}
    val_source: {data}/lists/val.txt
"""


@dataclass(frozen=True)
class Case:
    """One training run: its settings, the number of ranks, and the fail point at which a first start is killed."""

    ranks: int
    method: str = "tsn"
    backbone: str = "mobilenetv2"
    group: int = 1
    sync_stats: bool = True
    precision: str = "fp64"
    workers: int = 1
    more: str = ""
    kill: str = ""


CASES = {
    "tsn_1_rank": Case(1, more="ema: 0.9"),
    "tsm_killed": Case(1, "tsm", "resnet18", workers=0, more="clip_grad: 1.0", kill="checkpoint.replace:0:1"),
    "precise_bn": Case(1, more="precise_bn: {batches: 2}"),
    "tsn_2_ranks": Case(2, group=2, sync_stats=False, more="shards: 4"),
    "tsn_3_ranks": Case(3, group=3, kill="checkpoint.linked:0:2"),
    "mixed_precision": Case(1, "tsm", "mobilenetv2", precision="bf16"),
}


class Tree:
    """One checkout, and how its commands are run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *words: str | Path, allowed: tuple[int, ...] = (0,), env: Mapping[str, str] | None = None) -> str:
        """Run `python WORDS` in this tree; return its stdout, raise RuntimeError for another exit code."""
        argv = [str(word) for word in words]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("ZOETROPE_")}
        clean |= {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | dict(env or {})
        done = subprocess.run(
            [sys.executable, *argv], cwd=self.root, env=clean, capture_output=True, text=True, check=False
        )
        if done.returncode not in allowed:
            raise RuntimeError(f"{self.root}: {' '.join(argv)} left with {done.returncode}\n{done.stderr[-3000:]}")
        return done.stdout


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Tree]:
    """Yield a clone of this repository at `commit`; it is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:
        target = Path(folder) / "base"
        subprocess.run(["git", "clone", "-q", "--shared", "--no-checkout", ROOT, target], check=True)
        subprocess.run(["git", "checkout", "-q", commit], cwd=target, check=True)
        yield Tree(target)


def train(tree: Tree, case: Case, exp: Path, data: Path) -> None:
    """Train one case in a new folder, with the kill that it asks for."""
    exp.mkdir(parents=True)
    settings = {name: getattr(case, name) for name in case.__dataclass_fields__}
    (exp / "config.yaml").write_text(CONFIG.format(data=data, **settings))
    words = ("-m", "launch", "train", exp, "local", str(case.ranks))
    if case.kill:
        tree.run(*words, env={"ZOETROPE_FAILPOINT": case.kill}, allowed=tuple(range(1, 256)) + (-9,))
    tree.run(*words)


def weights(exp: Path) -> dict[str, str]:
    """Return the sha256 of every tensor and value of the latest and the best checkpoint, by its place."""
    digests: dict[str, str] = {}
    for name in ("ckpt.pth.tar", "ckpt_best.pth.tar"):
        _digest(torch.load(exp / name, weights_only=True), name, digests)
    return digests


def scalars(exp: Path) -> dict[str, str]:
    """Return the curves, without the lines that depend on the speed of the machine."""
    values: dict[str, str] = {}
    for line in (exp / "events/scalars.jsonl").read_text().splitlines():
        row = {key: value for key, value in json.loads(line).items() if not _is_volatile(key)}
        if "step" in row:
            row = {key: value for key, value in row.items() if not re.search("time|second|data|rate|speed|memory", key)}
            values |= {f"{key}@{row['step']}": json.dumps(value) for key, value in row.items() if key != "step"}
    return values


def evaluation(tree: Tree, exp: Path) -> dict[str, str]:
    """Evaluate with several views; return the hashes of all arrays, the summary's numbers and the analysis."""
    tree.run("main.py", "eval", exp, "--views", "1x3", "--name", "guard")
    values: dict[str, str] = {}
    for path in sorted((exp / "results/guard").glob("*.npy")):
        _digest(torch.from_numpy(np.load(path)), path.name, values)
    values["ids"] = _sha((exp / "results/guard/ids.txt").read_bytes())
    summary = json.loads((exp / "results/guard.json").read_text())
    _digest({key: summary[key] for key in ("metrics", "counts", "class_names") if key in summary}, "summary", values)
    text = _without_times(tree.run("main.py", "analyze", exp, "--name", "guard")).split("written:")[0]
    # Numbers, not sentences: a line may be reworded on purpose
    values["analyze"] = " ".join(re.findall(r"\d+(?:\.\d+)?", text))
    tree.run("main.py", "report", f"{exp}:guard")
    blocks = re.findall(
        r'<script type="application/json" id="([^"]+)">(.*?)</script>',
        (exp / "report/index.html").read_text(),
        re.DOTALL,
    )
    page = {name: json.loads(block) for name, block in blocks}
    report = page.pop("report-data")
    _digest(page | {key: report[key] for key in ("classes", "videos", "top", "labels", "allowed")}, "report", values)
    values["pictures"] = json.dumps(sorted(path.name for path in (exp / "report").rglob("*.jpg")))
    return values


def _without_times(text: str) -> str:
    """Drop times and dates of a text."""
    return re.sub(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?|\d+(\.\d+)? s\b|[0-9a-f]{12,64}", "", text)


def _digest(value: Any, place: str, digests: dict[str, str]) -> None:
    """Write hash or text of every leaf of a nested value into `digests`."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not _is_volatile(key):
                _digest(item, f"{place}/{key}", digests)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            _digest(item, f"{place}/{number}", digests)
    elif isinstance(value, torch.Tensor):
        digests[place] = _sha(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    else:
        digests[place] = repr(value)


def _is_volatile(key: object) -> bool:
    return key in VOLATILE or str(key).startswith("config")


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def measure(tree: Tree, folder: Path, data: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """Run the cases in this tree; return what each gave."""
    values: dict[str, dict[str, str]] = {}
    for name in names:
        if name == "eval":
            continue
        exp = folder / name
        train(tree, CASES[name], exp, data)
        values[name] = {**weights(exp), **scalars(exp)}
        print(f"  {name}: {len(values[name])} values", flush=True)
        if "eval" in names and name == names[0]:
            values["eval"] = evaluation(tree, exp)
            print(f"  eval: {len(values['eval'])} values", flush=True)
    return values


def differences(base: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the places whose values differ, after `RENAMED`; a value that the work tree adds is no difference."""
    now_called = {}
    for place, value in base.items():
        for old, new in RENAMED.items():
            place = re.sub(rf"(?<![\w]){re.escape(old)}(?![\w])", new, place)
        now_called[place] = value
    return [place for place, value in now_called.items() if now.get(place) != value]


def compare(base: str, names: list[str], say: Callable[[str], object] = print) -> dict[str, list[str]]:
    """Run base and work tree in the same folders; return the differing places of each case."""
    with tempfile.TemporaryDirectory(prefix="guard-runs-") as place:
        folder, data = Path(place) / "runs", Path(place) / "data"
        here = Tree(ROOT)
        here.run("main.py", "demo-data", "--out", data, "--train", "16", "--val", "8", "--workers", "2")
        results = []
        with checkout(base) as there:
            for label, tree in ((base, there), ("work tree", here)):
                say(f"{label}:")
                results.append(measure(tree, folder, data, names))
                shutil.rmtree(folder)
    return {name: differences(results[0][name], results[1][name]) for name in results[0]}


def main() -> int:
    """Parse the command line; print one JSON line per case. Return 1 if any value differs."""
    parser = argparse.ArgumentParser(description="compare the numbers of the work tree with those of a base commit")
    parser.add_argument("--base", required=True, help="a commit")
    parser.add_argument("--only", default=",".join([*CASES, "eval"]), help="cases, comma separated")
    args = parser.parse_args()
    outcome = compare(args.base, args.only.split(","))
    for name, places in outcome.items():
        print(json.dumps({"case": name, "equal": not places, "differs": places[:20]}))
    return int(any(outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
