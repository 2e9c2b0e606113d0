"""Order and streams: permutations, purity, and blocks that never meet."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.plan.order import PLAN, Order, order, uniforms, words

ORDER_0_0_10 = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
ORDER_1_5_10 = [8, 3, 5, 6, 1, 2, 7, 0, 4, 9]
UNIFORMS_1_2_3_4 = [0.8231355163718505, 0.9360175269087738]


class Listed:
    """A list of videos with these labels, as `Order` sees it."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def members(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]


UNEVEN: Any = Listed([0] * 7 + [3] * 2 + [5])
SEVEN: Any = Listed([0] * 7)
MANY: Any = Listed([0] * 23)


@settings(deadline=None)
@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10_000), n=st.integers(1, 300))
def test_each_epoch_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    assert sorted(order(seed, epoch, n).tolist()) == list(range(n))


def test_positions_run_through_epochs() -> None:
    n, at = 23, Order("shuffled", 7, MANY)
    assert [at(p).epoch for p in range(5 * n)] == [p // n for p in range(5 * n)]
    got = [at(p).sample for p in range(5 * n)]
    for epoch in range(5):
        assert got[epoch * n : (epoch + 1) * n] == order(7, epoch, n).tolist()
    assert len({tuple(got[i : i + n]) for i in range(0, 5 * n, n)}) == 5


def test_known_values() -> None:
    """A change here changes what every stored run trains on after a resume: it must not happen."""
    assert order(0, 0, 10).tolist() == ORDER_0_0_10
    assert order(1, 5, 10).tolist() == ORDER_1_5_10
    assert uniforms(1, 2, 3, 4, 2).tolist() == UNIFORMS_1_2_3_4


def test_words_are_those_of_a_fresh_generator() -> None:
    words(9, 9, 3, domain=PLAN)  # leaves something behind, which must not matter
    fresh = np.random.Philox(key=[5, 6], counter=[0, 2, 11, PLAN])
    assert words(5, 6, 9, domain=PLAN, position=11, purpose=2).tolist() == fresh.random_raw(9).tolist()
    doubles = np.random.Generator(np.random.Philox(key=[5, 6], counter=[0, 2, 11, PLAN])).random(9)
    assert uniforms(5, 6, 11, 2, 9).tolist() == doubles.tolist()


def test_seed_of_64_bits_and_negative_seed() -> None:
    assert words(2**64 - 1, 0, 1, domain=PLAN) == words(-1, 0, 1, domain=PLAN)
    assert words(2**63, 0, 1, domain=PLAN) != words(0, 0, 1, domain=PLAN)


def test_blocks_do_not_meet() -> None:
    blocks = [
        words(seed, epoch, 500, domain=domain, position=position, purpose=purpose)
        for seed in (0, 1)
        for epoch in (0, 1)
        for domain in (0, 1)
        for position in (0, 1, 2)
        for purpose in (0, 1, 5)
    ]
    every = np.concatenate(blocks)
    assert len(np.unique(every)) == len(every)


def test_threads_do_not_disturb_each_other() -> None:
    expected = [uniforms(1, 0, p, 1, 8).tolist() for p in range(300)]
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(p for p in range(300) if uniforms(1, 0, p, 1, 8).tolist() != expected[p])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_order_is_read_only_and_cached() -> None:
    assert order(3, 3, 50) is order(3, 3, 50)
    with pytest.raises(ValueError, match="read-only"):
        order(3, 3, 50)[0] = 1


def test_order_has_no_visible_pattern() -> None:
    """Mean displacement of a random permutation is n / 3, its correlation with the identity about 0."""
    got = order(0, 0, 20_000)
    assert np.abs(got - np.arange(20_000)).mean() == pytest.approx(20_000 / 3, rel=0.02)
    assert abs(np.corrcoef(got, np.arange(20_000))[0, 1]) < 0.03


BALANCED_0 = [2, 7, 9, 9, 8, 5, 7, 6, 9, 1, 9, 8]


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="must be shuffled or class_balanced"):
        Order("sorted", 7, UNEVEN)


def test_class_balanced_shows_each_class_once_a_round() -> None:
    at = Order("class_balanced", 1, UNEVEN)
    got = np.array([at(p).sample for p in range(3 * 700)])
    labels = UNEVEN.labels[got].reshape(-1, 3)
    assert (np.sort(labels, 1) == [0, 3, 5]).all()
    assert len(np.unique(labels, axis=0)) == 6, "the classes of a round come in any order"
    counts = np.bincount(got, minlength=10)
    assert counts.tolist() == [100] * 7 + [350] * 2 + [700], "within a class all videos equally often"
    first = got[UNEVEN.labels[got] == 0].reshape(-1, 7)
    assert (np.sort(first, 1) == np.arange(7)).all(), "none again before all others"
    assert len(np.unique(first, axis=0)) > 50, "in an order of its own each time"


def test_class_balanced_is_a_function_of_the_position() -> None:
    forwards, backwards = Order("class_balanced", 4, UNEVEN), Order("class_balanced", 4, UNEVEN)
    positions = list(range(300))
    assert [backwards(p) for p in reversed(positions)][::-1] == [forwards(p) for p in positions]
    other = Order("class_balanced", 5, UNEVEN)
    assert [other(p).sample for p in positions] != [forwards(p).sample for p in positions]


def test_known_values_of_class_balanced() -> None:
    """Like `test_known_values`: a change here changes what stored runs train on."""
    at = Order("class_balanced", 0, UNEVEN)
    assert [at(p).sample for p in range(12)] == BALANCED_0


@settings(deadline=None)
@given(
    kind=st.sampled_from(["shuffled", "class_balanced"]),
    turns=st.integers(1, 12),
    num_sample=st.integers(1, 5),
    shard=st.integers(0, 10**9),
)
def test_a_shard_holds_all_views_of_its_videos(kind: str, turns: int, num_sample: int, shard: int) -> None:
    size = turns * num_sample
    at, once = (Order(kind, 3, UNEVEN, batch_size=size, num_sample=views) for views in (num_sample, 1))
    for row in range(size):
        view, place = divmod(row, turns)
        shown, alone = at(shard * size + row), once(shard * turns + place)
        assert (shown.sample, shown.epoch) == (alone.sample, alone.epoch), "the turn is a position of one view"
        assert shown.first == shard * size + place, f"view {view} shows the frames of view 0"


def test_one_view_is_the_order_as_it_was() -> None:
    one_view, once, twice = (Order("shuffled", 3, SEVEN, **words) for words in ({}, {"batch_size": 4}, TWICE))
    positions = range(280)
    assert [one_view(p) for p in positions] == [once(p) for p in positions]
    epoch = [twice(p).sample for p in range(140)]  # 35 shards of 2 turns: 10 epochs of 7 turns
    assert all(epoch.count(video) == 20 for video in range(7))
    for first in (4 * shard + row for shard in range(35) for row in (0, 1)):
        assert twice(first + 2) == twice(first)


TWICE = {"batch_size": 4, "num_sample": 2}
