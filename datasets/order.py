"""Order and random numbers as functions: what a position reads, and the uniforms it draws.

Positions run through epochs without end: position p is sample `order(seed, p // n)[p % n]` of n videos. All numbers
come from Philox (Salmon et al., SC 2011), a generator without state: 64-bit words are a function of a key (seed, epoch)
and a counter. The counter's upper words say what a number is for, so that no two uses share one:

    [running, purpose, position, domain]      domain 0: the order of an epoch; domain 1: the draws of a clip
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
ORDER, PLAN = 0, 1  # domains


class _Local(threading.local):
    """One generator per thread, because placing an existing one costs a fifth of making one."""

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
    """`count` 64-bit words of one counter block: equal arguments give equal words, on every machine and NumPy."""
    key, counter = _local.key, _local.counter
    key[0], key[1] = seed & _MASK, epoch
    counter[0], counter[1], counter[2], counter[3] = 0, purpose, position, domain
    _local.philox.state = _local.state
    return _local.philox.random_raw(count)


def uniforms(seed: int, epoch: int, position: int, purpose: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) with 53 bits, of one purpose of the clip at a global position."""
    raw = words(seed, epoch, count, domain=PLAN, position=position, purpose=purpose)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The permutation of 0..n-1 in which an epoch reads n videos; read-only.

    It sorts random words instead of calling a shuffle, whose result NumPy may change between versions.
    """
    permutation = np.argsort(words(seed, epoch, n, domain=ORDER), kind="stable")
    permutation.flags.writeable = False
    return permutation


def epoch_of(position: int, n: int) -> int:
    """The epoch that a global position falls into, with n videos and no drop-last."""
    return position // n


def sample_at(position: int, seed: int, n: int) -> int:
    """Index of the video at a global position, 0..n-1."""
    return int(order(seed, position // n, n)[position % n])
