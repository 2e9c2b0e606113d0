from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from anal_tools import analyze, get_reference_results, results
from utils.faults import UserError

NAMES = ["left $x$", "ri\tght\n", 'q"u,o \\', "\u65e5\u672c <b>", "never", "bad \udcff"]
LABELS = [0, 0, 0, 1, 1, 2, 2, 3, 3, 5]
GUESSES = [0, 1, 1, 1, 0, 2, 2, 3, None, 5]  # None: could not be read


def make(exp: Path, labels: list[int], guesses: list[int | None], names: list[str], name: str = "best") -> None:
    """Result files as an evaluation leaves them, two views per video, later videos more confident."""
    logits = np.zeros((len(labels), 2, len(names)), dtype=np.float32)
    for row, guess in enumerate(guesses):
        logits[row] = np.nan if guess is None else np.eye(len(names))[guess] * (2 + row / 10)
    parts = exp / "results" / name
    parts.mkdir(parents=True)
    ids = [f"dir with space/video {row} 7 8.mp4" for row in range(len(labels))]
    (parts / "ids.txt").write_text("".join(json.dumps(path) + "\n" for path in ids))
    np.save(parts / "labels.npy", np.array(labels, dtype=np.int32))
    np.save(parts / "logits.npy", logits)
    np.save(parts / "scores.npy", results.softmax(logits).mean(axis=1))
    summary = {"class_names": names, "metrics": {}, "protocol": {"text": "1 clip"}}
    (exp / "results" / f"{name}.json").write_text(json.dumps(summary))


def test_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, LABELS, GUESSES, NAMES)
    assert analyze.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "best: 10 videos, 6 classes" in shown
    assert "top-1 60.00" in shown
    assert "1 videos could not be read and count as wrong" in shown
    assert re.search(r"left \$x\$ +1 of 3 right", shown)
    assert "1 classes have no video" in shown
    for file in ("reference_result.txt", "top100_errors.txt", "top100_videos.txt", "confusion_matrix.csv"):
        assert (tmp_path / "results" / file).is_file()
        assert str(tmp_path / "results" / file) in shown

    lines = (tmp_path / "results/reference_result.txt").read_text().splitlines()
    rows = [line.rsplit(" ", 3) for line in lines]
    assert rows[1] == ["dir with space/video 1 7 8.mp4", "2.10", "1", "0"]
    assert rows[8] == ["dir with space/video 8 7 8.mp4", "nan", "-1", "3"]
    assert [int(row[3]) for row in rows] == LABELS

    errors = (tmp_path / "results/top100_errors.txt").read_text("utf-8").splitlines()
    assert errors == [
        "gt:0(left $x$)\tpred:1(ri\\tght\\n)\tcount:2\tprec:0.3333\terr0.6667\tgt_samples:3/10",
        "gt:1(ri\\tght\\n)\tpred:0(left $x$)\tcount:1\tprec:0.5000\terr0.5000\tgt_samples:2/10",
    ]
    videos = [line.split("\t") for line in (tmp_path / "results/top100_videos.txt").read_text("utf-8").splitlines()]
    assert [row[0].split()[3] for row in videos] == ["4", "2", "1"]  # most confident first
    assert all(len(row) == 5 for row in videos)

    with open(tmp_path / "results/confusion_matrix.csv", encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert len(table) == 7
    assert all(len(row) == 7 for row in table)
    assert table[1] == ["0(left $x$)", "1", "2", "0", "0", "0", "0"]
    assert table[5][1:] == ["0"] * 6  # a class that never occurs keeps its row

    picture = cv2.imread(str(tmp_path / "results/confusion_matrix.png"))
    assert picture is not None
    assert min(picture.shape[:2]) > 500


def test_errors_come_by_count_and_stop_at_a_hundred() -> None:
    generator = np.random.default_rng(0)
    matrix = generator.integers(0, 50, (30, 30))
    lines = analyze.error_lines(matrix, matrix.sum(axis=1), [f"c{k}" for k in range(30)])
    counts = [int(re.search(r"count:(\d+)", line).group(1)) for line in lines]  # type: ignore[union-attr]
    off = matrix[~np.eye(30, dtype=bool)]
    assert counts == sorted(off.tolist(), reverse=True)[:100]
    for line in lines:
        true, guess = (int(text) for text in re.match(r"gt:(\d+)\(.*?\)\tpred:(\d+)\(", line).groups())  # type: ignore[union-attr]
        assert true != guess
        assert f"err{matrix[true, guess] / matrix[true].sum():.4f}\t" in line


def test_many_classes(tmp_path: Path) -> None:
    labels = list(range(130)) * 2
    guesses = [(label + (row > 200)) % 130 for row, label in enumerate(labels)]
    make(tmp_path, labels, guesses, [f"class {k}" for k in range(130)])
    text = analyze.run(tmp_path)
    assert "worst classes" in text
    picture = cv2.imread(str(tmp_path / "results/confusion_matrix.png"))
    assert picture is not None
    assert min(picture.shape[:2]) > 1500


def test_perfect_model(tmp_path: Path) -> None:
    make(tmp_path, [0, 1], [0, 1], ["a", "b"])
    text = analyze.run(tmp_path)
    assert "top-1 100.00" in text
    assert "worst" not in text
    assert (tmp_path / "results/top100_errors.txt").read_text() == ""


def test_the_last_evaluation_or_the_named_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, [0, 1], [0, 1], ["a", "b"], "first")
    make(tmp_path, [0, 1], [1, 0], ["a", "b"], "second")
    for order, name in enumerate(("first", "second")):
        stamp = 1_000_000_000 + order
        os.utime(tmp_path / "results" / f"{name}.json", (stamp, stamp))
    assert analyze.run(tmp_path).startswith("second: 2 videos")
    assert analyze.run(tmp_path, "first").startswith("first: 2 videos")
    assert get_reference_results.main([str(tmp_path), "--name", "second"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "results/reference_result.txt")
    assert (tmp_path / "results/reference_result.txt").read_text().splitlines()[0].endswith("2.00 1 0")


def test_nothing_to_analyse(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results yet; run `python main\.py eval"):
        analyze.run(tmp_path)
    make(tmp_path, [0, 3], [0, 1], ["a", "b"])
    with pytest.raises(UserError, match=r"a label outside 0\.\.1"):
        analyze.run(tmp_path)
    np.save(tmp_path / "results/best/labels.npy", np.zeros(5, dtype=np.int32))
    with pytest.raises(UserError, match="different numbers of videos"):
        analyze.run(tmp_path)


@pytest.mark.parametrize("text", ["a b", "\u65e5", 'it\'s "x"'])
def test_one_line_leaves_ordinary_text(text: str) -> None:
    assert get_reference_results.one_line(text) == text


def test_one_line_escapes_what_breaks_lines() -> None:
    assert get_reference_results.one_line("a\tb\nc\r\x1b\u2028\x85") == "a\\tb\\nc\\r\\x1b\\u2028\\x85"
