"""Servers that lie: forged frames are refused with a secret, and no answer costs more memory than it may."""

from __future__ import annotations

import contextlib
import itertools
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datasets.memcached.client import ClientSettings, MemcachedPool
from datasets.memcached.source import PLAIN_SEAL, key_of
from datasets.memcached.wire import (
    HEADER,
    ROOM,
    VALUE_BYTES,
    AnswerTooLarge,
    Connection,
    CorruptValue,
    Seal,
    frame_secret,
    parse,
    read_secret,
)
from tests.hostile import HostileServer, Script
from utils.errors import UserError

ROUTE = b"r" * 16
MOST_MEMORY = 4 << 20


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Script], HostileServer]]:
    """Starts servers; they end with the test."""
    servers: list[HostileServer] = []

    def one(script: Script) -> HostileServer:
        servers.append(HostileServer(tmp_path / f"s{len(servers)}", script))
        return servers[-1]

    yield one
    for server in servers:
        server.close()


# ------------------------------------------------------------------------------------------------------------- forgery


def forgeries(key: bytes, payload: bytes, heard: bytes) -> dict[str, bytes]:
    """Values that somebody makes who knows the protocol and the code, has heard `heard`, and lacks the secret."""
    other = b"\xff" + payload
    guesses = {"no secret": b"", "another secret": b"user:word", "what was heard": heard}
    values = {name: Seal(secret).pack(key, other) for name, secret in guesses.items()}
    real = Seal(SECRET).pack(key, payload)
    size = Seal(SECRET).header_bytes
    return {
        **values,
        "version 1": Seal().pack(key, other),
        "version 1 with room": HEADER.pack(b"FS", 1, 1, len(other)) + bytes(16) + other,
        "zeros": HEADER.pack(b"FS", 2, 1, len(other)) + bytes(16) + other,
        "another payload": real[:size] + b"\xff" + payload[1:],
        "longer": real + b"x",
        "cut": real[:-1],
        "another key": Seal(SECRET).pack(b"f2:" + bytes(32).hex()[:32].encode(), payload),
        "no header": payload,
        "nothing": b"",
    }


SECRET = b"zoetrope:word\nframes:never sent"


def test_without_the_secret_no_frame_can_be_forged(serve: Callable[[Script], HostileServer], tmp_path: Path) -> None:
    payload = bytes(range(256)) * 40
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    assert frame_secret(file) == SECRET
    settings: dict[str, Any] = {"secret": read_secret(file), "frame_secret": frame_secret(file)}
    key = key_of(ROUTE, "a", Seal(SECRET))
    values: list[bytes] = []

    def script(request: bytes) -> Iterable[bytes]:
        if request.startswith(b"set auth"):
            yield b"STORED\r\n"
            return
        yield b"VALUE %b 0 %d\r\n%b\r\nEND\r\n" % (key, len(values[0]), values[0])

    server = serve(script)
    for name, value in forgeries(key, payload, b"zoetrope:word").items():
        values[:] = [value]
        pool = MemcachedPool(ClientSettings((server.name,), timeout=2.0, **settings))
        assert pool.get(ROUTE, [key]) == {}, name
        counts, _ = pool.take()
        assert counts.get("corrupt") == 1, (name, counts)
        pool.close()
    assert b"never sent" not in server.heard
    values[:] = [Seal(SECRET).pack(key, payload)]
    pool = MemcachedPool(ClientSettings((server.name,), timeout=2.0, **settings))
    assert pool.get(ROUTE, [key]) == {key: payload}
    pool.close()


def test_values_of_another_version_or_secret_are_not_looked_up() -> None:
    keys = {key_of(ROUTE, "a"), key_of(ROUTE, "a", Seal(b"x")), key_of(ROUTE, "a", Seal(b"y"))}
    assert len(keys) == 3
    assert key_of(ROUTE, "a") == key_of(ROUTE, "a", PLAIN_SEAL)
    assert {len(key) for key in keys} == {35}
    assert key_of(ROUTE, "a").startswith(b"f1:")
    assert key_of(ROUTE, "a", Seal(b"x")).startswith(b"f2:")
    with pytest.raises(CorruptValue):
        Seal(b"x").check(b"k", *split(Seal(b"y").pack(b"k", b"data")))


def test_the_bytes_of_version_1_have_not_changed() -> None:
    """Servers that were filled before keep their frames."""
    assert Seal().pack(b"key", b"payload").hex() == "4653010107000000" + "db3e13f7af4266ae" + b"payload".hex()


def split(value: bytes) -> tuple[bytes, bytes]:
    return value[:24], value[24:]


# --------------------------------------------------------------------------------------------------------------- bytes

KEYS = [b"f1:%032d" % number for number in range(32)]


def endless(piece: bytes, first: bytes = b"") -> Script:
    return lambda request: itertools.chain([first], itertools.repeat(piece))


