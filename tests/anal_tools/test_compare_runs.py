"""Runs that differ in their seed alone, and folds side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anal_tools import compare, compare_runs
from tests.evaluated import guessed, write_results
from utils.errors import UserError

LABELS = [0, 1] * 10


def run(tmp_path: Path, name: str, right: int, *, seed: int, **config: object) -> str:
    """A result with the first `right` of 20 videos right."""
    guesses = [label if row < right else 1 - label for row, label in enumerate(LABELS)]
    exp = tmp_path / name
    write_results(exp, labels=LABELS, logits=guessed(guesses, 2), names=["a", "b"], config={"seed": seed, **config})
    return str(exp)


def test_seeds_of_a_recipe_are_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [run(tmp_path, f"a{seed}", 10 + seed, seed=seed, rate=1) for seed in range(3)]
    second = [run(tmp_path, f"b{seed}", 18, seed=seed, rate=2) for seed in range(2)]
    assert compare.main(["--seeds", *first, *second]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        f"{tmp_path.name}/a0: 3 seeds, top-1 mean 55.00, std 5.00 (50.00 to 60.00), 95 % interval over 20" in lines[0]
    )
    assert "b0: 2 seeds, top-1 mean 90.00, std 0.00 (90.00 to 90.00)" in lines[1]
    assert "20 videos in common: +35.00 points of top-1, 95 % interval +" in lines[3]
    assert "the second is better" in lines[3]
    with pytest.raises(UserError, match="two runs of one recipe with seed 0"):
        compare.main(["--seeds", *first, run(tmp_path, "again", 3, seed=0, rate=1)])


def test_a_difference_of_nothing_may_be_chance(tmp_path: Path) -> None:
    runs = [run(tmp_path, f"{rate}", 10, seed=0, rate=rate) for rate in (1, 2)]
    text = compare_runs.seeds_text([compare.load(one) for one in runs])
    assert text[-1].endswith(
        "+0.00 points of top-1, 95 % interval +0.00 to +0.00 (bootstrap over videos; the difference may be chance)"
    )


def test_folds_are_counted(tmp_path: Path) -> None:
    names = ("01", "02", "03")
    results = []
    for name, tops in (("a", (50.0, 60.0, 70.0)), ("b", (55.0, 60.0, 80.0))):
        folds = {fold: {"videos": 4, "top1": top1} for fold, top1 in zip(names, tops, strict=True)}
        exp = write_results(tmp_path / name, labels=LABELS, logits=guessed(LABELS, 2), names=["a", "b"], folds=folds)
        results.append(compare.load(str(exp)).results)
    (line,) = compare_runs.folds_line(*results)
    assert line == "  of 3 folds the second is better in 2, the first in 0: mean difference +5.00, std 5.00"
    assert np.isclose(5.0, np.std([5, 0, 10], ddof=1))
    results[1].summary["folds"] = {}
    assert compare_runs.folds_line(*results) == []
