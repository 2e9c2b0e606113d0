"""docs/results.md says what tests/data/results holds, and these are answers to the official lists."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from anal_tools.compare import mcnemar
from tests.benchmarks.analysis import answers, results, ridge
from tests.benchmarks.rows import ROOT, SHARED
from utils.errors import UserError

FILES = sorted(answers.KEPT.glob("*/*.json"))
real_data = pytest.mark.skipif(not (SHARED / "lists/ucf_sports/all.txt").is_file(), reason="no ../shared/data")


def test_the_page_is_what_the_command_writes() -> None:
    assert results.page(results.kept()) == results.PAGE.read_text(encoding="utf-8"), (
        "run python -m tests.benchmarks.analysis.results page"
    )
    readme = results.README.read_text(encoding="utf-8")
    assert results.with_numbers(readme, results.kept()) == readme


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_video_is_held_out_once_and_the_experiment_is_shipped(file: Path) -> None:
    one = answers.Answers.read(file)
    paths = [path for path, *_ in one.videos]
    assert len(set(paths)) == len(paths) == {"ucf_sports": 150, "weizmann10": 93, "ut_interaction2": 60}[one.data]
    assert one.file == file
    if one.name != results.BASE:
        assert (ROOT / "exps" / one.about["experiment"] / "config.yaml").is_file()
        assert set(one.curve) == {fold for _, _, fold, _ in one.videos}
    assert str(ROOT) not in file.read_text(encoding="utf-8")


@real_data
@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_labels_and_folds_are_those_of_the_lists(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = answers.Answers.read(file)
    link(tmp_path, monkeypatch)
    expected = {(path, label, fold) for fold, (_, held) in answers.read_folds(one.data).items() for path, label in held}
    assert {video[:3] for video in one.videos} == expected


@real_data
@pytest.mark.nightly
def test_the_ridge_regression_gives_the_kept_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    link(tmp_path, monkeypatch)
    kept = answers.Answers.read(answers.KEPT / "ut_interaction2/ridge.json")
    again = ridge.answers("ut_interaction2")
    same = [a == b for a, b in zip(sorted(again.videos), sorted(kept.videos), strict=True)]
    assert sum(same) >= len(same) - 1  # decoders and BLAS round in their own ways


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(UserError, match="which enclose the numbers, are missing"):
        results.with_numbers("# Zoetrope\n", {})


def test_a_missing_data_set_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZOETROPE_RESULTS_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"ucf_sports/lists/all.txt: is not there; data/README.md"):
        answers.read_folds("ucf_sports")


def test_interval_against_published_values() -> None:
    """Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20 and 1 of 29."""
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        interval = answers.interval(np.arange(n) < right)
        assert interval == pytest.approx((low, high), abs=6e-5)


def test_won_and_lost_are_counted_by_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "KEPT", tmp_path)
    right = [True] * 10 + [False] * 10
    base = answers.Answers("ucf_sports", "ridge", {}, rows(right))
    one = answers.Answers("ucf_sports", "tsm", {}, rows(right[:8] + [False] * 2 + [True] * 9 + [False])[::-1])
    one.write()
    again = answers.Answers.read(one.file)
    assert json.loads(one.file.read_text())["videos"][0][0] == "c/19.mp4"
    words = results._against(base, again)
    exact = 2 * sum(Fraction(math.comb(11, k), 2**11) for k in range(3))
    assert mcnemar(2, 9) == float(exact)
    assert words == f"{float(exact):.2g} (9 won, 2 lost)"


def test_the_spread_between_seeds_is_that_of_the_kept_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of ten, six of ten and seven of ten: .1 is the deviation, and .283 that of a difference, twice."""
    monkeypatch.setattr(answers, "SPREADS", tmp_path)
    about = {"experiment": "ucf_sports_exps/tsm/x"}
    by_seed = {seed: [int(video >= 5 + seed) for video in range(10)] for seed in range(3)}
    answers.Spread("ucf_sports", "tsm_mobilenetv2", about, by_seed).write()
    (file,) = tmp_path.iterdir()
    spread = answers.Spread.read(file)
    assert spread.answers == by_seed
    base = answers.Answers("ucf_sports", "ridge", {}, rows([True] * 10)[::-1])
    text = " ".join(results._spread(spread, {"ucf_sports": [base]}).split())
    assert "0.600 on average, from 0.500 to 0.700, with a standard deviation of 0.100" in text
    assert "less than 0.283" in text
    assert "3 trainings of [tsm mobilenetv2](../exps/ucf_sports_exps/tsm/x/config.yaml) on UCF Sports" in text


def rows(right: list[bool]) -> tuple[answers.Video, ...]:
    return tuple((f"c/{i:02d}.mp4", 0, "01", 0 if one else 1) for i, one in enumerate(right))


def link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of data/README.md around the real data."""
    for name in answers.DATA_SETS:
        (folder / name).mkdir()
        (folder / name / "videos").symlink_to(SHARED)
        (folder / name / "lists").symlink_to(SHARED / "lists" / name)
    monkeypatch.setenv("ZOETROPE_RESULTS_DATA", str(folder))
