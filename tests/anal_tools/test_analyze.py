from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import main
from anal_tools import analyze
from anal_tools import text as text_tools
from anal_tools.evaluate.results import Results
from tests.evaluated import guessed, write_results
from tests.experiment import make as make_experiment
from utils.errors import UserError

NAMES = ["left $x$", "ri\tght\n", 'q"u,o \\', "\u65e5\u672c <b>", "never", "bad \udcff"]
LABELS = [0, 0, 0, 1, 1, 2, 2, 3, 3, 5]
GUESSES = [0, 1, 1, 1, 0, 2, 2, 3, None, 5]  # None: could not be read


def make(exp: Path, labels: list[int], guesses: list[int | None], names: list[str], name: str = "best") -> None:
    """Result files, two views per video, later videos more confident."""
    write_results(exp, labels=labels, logits=guessed(guesses, len(names), views=2), names=names, name=name)


def analysis(matrix: np.ndarray, allowed: frozenset[tuple[int, int]] = frozenset()) -> analyze.Analysis:
    """An analysis with this confusion matrix."""
    labels, predicted = (np.repeat(np.indices(matrix.shape)[axis].ravel(), matrix.ravel()) for axis in (0, 1))
    names = [f"c{k}" for k in range(len(matrix))]
    results = Results.__new__(Results)
    object.__setattr__(results, "labels", labels)
    return analyze.Analysis(results, names, predicted, matrix, matrix.sum(axis=1), allowed)


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An experiment that was analysed, and what was printed."""
    exp = tmp_path_factory.mktemp("analysed")
    make(exp, LABELS, GUESSES, NAMES)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert analyze.main([str(exp)]) == 0
    return exp, shown.getvalue()


def test_the_summary_says_what_is_wrong_and_where_the_files_are(analysed: tuple[Path, str]) -> None:
    exp, shown = analysed
    assert "best: 10 videos, 6 classes" in shown
    assert "top-1 60.00" in shown
    assert "1 videos could not be read and count as wrong" in shown
    assert re.search(r"left \$x\$ +1 of 3 right", shown)
    assert "left $x$ and ri\\tght\\n: 2 videos of the first, 1 of the second" in shown
    assert "1 classes have no video" in shown
    for file in (
        "reference_result.txt", "top100_errors.txt", "top100_videos.txt", "label_suspects.txt", "confusion_matrix.csv",
        "per_class.csv", "confusion_matrix.png",
    ):  # fmt: skip
        assert (exp / "results" / file).is_file()
        assert str(exp / "results" / file) in shown
    assert list((exp / "results").glob("*.tmp")) == []


def test_the_reference_results_have_a_line_per_video(analysed: tuple[Path, str]) -> None:
    exp, _ = analysed
    lines = (exp / "results/reference_result.txt").read_text().splitlines()
    rows = [line.rsplit(" ", 3) for line in lines]
    logits = Results.load(exp).logits
    assert rows[1] == ["dir with space/video 1 7 8.mp4", f"{logits[1].mean(axis=0).max():.2f}", "1", "0"]
    assert rows[8] == ["dir with space/video 8 7 8.mp4", "nan", "-1", "3"]
    assert [int(row[3]) for row in rows] == LABELS


def test_the_worst_pairs_and_videos(analysed: tuple[Path, str]) -> None:
    exp, _ = analysed
    errors = (exp / "results/top100_errors.txt").read_text("utf-8").splitlines()
    assert errors == [
        "gt:0(left $x$)\tpred:1(ri\\tght\\n)\tcount:2\tprec:0.3333\terr0.6667\tgt_samples:3/10",
        "gt:1(ri\\tght\\n)\tpred:0(left $x$)\tcount:1\tprec:0.5000\terr0.5000\tgt_samples:2/10",
    ]
    videos = [line.split("\t") for line in (exp / "results/top100_videos.txt").read_text("utf-8").splitlines()]
    assert [row[0].split()[3] for row in videos] == ["4", "2", "1"]  # most confident first
    assert all(len(row) == 5 for row in videos)


def test_the_confusion_matrix_has_a_row_per_class(analysed: tuple[Path, str]) -> None:
    exp, _ = analysed
    with open(exp / "results/confusion_matrix.csv", encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert len(table) == 7
    assert all(len(row) == 7 for row in table)
    assert table[1] == ["0(left $x$)", "1", "2", "0", "0", "0", "0"]
    assert table[5][1:] == ["0"] * 6  # a class that never occurs keeps its row
    picture = cv2.imread(str(exp / "results/confusion_matrix.png"))
    assert picture is not None
    assert min(picture.shape[:2]) > 500


def test_figures_of_each_class(analysed: tuple[Path, str]) -> None:
    exp, _ = analysed
    with open(exp / "results/per_class.csv", encoding="utf-8", newline="") as file:
        classes = list(csv.DictReader(file))
    assert [row["videos"] for row in classes] == ["3", "2", "2", "2", "0", "1"]
    assert classes[0]["recall"] == "0.3333"
    assert classes[0]["precision"] == "0.5000"
    assert (classes[0]["mostly_taken_for"], classes[0]["count"]) == ("ri\\tght\\n", "2")
    assert classes[4]["recall"] == classes[4]["precision"] == classes[4]["average_precision"] == ""
    assert classes[3]["recall"] == "0.5000"  # the video that could not be read was not found


def pair_of(line: str) -> tuple[int, int]:
    """The label and the guess that a line of errors begins with."""
    match = re.match(r"gt:(\d+)\(.*?\)\tpred:(\d+)\(", line)
    assert match
    return int(match.group(1)), int(match.group(2))


def test_errors_come_by_count_and_stop_at_a_hundred() -> None:
    matrix = np.random.default_rng(0).integers(0, 50, (30, 30))
    lines = analyze.error_lines(analysis(matrix))
    counts = [int(number) for line in lines for number in re.findall(r"count:(\d+)", line)]
    assert len(counts) == len(lines)
    off = matrix[~np.eye(30, dtype=bool)]
    assert counts == sorted(off.tolist(), reverse=True)[:100]
    for line in lines:
        true, guess = pair_of(line)
        assert true != guess
        assert f"err{matrix[true, guess] / matrix[true].sum():.4f}\t" in line


def test_allowed_pairs_take_no_place_among_the_errors() -> None:
    matrix = np.random.default_rng(1).integers(1, 50, (30, 30))
    usual = analyze.error_lines(analysis(matrix))
    allowed = analyze.error_lines(analysis(matrix, frozenset([pair_of(usual[0])])))
    assert len(allowed) == 100
    assert allowed[:99] == usual[1:]


def test_allowed_pairs_give_a_second_accuracy(tmp_path: Path) -> None:
    make(tmp_path, LABELS, GUESSES, NAMES)
    rules = tmp_path / "good.txt"
    rules.write_text("# parents\n0 -> 1   # by number\n")
    text = analyze.run(tmp_path, good_pairs=rules)
    assert "top-1 60.00" in text
    assert "top-1 80.00 with 1 allowed pairs counted as right" in text
    assert (tmp_path / "results/top100_errors.txt").read_text().startswith("gt:1(")
    assert len((tmp_path / "results/top100_videos.txt").read_text().splitlines()) == 1


def test_many_classes(tmp_path: Path) -> None:
    labels = list(range(130)) * 2
    guesses: list[int | None] = [(label + (row > 200)) % 130 for row, label in enumerate(labels)]
    make(tmp_path, labels, guesses, [f"class {k}" for k in range(130)])
    text = analyze.run(tmp_path)
    assert "hardest classes" in text
    picture = cv2.imread(str(tmp_path / "results/confusion_matrix.png"))
    assert picture is not None
    assert min(picture.shape[:2]) > 1500


def test_perfect_model(tmp_path: Path) -> None:
    make(tmp_path, [0, 1], [0, 1], ["a", "b"])
    text = analyze.run(tmp_path)
    assert "top-1 100.00" in text
    assert "hardest" not in text
    assert "confused" not in text
    assert (tmp_path / "results/top100_errors.txt").read_text() == ""


def test_the_last_evaluation_or_the_named_one(tmp_path: Path) -> None:
    make(tmp_path, [0, 1], [0, 1], ["a", "b"], "first")
    make(tmp_path, [0, 1], [1, 0], ["a", "b"], "second")
    for order, name in enumerate(("first", "second")):
        stamp = 1_000_000_000 + order
        os.utime(tmp_path / "results" / f"{name}.json", (stamp, stamp))
    assert analyze.run(tmp_path).startswith("second: 2 videos")
    assert analyze.run(tmp_path, "first").startswith("first: 2 videos")


def test_nothing_to_analyse(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no results yet; run `python main\.py eval"):
        analyze.run(tmp_path)
    make(tmp_path, [0, 3], [0, 1], ["a", "b"])
    with pytest.raises(UserError, match=r"a label outside 0\.\.1"):
        analyze.run(tmp_path)
    np.save(tmp_path / "results/best/labels.npy", np.zeros(5, dtype=np.int32))
    with pytest.raises(UserError, match="different numbers of videos"):
        analyze.run(tmp_path)


def test_reference_results_from_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, [0, 1], [1, 0], ["a", "b"], "second")
    assert main.main(["get_reference_results", str(tmp_path), "--name", "second"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "results/reference_result.txt")
    assert (tmp_path / "results/reference_result.txt").read_text().splitlines()[0].endswith(" 1 0")


def test_reference_results_evaluate_where_there_are_none(tmp_path: Path, motion_videos: Path) -> None:
    exp = make_experiment(tmp_path / "exp", motion_videos, steps=3)
    assert main.train(exp) == 0
    code = "import sys, main; sys.exit(main.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "get_reference_results", str(exp), "--name", "mine"]
    done = subprocess.run(command, cwd=Path(main.__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = Results.load(exp, "mine")
    lines = (exp / "results/reference_result.txt").read_text().splitlines()
    assert [line.rsplit(" ", 3)[0] for line in lines] == results.ids
    assert [int(line.rsplit(" ", 3)[2]) for line in lines] == results.scores.argmax(axis=1).tolist()
    assert len(lines) == 23


@pytest.mark.parametrize("text", ["a b", "\u65e5", 'it\'s "x"'])
def test_one_line_leaves_ordinary_text(text: str) -> None:
    assert text_tools.one_line(text) == text


def test_one_line_escapes_what_breaks_lines() -> None:
    assert text_tools.one_line("a\tb\nc\r\x1b\u2028\x85") == "a\\tb\\nc\\r\\x1b\\u2028\\x85"
    assert text_tools.shown("a\n\udcff") == "a\\n\\udcff"
