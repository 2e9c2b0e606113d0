"""Row `memcached_forgery`: a server that forges frames, or answers without end, against the reader's own client."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets.memcached.client import ClientSettings, MemcachedPool
from datasets.memcached.source import key_of
from datasets.memcached.wire import HEADER, Seal
from tests.hostile import HostileServer

FORGED = int(os.environ.get("ZOETROPE_FORGED_FRAMES", "3000"))
SECRET = b"zoetrope:word\nframes:never sent"
ROUTE = b"r" * 16
KEYS = 8  # of a call


def row() -> dict[str, Any]:
    """Forge frames in drawn ways, count those that are accepted; measure what endless answers cost."""
    seed = int(os.environ.get("ZOETROPE_SEED") or random.SystemRandom().randrange(10**6))
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        keyed = _forge(rng, Path(folder) / "a", {"secret": b"zoetrope word", "frame_secret": SECRET})
        unkeyed = _forge(rng, Path(folder) / "b", {})
        endless = {name: _endless(Path(folder) / "c", piece, first) for name, (first, piece) in ENDLESS.items()}
    measured = {
        "seed": seed,
        "with_secret": keyed,
        "without_secret": unkeyed,
        "endless_mib": endless,
        "price": _price(),
    }
    holds = (
        keyed["frames"] >= FORGED and keyed["wrong"] == 0 and keyed["right"] > 0 and keyed["right_lost"] == 0
        and max(endless.values()) <= 4.0
    )  # fmt: skip
    return {"measured": measured, "holds": holds}


def _forge(rng: random.Random, path: Path, settings: dict[str, Any]) -> dict[str, int]:
    """Ask a server whose answers are forged, one in five of them good; count."""
    seal = Seal(settings.get("frame_secret"))
    payloads = {key_of(ROUTE, str(n), seal): rng.randbytes(rng.randrange(1, 20_000)) for n in range(KEYS)}
    honest: set[bytes] = set()

    def script(request: bytes) -> Iterator[bytes]:
        if request.startswith(b"set auth"):
            yield b"STORED\r\n"
            return
        honest.clear()
        for key, payload in payloads.items():
            good = rng.random() < 0.2
            value = seal.pack(key, payload) if good else _forgery(rng, key, payload, seal, payloads)
            honest.update([key] if good else [])
            yield b"VALUE %b 0 %d\r\n%b\r\n" % (key, len(value), value)
        yield b"END\r\n"

    server = HostileServer(path, script)
    counts: dict[str, int] = dict.fromkeys(("frames", "wrong", "right", "right_lost"), 0)
    while counts["frames"] < FORGED:
        pool = MemcachedPool(ClientSettings((server.name,), timeout=5.0, **settings))
        payloads_read = pool.get(ROUTE, list(payloads))
        counts["frames"] += KEYS - len(honest)
        counts["wrong"] += sum(payloads_read[key] != payloads[key] for key in payloads_read)
        counts["right"] += sum(payloads_read.get(key) == payloads[key] for key in honest)
        counts["right_lost"] += sum(key not in payloads_read for key in honest)
        pool.close()
    server.close()
    return counts


def _forgery(rng: random.Random, key: bytes, payload: bytes, seal: Seal, payloads: dict[bytes, bytes]) -> bytes:
    """A value with another payload, made as well as somebody can who knows this code but not the secret."""
    other = bytearray(payload)
    other[rng.randrange(len(other))] ^= 1 << rng.randrange(8)
    if seal.version == 1:
        return Seal().pack(key, bytes(other))
    stolen = next(other for other in payloads if other != key)
    header = HEADER.pack(b"FS", 2, 1, len(other))
    ways = [
        lambda: Seal().pack(key, bytes(other)),
        lambda: Seal(b"zoetrope:word").pack(key, bytes(other)),  # what the server hears at the login
        lambda: Seal(b"zoetrope word").pack(key, bytes(other)),
        lambda: Seal(b"").pack(key, bytes(other)),
        lambda: Seal(rng.randbytes(32)).pack(key, bytes(other)),
        lambda: header + rng.randbytes(16) + bytes(other),
        lambda: seal.pack(key, payload)[: seal.header_bytes] + bytes(other),
        lambda: seal.pack(stolen, payloads[stolen]),
        lambda: seal.pack(key, payload) + b"\0",
        lambda: HEADER.pack(b"FS", 2, 1, 0) + rng.randbytes(16),
    ]
    return rng.choice(ways)()


_NAMES = [key_of(ROUTE, str(n)) for n in range(KEYS)]
ENDLESS = {
    "a line": (b"", b"x" * 65536),
    "an error": (b"SERVER_ERROR ", b"x" * 65536),
    "lines": (b"", b"VALUE\r\n" * 8192),
    "a value of 2 TiB": (b"VALUE %b 0 %d\r\n" % (_NAMES[0], 1 << 41), b"x" * 65536),
    "small values of one key": (b"", b"VALUE %b 0 9\r\n123456789\r\n" % _NAMES[0]),
    "values of another key": (b"", b"VALUE zzz 0 9\r\n123456789\r\n"),
}


def _endless(path: Path, piece: bytes, first: bytes) -> float:
    """Return the MiB by which this process grows at most in 8 calls, each with a server of this answer."""
    server = HostileServer(path, lambda request: itertools.chain([first], itertools.repeat(piece)))
    calls = (
        lambda pool: pool.get(ROUTE, _NAMES),
        lambda pool: pool.present(ROUTE, _NAMES),
        lambda pool: pool.put(ROUTE, [(_NAMES[0], b"data")]),
        lambda pool: pool.probe(),
    )
    for call in calls:  # what is imported and allocated once
        _ask(server, call)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for call in calls * 2:
        _ask(server, call)
    grown = _resident("VmHWM") - before
    server.close()
    return round(max(0, grown) / 2**20, 2)


def _ask(server: HostileServer, call: Any) -> None:
    pool = MemcachedPool(ClientSettings((server.name,), timeout=0.25))
    began = time.monotonic()
    call(pool)
    pool.close()
    if time.monotonic() - began > 3.0:
        raise RuntimeError("a call did not end in time")


def _resident(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) << 10


def _price() -> dict[str, float]:
    """Return the microseconds to check one frame with and without a secret, and to decode it."""
    import cv2
    import numpy as np

    from datasets.readers.frames import decode

    picture = cv2.resize(np.random.default_rng(0).integers(0, 255, (40, 54, 3), np.uint8), (340, 256))
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    price = {"bytes": float(len(jpeg))}
    for name, seal in (("xxh3_us", Seal()), ("blake2b_us", Seal(SECRET))):
        value = seal.pack(_NAMES[0], jpeg)
        parts = value[: seal.header_bytes], value[seal.header_bytes :]
        price[name] = _microseconds(functools.partial(seal.check, _NAMES[0], *parts), 300)
    price["decode_us"] = _microseconds(lambda: decode(jpeg, "a"), 50)
    return {name: round(value, 2) for name, value in price.items()}


def _microseconds(function: Callable[[], object], number: int) -> float:
    return min(timeit.repeat(function, number=number, repeat=5)) / number * 1e6


if __name__ == "__main__":
    print(json.dumps(row()))