def values_of(size: int) -> Script:
    """The same key again and again, or every key, with a value of `size`."""
    piece = b"VALUE %b 0 %d\r\n%b\r\n"
    return lambda request: itertools.chain.from_iterable(
        [piece % (key, size, bytes(size))] for key in itertools.cycle(KEYS)
    )


ANSWERS: dict[str, Script] = {
    "a line without end": endless(b"x" * 65536),
    "a line of VALUE without end": endless(b"VALUE " * 8192),
    "an error without end": endless(b"x" * 65536, b"SERVER_ERROR "),
    "short lines": endless(b"\r\n" * 8192),
    "lines that end in LF only": endless(b"x\n" * 8192),
    "END in the middle of a line": endless(b"END\n" * 8192),
    "STAT lines": endless(b"".join(b"STAT %d y\r\n" % number for number in range(10_000))),
    "HD lines": endless(b"HD kx\r\n" * 8192),
    "carriage returns": endless(b"\r" * 65536),
    "a value of 2 TiB": endless(b"x" * 65536, b"VALUE %b 0 %d\r\n" % (KEYS[0], 1 << 41)),
    "a value of 100 MB": endless(b"x" * 65536, b"VALUE %b 0 100000000\r\n" % KEYS[0]),
    "a value of 5000 digits": endless(b"x" * 65536, b"VALUE %b 0 %b\r\n" % (KEYS[0], b"9" * 1500)),
    "a negative value": endless(b"x" * 65536, b"VALUE %b 0 -1\r\n" % KEYS[0]),
    "values of 900 kB": values_of(900_000),
    "values of 1 byte": values_of(1),
    "empty values": values_of(0),
    "keys that were not asked for": endless(b"VALUE f1:%032d 0 1\r\nx\r\n" % 999),
    "a version without end": endless(b"1" * 65536, b"VERSION "),
    "STORED without end": endless(b"STORED\r\n" * 8192),
}
CALLS: dict[str, Callable[[MemcachedPool, Connection], object]] = {
    "get": lambda pool, raw: pool.get(ROUTE, KEYS),
    "present": lambda pool, raw: pool.present(ROUTE, KEYS),
    "put": lambda pool, raw: pool.put(ROUTE, [(KEYS[0], b"data")]),
    "probe": lambda pool, raw: pool.probe(),
    "stats": lambda pool, raw: raw.stats(),
}
VALUES_IN_ONE_ANSWER = 12 << 20  # 32 values of at most 8 MiB together, and what the server itself has in memory


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_no_answer_costs_much_memory(serve: Callable[[Script], HostileServer], answer: str, call: str) -> None:
    server = serve(ANSWERS[answer])
    pool = MemcachedPool(ClientSettings((server.name,), timeout=5.0))
    raw = Connection(server.name, timeout=5.0, connect_timeout=5.0)
    began = time.monotonic()
    tracemalloc.start()
    try:
        # The pool lets no exception out; a bare connection says what it is.
        may_raise = (AnswerTooLarge, ValueError, OSError) if call == "stats" else ()
        with contextlib.suppress(*may_raise):
            CALLS[call](pool, raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        raw.close()
        pool.close()
    assert peak < (VALUES_IN_ONE_ANSWER if answer == "values of 900 kB" and call == "get" else MOST_MEMORY)
    assert time.monotonic() - began < 4.0


def test_a_port_of_thousands_of_digits() -> None:
    for port in ("9" * 5000, "\u0663", "1_0", "0", "65536"):
        with pytest.raises(UserError, match="write host:port"):
            parse(f"host:{port}")


def test_a_login_answer_without_end(serve: Callable[[Script], HostileServer]) -> None:
    server = serve(endless(b"x" * 65536))
    pool = MemcachedPool(ClientSettings((server.name,), timeout=5.0, secret=b"user word", frame_secret=b"s"))
    tracemalloc.start()
    try:
        assert pool.get(ROUTE, KEYS) == {}
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
        pool.close()


def test_large_frames_are_taken_once_the_disk_has_shown_one(serve: Callable[[Script], HostileServer]) -> None:
    payload = bytes(3 * VALUE_BYTES)
    value = Seal().pack(KEYS[0], payload)
    server = serve(lambda request: [b"VALUE %b 0 %d\r\n%b\r\nEND\r\n" % (KEYS[0], len(value), value)])
    pool = MemcachedPool(ClientSettings((server.name,), timeout=5.0))
    assert pool.get(ROUTE, KEYS[:1]) == {}
    counts, events = pool.take()
    assert counts["errors"] == 1
    assert "more than was requested" in events[0][1]
    pool.put_later(ROUTE, [(KEYS[0], bytes(len(payload) // ROOM + 1))])
    assert pool.probe() == {server.name: False}  # this server speaks of values only
    pool._state().servers[0].up = True
    assert pool.get(ROUTE, KEYS[:1]) == {KEYS[0]: payload}
    pool.close()
