"""What version 0.1.0 left on disk opens: a stopped run, evaluations, a scan, shards, lists and a config.

The files are in `tests/data/v0_1`; `make.py` there says how they were written.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.copies import ROOT, copy_repository, run_in

OLD = ROOT / "tests" / "data" / "v0_1"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the network of the old run; `data/old` holds what that version left."""
    target = copy_repository(tmp_path_factory.mktemp("old") / "zoetrope")
    shutil.copy(OLD / "toy.py", target / "methods" / "toy.py")
    data = target / "data" / "old"
    words = ("demo-data", "--out", data, "--train", "16", "--val", "8", "--workers", "2")
    run_in(target, sys.executable, "main.py", *words)
    for name in ("exp", "scan", "pack", "lists"):
        shutil.copytree(OLD / name, data / name, dirs_exist_ok=True)
    return target


def verb(copy: Path, *words: str) -> str:
    return run_in(copy, sys.executable, "main.py", *words)


def losses(text: str) -> dict[int, float]:
    """Return iteration -> loss of the progress lines."""
    return {int(k): float(loss) for k, loss in re.findall(r"Iter: \[(\d+)/6\].* Loss ([\d.]+) ", text)}


def test_a_stopped_run_resumes(copy: Path) -> None:
    exp = copy / "data/old/run"
    shutil.copytree(OLD / "exp", exp)
    before = losses((exp / "log.txt").read_text())
    verb(copy, "train", str(exp))

    text = (exp / "log.txt").read_text()
    resumed = losses(text.split("experiment ")[-1])
    assert sorted(resumed) == [3, 4, 5, 6]
    assert {k: resumed[k] for k in (3, 4)} == pytest.approx({k: before[k] for k in (3, 4)}, abs=2e-3)
    assert "finished: 6 iterations" in text


def test_finished_results_open(copy: Path) -> None:
    summary = json.loads((OLD / "exp/results/finished.json").read_text())
    assert f"{summary['metrics']['top1']:.2f}" in verb(copy, "score", "data/old/exp:finished")
    verb(copy, "analyze", "data/old/exp", "--name", "finished")
    verb(copy, "report", "data/old/exp:finished")
    assert (copy / "data/old/exp/report/index.html").is_file()


def test_a_stopped_evaluation_is_finished(copy: Path) -> None:
    # Its settings are not all known, so its rows may be scored again; the result has every video once.
    verb(copy, "eval", "data/old/exp", "--name", "stopped")
    summary = json.loads((copy / "data/old/exp/results/stopped.json").read_text())
    assert summary["counts"]["videos"] == 8
    verb(copy, "eval", "data/old/exp", "--name", "calm")
    calm = json.loads((copy / "data/old/exp/results/calm.json").read_text())
    assert summary["metrics"] == calm["metrics"]


def test_a_scan_cache_is_refused_with_the_command_that_makes_it(copy: Path) -> None:
    exp = copy / "data/old/with_facts"
    shutil.copytree(OLD / "exp", exp)
    # Version 0.1.0 counted the frames of some AVI files wrongly, so nothing that it found out is used.
    words = ("main.py", "train", str(exp), "--set", "common.data.facts=data/old/scan/facts.bin")
    output = run_in(copy, sys.executable, *words, codes=(2,))
    assert "main.py scan" in output
    assert output.count("config: data.facts is called data.metadata now") == 1

    # The scan belongs to the folder in which it was made: the copy is refused with the way out.
    words = ("main.py", "scan", "--root", "data/old", "data/old/lists/train.txt", "--out", "data/old/scan")
    assert "with another --out" in run_in(copy, sys.executable, *words, codes=(2,))


def test_shards_are_read(copy: Path) -> None:
    sets = ("data.reader=frames", "val_root=data/old/pack", "val_source=data/old/pack/val.txt")
    words = [word for text in sets for word in ("--set", f"common.{text}")]
    verb(copy, "eval", "data/old/exp", "--name", "pack", *words)
    summary = json.loads((copy / "data/old/exp/results/pack.json").read_text())
    assert summary["counts"]["failed"] == 0
