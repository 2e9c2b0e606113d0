"""Intervals of metrics: the short forms equal the metrics themselves, and the ends cover what they should."""

from __future__ import annotations

import re

import numpy as np
import pytest

from anal_tools import folds, intervals
from anal_tools.evaluate.scoring import interval
from utils import metrics
from utils.metrics import Metric, Videos


def videos(count: int = 60, classes: int = 6, seed: int = 0, skill: float = 1.5) -> Videos:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(0, 1, (count, 1, classes))
    logits[np.arange(count), 0, labels] += skill
    logits[3] = np.nan
    return Videos(metrics.merge_views(logits), labels)


MEASURED = metrics.metrics_of("report")


@pytest.mark.parametrize("name", ["mean_class_accuracy", "calibration_error"])
def test_a_short_form_is_the_metric_of_the_videos_that_were_drawn(name: str) -> None:
    whole = videos()
    metric = next(one for one in MEASURED if one.name == name)
    short, full = intervals._SHORT[name](whole), intervals._any(whole, metric)
    rng = np.random.default_rng(1)
    draws = [np.arange(60), *(rng.integers(0, 60, 60) for _ in range(50))]
    np.testing.assert_allclose([short(rows) for rows in draws], [full(rows) for rows in draws], rtol=1e-12)


def test_every_metric_of_the_report_has_an_interval_around_it() -> None:
    whole = videos()
    measured = intervals.of_metrics(whole, MEASURED)
    assert set(measured) == {"top1", "top5", "mean_class_accuracy", "calibration_error"}
    for metric in MEASURED:
        low, high = measured[metric.name]
        assert 0 <= low <= high <= 100
        if metric.name != "calibration_error":  # chance raises it: its interval lies lower
            assert low < metric.compute(whole) < high
    assert measured["top1"] == intervals.wilson(int(whole.right().sum()), 60)
    # The bootstrap of `score` and `folds` is close to it where there are many videos
    assert measured["top1"] == pytest.approx(tuple(100 * end for end in interval(whole.right())), abs=3)


def test_a_metric_of_a_user_has_one_too() -> None:
    median = Metric("m", lambda videos: float(np.nanmedian(videos.scores.max(axis=1))), "median confidence")
    low, high = intervals.of_metrics(videos(), [median])["m"]
    assert low < median.compute(videos()) < high


def test_all_right_is_not_certain() -> None:
    """Wilson (1927): 20 of 20 have the lower end n / (n + z^2)."""
    labels = np.arange(20) % 4
    whole = Videos(np.eye(4)[labels], labels)
    low, high = intervals.of_metrics(whole, MEASURED)["top1"]
    assert high == 100
    assert low == pytest.approx(100 * 20 / (20 + 1.959964**2))
    wrong = Videos(np.eye(4)[(labels + 1) % 4], labels)
    assert intervals.of_metrics(wrong, MEASURED)["mean_class_accuracy"][0] == 0


@pytest.mark.slow
def test_the_interval_of_the_class_mean_covers_the_truth() -> None:
    """Of 100 lists, about 95 % have the class mean of a very long list inside; 80 videos a list are few."""
    whole = next(one for one in MEASURED if one.name == "mean_class_accuracy")
    truth = whole.compute(videos(200_000, 4, 10_000))
    inside = 0
    for seed in range(100):
        low, high = intervals.of_metrics(videos(80, 4, seed), [whole])[whole.name]
        inside += low <= truth <= high
    assert 0.88 <= inside / 100 <= 1.0


def test_no_video_has_no_interval() -> None:
    low, high = intervals.of_metrics(Videos(np.zeros((0, 3)), np.zeros(0, np.int64)), MEASURED)["top1"]
    assert np.isnan(low)
    assert np.isnan(high)
    assert intervals.text((low, high)) == ""


def test_the_table_of_folds_has_an_interval_with_width_where_every_video_is_right() -> None:
    assert folds.interval_text(np.ones(37, bool)) == "90.59 to 100.00 (Wilson)"
    assert folds.interval_text(np.zeros(37, bool)) == "0.00 to 9.41 (Wilson)"
    assert re.fullmatch(r"\d\d\.\d\d to \d\d\.\d\d \(bootstrap over videos\)", folds.interval_text(np.arange(37) > 9))
