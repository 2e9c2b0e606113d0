"""The interval of a median that the benchmark rows print."""

from __future__ import annotations

import random

import pytest

from tests.benchmarks.reliability.pairs import compare, interval_of_median


def test_interval_of_the_median_from_the_tables_of_the_sign_test() -> None:
    # 95 % intervals from order statistics, 1-based: n = 10: 2 and 9, n = 20: 6 and 15, n = 25: 8 and 18.
    for count, first in ((6, 1), (10, 2), (20, 6), (25, 8)):
        values = list(range(1, count + 1))
        random.Random(count).shuffle(values)
        assert interval_of_median(values) == (first, count + 1 - first)
    with pytest.raises(ValueError, match="5 values are too few"):
        interval_of_median(range(5))


def test_pairs_are_compared_one_by_one() -> None:
    ours, other = [2.0, 30.0, 4.0, 5.0, 6.0, 7.0], [1.0, 10.0, 4.0, 5.0, 6.0, 7.0]
    assert compare(ours, other) == {"median": 1.0, "low": 1.0, "high": 3.0, "pairs": 6}
