from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anal_tools import allowed_pairs, label_errors
from utils.errors import UserError

NAMES = ["hotpot", "food", "a -> b", "jump # high"]


def test_by_hand() -> None:
    # Thresholds: class 0: mean(.9, .6, .3) = .6; class 1: mean(.8, .7) = .75; class 2 has no video.
    scores = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.3, 0.75, 0.0], [0.2, 0.8, 0.0], [0.3, 0.7, 0.0]])
    suspects = label_errors.suspects(scores, np.array([0, 0, 0, 1, 1]))
    assert [(one.row, one.label, one.other, one.score, one.label_score) for one in suspects] == [(2, 0, 1, 0.75, 0.3)]


def test_wrong_labels_are_found_first_and_weak_classes_are_not_accused() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 6, 1200)
    scores = np.full((1200, 6), 0.02)
    scores[np.arange(1200), truth] = generator.uniform(0.6, 0.99, 1200)
    # Class 5 is hard: its own score is low, and class 4's nearly as high. Its labels are right all the same.
    hard = truth == 5
    scores[hard, 5], scores[hard, 4] = 0.40, 0.45
    scores /= scores.sum(axis=1, keepdims=True)
    labels = truth.copy()
    wrong = generator.choice(np.flatnonzero(truth < 4), 40, replace=False)
    labels[wrong] = (labels[wrong] + 1) % 4
    suspects = label_errors.suspects(scores, labels)
    clearest = {one.row for one in suspects[:40]}
    assert len(clearest & set(wrong.tolist())) >= 38
    assert all(one.other == truth[one.row] for one in suspects if one.row in wrong)
    assert not hard[[one.row for one in suspects]].any()


def test_unread_videos_and_no_videos() -> None:
    scores = np.array([[np.nan, np.nan], [0.9, 0.1]])
    assert label_errors.suspects(scores, np.array([0, 0])) == []
    assert label_errors.suspects(scores[:1], np.array([0])) == []


def test_rules(tmp_path: Path) -> None:
    file = tmp_path / "good pairs.txt"
    file.write_text("\ufeff# comment\n\nhotpot -> food\n 3<->1 # both ways\n", "utf-8")
    allowed = allowed_pairs.read(file, NAMES)
    assert allowed == {(0, 1), (3, 1), (1, 3)}
    predicted, labels = np.array([1, 0, 1, -1, 2]), np.array([0, 1, 3, 0, 2])
    assert allowed_pairs.accuracy(predicted, labels, allowed) == 3 / 5
    assert allowed_pairs.accuracy(predicted, labels, frozenset()) == 1 / 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hotpot food", "is not a rule"),
        ("hotpot ->", "is not a rule"),
        ("hotpot -> fod", "did you mean food"),
        ("hotpot -> 4", "no class '4'"),
        ("1 -> food", "both sides"),
    ],
)
def test_bad_rules_name_their_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "pairs.txt"
    file.write_text(f"hotpot -> food\n{line}\n")
    with pytest.raises(UserError, match=message) as caught:
        allowed_pairs.read(file, NAMES)
    assert f"{file}:2:" in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        allowed_pairs.read(tmp_path / "none", NAMES)
