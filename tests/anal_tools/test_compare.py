from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anal_tools import compare
from anal_tools.evaluate.results import Results
from tests.evaluated import guessed, write_results
from utils.errors import UserError

NAMES = ["a", "b <i>", "c"]


def make(exp: Path, labels: list[int], guesses: list[int | None], ids: list[str], **summary: Any) -> Path:
    return write_results(exp, labels=labels, logits=guessed(guesses, 3), names=NAMES, ids=ids, **summary)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 3), (5, 12), (12, 5), (40, 61)])
def test_mcnemar_against_the_binomial_distribution(only_a: int, only_b: int) -> None:
    total, least = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(total, i) for i in range(least + 1)) / 2**total
    assert compare.mcnemar(only_a, only_b) == pytest.approx(min(1.0, 2 * tail), rel=1e-12)


def test_mcnemar_against_the_chi_square_of_large_numbers() -> None:
    # Edwards' correction approximates it: chi square = (|b - c| - 1)^2 / (b + c), one degree of freedom.
    for only_a, only_b in ((101, 59), (4000, 4200), (9000, 9900)):
        chi = (abs(only_a - only_b) - 1) ** 2 / (only_a + only_b)
        assert compare.mcnemar(only_a, only_b) == pytest.approx(math.erfc(math.sqrt(chi / 2)), rel=0.1)
    assert compare.mcnemar(0, 20000) < 1e-300


def test_videos_are_found_by_their_paths(tmp_path: Path) -> None:
    make(tmp_path / "x/a", [0, 1, 2, 2, 0], [0, 0, 2, 2, 1], ["p", "q", "r", "r", "only a"])
    make(tmp_path / "x/b", [2, 2, 1, 0, 1], [2, 0, 1, 0, 1], ["r", "r", "q", "p", "only b"])
    pairing = compare.pair(Results.load(tmp_path / "x/a"), Results.load(tmp_path / "x/b"))
    assert pairing.rows_a.tolist() == [0, 1, 2, 3]
    assert pairing.rows_b.tolist() == [3, 2, 0, 1]  # the second r of one list is the second r of the other
    assert pairing.right_a.tolist() == [True, False, True, True]
    assert pairing.right_b.tolist() == [True, True, True, False]
    assert (pairing.only_a, pairing.only_b, pairing.difference) == (1, 1, 0.0)
    assert pairing.change.tolist() == [0.0, 1.0, -0.5]


def test_what_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [f"v{i}" for i in range(30)]
    labels = [i % 3 for i in range(30)]
    config = {"model": {"type": "tsn", "dropout": 0.5}, "seed": 1}
    a = make(tmp_path / "x/a", labels, [0] * 30, ids, config=config, metrics={"top1": 100 / 3, "top5": 100.0})
    changed = {"model": {"type": "tsm", "dropout": 0.5}, "seed": 1, "new": "key"}
    b = make(tmp_path / "x/b", labels, [*labels[:29], None], ids, config=changed, metrics={"top1": 96.7, "top5": 100.0})
    out = tmp_path / "table.csv"
    assert compare.main([str(a), f"{b}:best", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "x/a" in shown
    assert "30 videos in common: +63.33 points of top-1" in shown
    assert "only the first right 0, only the second 19: McNemar p = 3.81e-06 (the second is better)" in shown
    assert "b <i>  +100.0" in shown
    assert "config.model.type: tsn | tsm" in shown
    assert "config.new: null | key" in shown
    assert "dropout" not in shown
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", "name", "x/a", "x/b best"]
    assert rows[2] == ["1", "b <i>", "0.0000", "1.0000"]
    assert rows[3] == ["2", "c", "0.0000", "0.9000"]


def test_the_first_can_be_the_better_one(tmp_path: Path) -> None:
    ids = [f"v{i}" for i in range(20)]
    a, b = (make(tmp_path / name, [0] * 20, [guess] * 20, ids) for name, guess in (("a", 0), ("b", 1)))
    pairing = compare.pair(Results.load(a), Results.load(b))
    assert compare.verdict(pairing) == "the first is better"
    assert pairing.difference == -100.0
    assert np.isnan(pairing.change[1])  # a class without videos did not move


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = make(tmp_path / "a", [0, 1], [0, 1], ["p", "q"])
    other = write_results(tmp_path / "k", labels=[0, 1], logits=guessed([0, 1], 2), names=["a", "b"], ids=["p", "q"])
    label = make(tmp_path / "l", [1, 1], [0, 1], ["p", "q"])
    nothing = make(tmp_path / "n", [0, 1], [0, 1], ["r", "s"])
    for exp, message in ((other, "classes differ"), (label, "p: label 0 in one list and 1"), (nothing, "no video in")):
        with pytest.raises(UserError, match=message):
            compare.main([str(a), str(exp)])
    with pytest.raises(UserError, match="at least two"):
        compare.main([str(a)])
