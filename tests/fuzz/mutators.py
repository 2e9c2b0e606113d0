"""Ways to damage valid inputs, for the fuzz targets: bytes, numbers in text, and lines."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

#: Whole numbers around the limits of types, and what does not fit into any.
NUMBERS = (
    -(2**63) - 1, -(2**63), -(2**31) - 1, -(2**31), -129, -2, -1, 0, 1, 2, 3, 7, 127, 128, 255, 256, 32767, 65535,
    65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30,
)  # fmt: skip
TEXT_NUMBERS = (
    *map(str, NUMBERS),
    *[
        "0.0",
        "-0.0",
        "1e-400",
        "1e308",
        "-1e308",
        "1e309",
        ".nan",
        ".inf",
        "-.inf",
        "nan",
        "inf",
        "0x10",
        "0o17",
        "1_000",
        "007",
        "1e3",
        "1.",
        ".5",
        "+1",
        "-",
    ],
    "9" * 400,
    "9" * 5000,
    "\u0663",
    "\u00b2",
)
_NUMBER = re.compile(rb"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def flip_bit(rng: random.Random, data: bytes) -> bytes:
    """Flip one bit."""
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_byte(rng: random.Random, data: bytes) -> bytes:
    """Set one byte to a drawn value or to an end of its range."""
    if not data:
        return data
    changed = bytearray(data)
    changed[rng.randrange(len(data))] = rng.choice((0, 1, 10, 32, 127, 128, 255, rng.randrange(256)))
    return bytes(changed)


def cut(rng: random.Random, data: bytes) -> bytes:
    """Remove a part."""
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[min(stop, start + rng.choice((1, 8, 64, len(data)))) :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    """Keep the beginning."""
    return data[: rng.randrange(len(data) + 1)]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """Write a part twice, or many times."""
    start = rng.randrange(len(data) + 1)
    part = data[start : start + rng.choice((1, 4, 16, 64))]
    return data[:start] + part * rng.choice((2, 2, 3, 50)) + data[start + len(part) :]


def move(rng: random.Random, data: bytes) -> bytes:
    """Copy a part to another place."""
    start, place = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    return data[:place] + data[start : start + rng.choice((1, 4, 16, 64))] + data[place:]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Put drawn bytes somewhere."""
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice((1, 2, 8))) + data[place:]


def integer(rng: random.Random, data: bytes) -> bytes:
    """Overwrite 1, 2, 4 or 8 bytes with a number at the end of a range."""
    width = rng.choice((1, 2, 4, 8))
    if len(data) < width:
        return data
    place = rng.randrange(len(data) - width + 1)
    number = rng.choice(NUMBERS) % (1 << 8 * width)
    return data[:place] + number.to_bytes(width, rng.choice(("little", "big"))) + data[place + width :]


def text_number(rng: random.Random, data: bytes) -> bytes:
    """Replace a number that is written out by an extreme one."""
    matches = list(_NUMBER.finditer(data))
    if not matches:
        return data
    at = rng.choice(matches)
    return data[: at.start()] + rng.choice(TEXT_NUMBERS).encode() + data[at.end() :]


def lines(rng: random.Random, data: bytes) -> bytes:
    """Drop, double, exchange or join lines."""
    rows = data.split(b"\n")
    a, b = rng.randrange(len(rows)), rng.randrange(len(rows))
    match rng.randrange(4):
        case 0:
            del rows[a]
        case 1:
            rows.insert(b, rows[a])
        case 2:
            rows[a], rows[b] = rows[b], rows[a]
        case _:
            rows[a : a + 2] = [b" ".join(rows[a : a + 2])]
    return b"\n".join(rows)


BYTES: Sequence[Callable[[random.Random, bytes], bytes]] = (
    flip_bit, flip_bit, set_byte, cut, truncate, repeat, move, insert, integer,
)  # fmt: skip
TEXT: Sequence[Callable[[random.Random, bytes], bytes]] = (
    text_number, text_number, text_number, lines, lines, set_byte, cut, repeat, move,
)  # fmt: skip


def some(
    rng: random.Random, data: bytes, ways: Sequence[Callable[[random.Random, bytes], bytes]] = BYTES, most: int = 4
) -> bytes:
    """Damage `data` in 1 to `most` drawn ways."""
    for _ in range(rng.randint(1, most)):
        data = rng.choice(ways)(rng, data)
    return data
