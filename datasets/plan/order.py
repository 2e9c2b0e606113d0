"""Define order and random numbers as functions: what a position reads, and the uniforms it draws.

Positions run through epochs without end. Position p is sample `order(seed, p // n)[p % n]` of n videos (shuffled), or
the video that `ClassBalanced` chooses. All numbers come from Philox (Salmon et al., SC 2011), a generator without
state: its 64-bit words are a function of a key (seed, epoch) and a counter. The counter's upper words identify the use
of a number, so that no two uses share one:

    [running, purpose, position, domain]      domain 0: the order of an epoch; domain 1: the draws of a clip
    domain 0: purpose 0 the videos of an epoch; 1 the classes of a round; 2 the videos of the class `position`

With repeated augmentation (Hoffer et al. 2020, arXiv:1901.09335) a position is one of n views of a turn, and the turn
takes the place of the position above. The B clips of a shard are B/n turns in their first view, then the same turns in
their second view, and so on. So a shard holds all views of its videos, and neighbours are different videos.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from datasets.lists.records import Records

_MASK = (1 << 64) - 1  # Philox keys are 64-bit words, seeds may be negative
ORDER, PLAN = 0, 1  # domains
_CLASSES, _MEMBERS = 1, 2  # purposes within ORDER


class _Local(threading.local):
    """Keep one generator per thread. Making a generator takes five times as long as setting its state."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.counter = np.zeros(4, np.uint64)
        self.key = np.zeros(2, np.uint64)
        self.state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self.counter, "key": self.key},
            "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4,  # nothing buffered: the next word comes from the counter
            "has_uint32": 0,
            "uinteger": 0,
        }


_local = _Local()


def words(seed: int, epoch: int, count: int, *, domain: int, position: int = 0, purpose: int = 0) -> NDArray[np.uint64]:
    """Return `count` 64-bit words of a counter block. Equal arguments give equal words, on any machine and NumPy."""
    key, counter = _local.key, _local.counter
    # Update the arrays inside `_local.state` in place, then set the state: this starts the generator at the counter.
    key[0], key[1] = seed & _MASK, epoch
    counter[0], counter[1], counter[2], counter[3] = 0, purpose, position, domain
    _local.philox.state = _local.state
    return _local.philox.random_raw(count)


def uniforms(seed: int, epoch: int, position: int, purpose: int, count: int) -> NDArray[np.float64]:
    """Return `count` numbers in [0, 1) with 53 bits, for one purpose of the clip at a global position."""
    raw = words(seed, epoch, count, domain=PLAN, position=position, purpose=purpose)
    # The upper 53 bits, as many as a float64 holds exactly.
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


@functools.lru_cache(maxsize=2)  # prefetching crosses from one epoch into the next
def order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """Return the read-only permutation of 0..n-1 in which an epoch reads n videos.

    It sorts random words instead of calling a shuffle, because NumPy may change its shuffle between versions.
    """
    return _permutation(words(seed, epoch, n, domain=ORDER))


def _permutation(random_words: NDArray[np.uint64]) -> NDArray[np.int64]:
    # Stable: equal words, however unlikely, keep their order on every machine.
    permutation = np.argsort(random_words, kind="stable")
    permutation.flags.writeable = False  # `order` caches it
    return permutation


@dataclass(frozen=True)
class Turn:
    """The turn of a global position.

    Attributes:
        sample: index of the video.
        epoch: of the numbers that it draws.
        first: position of the first view of the same turn, whose frames all its views show.
    """

    sample: int
    epoch: int
    first: int


class Order:
    """Turn global positions into videos, for `data.order`.

    Args:
        kind: "shuffled" or "class_balanced".
        seed: of the run.
        records: the training list.
        batch_size: clips per shard, a multiple of num_sample.
        num_sample: views of a video in a shard; with 1 the turn is the position.
    """

    def __init__(self, kind: str, seed: int, records: Records, *, batch_size: int = 1, num_sample: int = 1) -> None:
        if kind not in ("shuffled", "class_balanced"):
            raise ValueError(f"data.order is {kind!r}; it must be shuffled or class_balanced")

        self._seed, self._videos = seed, len(records)
        self._balanced = ClassBalanced(seed, records.members()) if kind == "class_balanced" else None
        self._batch_size, self._turns = batch_size, batch_size // num_sample

    def __call__(self, position: int) -> Turn:
        """Return what a position reads. Earlier calls make no difference."""
        shard, row = divmod(position, self._batch_size)
        view, place = divmod(row, self._turns)

        # Turns run through epochs without end.
        turn = shard * self._turns + place
        epoch, place = divmod(turn, self._videos)
        sample = self._balanced(turn) if self._balanced else int(order(self._seed, epoch, self._videos)[place])
        return Turn(sample, epoch, first=position - view * self._turns)


class ClassBalanced:
    """Visit every class once in each round of C positions, in a new order each time. The videos of a class take turns.

    Round r holds positions r*C .. r*C + C - 1. In it class c shows the video r % n_c of its (r // n_c)-th permutation,
    so no video is repeated before all others of its class were shown. An epoch still has as many positions as the list
    has videos. A video with several labels belongs to several classes.

    Args:
        seed: of the run.
        members: the videos of each of the C classes that have any.
    """

    def __init__(self, seed: int, members: Iterable[NDArray[np.int64]]) -> None:
        self._seed = seed
        self._members = list(members)
        # Caches of the last round, and of the permutation of each class. They hold at most n indices in total.
        self._round: tuple[int, NDArray[np.int64]] | None = None
        self._turns: dict[int, tuple[int, NDArray[np.int64]]] = {}  # class -> (number of the permutation, permutation)

    def __call__(self, position: int) -> int:
        """Return the index of the video at a global position. Earlier calls make no difference."""
        # Which class: its place in the order of this round.
        number, place = divmod(position, len(self._members))
        if self._round is None or self._round[0] != number:
            drawn = words(self._seed, number, len(self._members), domain=ORDER, purpose=_CLASSES)
            self._round = number, _permutation(drawn)

        label = int(self._round[1][place])

        # Which of its videos: its turn in the permutation of this lap.
        videos = self._members[label]

        lap, turn = divmod(number, len(videos))
        if label not in self._turns or self._turns[label][0] != lap:
            drawn = words(self._seed, lap, len(videos), domain=ORDER, purpose=_MEMBERS, position=label)
            self._turns[label] = lap, _permutation(drawn)

        return int(videos[self._turns[label][1][turn]])
