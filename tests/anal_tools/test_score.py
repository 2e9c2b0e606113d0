"""Kept views scored again: averages, several models, intervals, and what cannot be put together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from anal_tools import dense_sweep, score
from anal_tools.evaluate import scoring
from anal_tools.evaluate.protocols import Protocol
from anal_tools.evaluate.results import Results
from datasets.plan.sampling import Sampling
from datasets.plan.views import EvalSpec
from tests.evaluated import write_results
from utils import metrics
from utils.errors import UserError

NAMES = [f"class {k}" for k in range(6)]
PYSLOWFAST = Protocol(EvalSpec(Sampling("pyslowfast", 1, 8, 8), 10, "three", 64, 64))
LABELS = np.random.default_rng(0).integers(0, 6, 200)


def make_result(
    exp: Path, seed: int, *, protocol: Protocol = PYSLOWFAST, order: np.ndarray | None = None, name: str = "best"
) -> Path:
    """Results whose views know the truth a little; every view for itself, so that more views are better."""
    generator = np.random.default_rng(seed)
    order = np.arange(200) if order is None else order
    logits = generator.normal(size=(200, protocol.spec.views, 6)) * 2
    logits[np.arange(200), :, LABELS] += 0.9
    logits[7] = np.nan
    return write_results(
        exp,
        labels=LABELS[order].tolist(),
        logits=logits[order],
        names=NAMES,
        ids=[f"video {i}.mp4" for i in order],
        name=name,
        protocol=protocol.to_dict(),
        cost={"gmacs_per_view": 2.0},
    )


def rows(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict]:
    assert score.main([*map(str, argv), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_subsets_and_averages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = make_result(tmp_path / "a", 1)
    logits = np.asarray(Results.load(exp).logits, np.float64)
    table = rows(capsys, exp, "--views", "1x1,1x3,10x1,10x3", "--average", "prob,logit")
    assert [(row["views"], row["average"]) for row in table] == [
        (views, average) for views in ("1x1", "1x3", "10x1", "10x3") for average in ("prob", "logit")
    ]
    chosen = {"1x1": [16], "1x3": [15, 16, 17], "10x1": list(range(1, 30, 3)), "10x3": list(range(30))}
    for row in table:
        scores = metrics.video_scores(logits[:, chosen[row["views"]]], row["average"])
        assert row["top1"] == pytest.approx(100 * metrics.top_k_accuracy(scores, LABELS, 1))
        assert row["top5"] == pytest.approx(100 * metrics.top_k_accuracy(scores, LABELS, 5))
        assert row["gmacs"] == 2.0 * len(chosen[row["views"]])
        assert (row["failed"], row["num_videos"], row["note"]) == (1, 200, "")
        assert row["top1_interval"][0] <= row["top1"] <= row["top1_interval"][1]
    assert table[-2]["top1"] > table[0]["top1"]


def test_views_that_are_not_nested_are_said_to_be_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Protocol(EvalSpec(Sampling("mmaction2_1x", 1, 8, 8), 10, "three_tsm", 64, 64), family="tsm")
    exp = make_result(tmp_path / "a", 1, protocol=other)
    assert score.main([str(exp), "--views", "1x1,10x3"]) == 0
    text = capsys.readouterr().out
    assert "1x1 [1]" in text
    assert "not nested: mmaction2_1x places 1 clip(s) elsewhere than among its 10; these are clips 5 of them" in text
    assert "the centre crop of three_tsm may be one pixel off that of centre_tsm" in text
    assert scoring.smaller(scoring.kept_protocol(Results.load(exp)), "1x1").views == (17,)


def test_several_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shuffled = np.random.default_rng(5).permutation(200)
    one, two = make_result(tmp_path / "a", 1), make_result(tmp_path / "b", 2, order=shuffled)
    first, second = (np.asarray(Results.load(exp).logits, np.float64) for exp in (one, two))
    second = second[np.argsort(shuffled)]
    alone, together, weighted = (
        rows(capsys, one)[0],
        rows(capsys, one, two)[0],
        rows(capsys, one, two, "--weights", "3,1", "--average", "logit")[0],
    )
    soft = [metrics.video_scores(scores) for scores in (first, second)]
    assert together["top1"] == pytest.approx(100 * metrics.top_k_accuracy((soft[0] + soft[1]) / 2, LABELS, 1))
    mixed = metrics.probabilities(0.75 * first.mean(1) + 0.25 * second.mean(1))
    assert weighted["top1"] == pytest.approx(100 * metrics.top_k_accuracy(mixed, LABELS, 1))
    good = np.arange(200) != 7
    loss = -np.log(mixed[good, LABELS[good]]).mean()
    assert weighted["loss"] == pytest.approx(loss, abs=1e-6)
    assert together["gmacs"] == 2 * alone["gmacs"]
    assert together["number"] == 60


def test_lists_that_differ_are_refused(tmp_path: Path) -> None:
    one = make_result(tmp_path / "a", 1)
    other = make_result(tmp_path / "b", 2)
    ids = (other / "results/best/ids.txt").read_text().replace("video 9.mp4", "another.mp4")
    (other / "results/best/ids.txt").write_text(ids)
    with pytest.raises(UserError, match="different lists: 'video 9.mp4' is in one of them only"):
        score.main([str(one), str(other)])
    labels = np.load(one / "results/best/labels.npy")
    third = make_result(tmp_path / "c", 3)
    np.save(third / "results/best/labels.npy", (labels + (np.arange(200) == 4)) % 6)
    with pytest.raises(UserError, match="'video 4.mp4' has different labels"):
        score.main([str(one), str(third)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--weights", "1"], "one positive number for each of the 2"),
        (["--weights", "1,-1"], "one positive number"),
        (["--weights", "1,x"], "numbers separated by commas"),
        (["--views", "20x3"], "20x3 views are not among the kept ones, 10x3"),
        (["--views", "1x10"], "not among the kept ones"),
        (["--average", "max"], "--average max"),
        (["--level", "2"], "between 0 and 1"),
    ],
)
def test_refused_scores(tmp_path: Path, argv: list[str], words: str) -> None:
    folders = [str(make_result(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    with pytest.raises(UserError, match=words):
        score.main([*folders, *argv])


def test_results_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = make_result(tmp_path / "a", 1, name="latest-10x3")
    assert rows(capsys, f"{exp}:latest-10x3")[0]["number"] == 30
    with pytest.raises(UserError, match="no finished evaluation of that name"):
        score.main([f"{exp}:other"])
    with pytest.raises(UserError, match="no such experiment folder"):
        score.main([str(tmp_path / "none")])


def test_intervals_are_seeded_and_about_right() -> None:
    right = (np.random.default_rng(0).random(4000) < 0.7).astype(float)
    low, high = scoring.interval(right)
    assert (low, high) == scoring.interval(right)
    assert (low, high) != scoring.interval(right, seed=1)
    error = np.sqrt(0.7 * 0.3 / 4000)
    assert low == pytest.approx(right.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(right.mean() + 1.96 * error, abs=0.1 * error)
    half = scoring.interval(right, level=0.5)
    assert low < half[0] < half[1] < high
    assert all(np.isnan(scoring.interval(np.zeros(0))))


def test_dense_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = make_result(tmp_path / "a", 1)
    assert dense_sweep.main([str(exp)]) == 0
    text = capsys.readouterr().out
    points = dense_sweep.sweep(Results.load(exp))
    assert [row.number for row in points] == sorted(row.number for row in points)
    assert {row.views for row in points} >= {"1x1", "1x3", "5x1", "10x1", "10x3"}
    assert [row.note == "" for row in points if row.protocol.spec.num_clips in (1, 2, 5, 10)] == [True] * 8
    assert all(row.note for row in points if row.protocol.spec.num_clips in (3, 4, 7))
    best = dense_sweep.knee(points)
    assert text.count("knee") == 1
    lines = (exp / "results/best/dense_sweep.csv").read_text().splitlines()
    assert len(lines) == len(points) + 1
    assert [line.endswith(",1") for line in lines[1:]].index(True) == best
    assert (exp / "results/best/dense_sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert len(dense_sweep.sweep(Results.load(exp), clips=[1, 10])) == 4
    with pytest.raises(UserError, match="whole numbers"):
        dense_sweep.main([str(exp), "--clips", "1,x"])


def test_the_knee_is_the_cheapest_row_that_is_as_good() -> None:
    kept = Protocol(EvalSpec(Sampling("tsn", 8), 1, "centre"))

    def row(views: int, right: list[float]) -> score.ScoreRow:
        return score.ScoreRow(kept, views, None, {"top1": 100 * float(np.mean(right))}, {1: np.array(right)}, {}, "")

    good = [1.0] * 90 + [0.0] * 10
    assert dense_sweep.knee([row(1, [1.0] * 50 + [0.0] * 50), row(3, good), row(30, good)]) == 1
    nearly = [0.0] + good[1:]  # one video of a hundred: within the error of the difference
    assert dense_sweep.knee([row(1, nearly), row(30, good)]) == 0
    assert dense_sweep.knee([row(1, good)]) == 0
