"""Damaged answers of memcached servers: no exception leaves the pool, and no payload but the stored one comes out."""

from __future__ import annotations

import functools
import json
import random
import socket
import threading
from pathlib import Path

from datasets.memcached.client import ClientSettings, MemcachedPool
from datasets.memcached.wire import (
    Connection,
    Seal,
    frame_secret,
    parse,
    read_secret,
    read_servers,
)
from tests.fuzz import mutators
from utils.errors import UserError

NAME = "memcached_wire"
MODULES = ["datasets/memcached/wire.py"]
EXPECTED_EVENTS = frozenset({
    "socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo", "os.remove",
})  # fmt: skip
SECRET = b"user:word\nframes:other"
ROUTE = b"r" * 16
_FRAMES = {b"f1:%032d" % number: bytes([number]) * (40 * number + 1) for number in range(6)}


# An input is a first line of JSON ({"op": ..., "secret": ...}), then the bytes that the server answers (or the text of
# a file). A login is answered first, with the line `auth`.
def _input(op: str, answer: bytes, *, secret: bool = False, auth: str = "STORED") -> bytes:
    return json.dumps({"op": op, "secret": secret, "auth": auth}).encode() + b"\n" + answer


def _values(secret: bool, ending: bytes = b"END\r\n") -> bytes:
    seal = Seal(SECRET if secret else None)
    values = {key: seal.pack(key, payload) for key, payload in _FRAMES.items()}
    return b"".join(b"VALUE %b 0 %d\r\n%b\r\n" % (key, len(value), value) for key, value in values.items()) + ending


@functools.cache
def seeds() -> list[bytes]:
    """One answer of each kind, with and without a secret, and the files that name servers and secrets."""
    hits = b"".join(b"HD k%b\r\n" % key for key in _FRAMES)
    statistics = b"".join(b"STAT name%d %d\r\n" % (number, number) for number in range(50)) + b"END\r\n"
    return [
        _input("get", _values(False)),
        _input("get", _values(True), secret=True),
        _input("present", hits),
        _input("present", hits.replace(b"HD k" + next(iter(_FRAMES)), b"EN"), secret=True),
        _input("put", b"STORED\r\n"),
        _input("version", b"VERSION 1.6.21\r\n"),
        _input("stats", statistics),
        _input("servers", b"# a remark\n10.0.0.5:11211\n[::1]:5 # another\nunix:/run/s\nnode-3:11211\n"),
        _input("secret", b"user:word\nframes:0123456789abcdef\n"),
    ]


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Change lengths, keys, headers and payloads of an answer, or its bytes."""
    first, _, answer = data.partition(b"\n")
    plan = json.loads(first)
    if rng.random() < 0.1:
        plan["auth"] = rng.choice(["", "ERROR", "CLIENT_ERROR x", "STORED\r\nSTORED", "x" * 5000, "S"])
        plan["secret"] = True
    how = rng.randrange(10)
    if how < 5:
        rows = answer.split(b"\r\n")
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(rows))
            match rng.randrange(6):
                case 0:
                    rows[at] = mutators.some(rng, rows[at], most=2)
                case 1:
                    rows[at] = mutators.text_number(rng, rows[at])
                case 2:
                    rows.insert(at, rows[rng.randrange(len(rows))])
                case 3:
                    del rows[at]
                    rows = rows or [b""]
                case 4:
                    rows[at] = rng.choice([b"END", b"VALUE", b"VALUE a 0 3", b"SERVER_ERROR out of memory", b"ERROR"])
                case _:
                    fields = rows[at].split(b" ")
                    rng.shuffle(fields)
                    rows[at] = b" ".join(fields)
        answer = b"\r\n".join(rows)
    elif how < 7:
        answer = mutators.some(rng, answer, mutators.TEXT)
    else:
        answer = mutators.some(rng, answer)
    return json.dumps(plan).encode() + b"\n" + answer


class _Server:
    """Answers with given bytes, whatever it is asked, and closes."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.answer = self.auth = b""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind(str(path))
        self.socket.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            with connection:
                try:
                    self._one(connection)
                except OSError:
                    continue

    def _one(self, connection: socket.socket) -> None:
        connection.settimeout(2.0)
        heard = connection.recv(1 << 16)
        if heard.startswith(b"set auth"):
            connection.sendall(self.auth)
            if not connection.recv(1 << 16):
                return
        connection.sendall(self.answer)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(0.5)
        while connection.recv(1 << 16):
            pass


_servers: dict[Path, _Server] = {}


def run(data: bytes, folder: Path) -> str:
    """Ask a server that gives this answer, as readers do; or read the file."""
    first, _, answer = data.partition(b"\n")
    plan = json.loads(first)
    if plan["op"] in ("servers", "secret"):
        return _file(plan["op"], answer, folder / "file")
    path = folder / "s"
    server = _servers.get(path) or _servers.setdefault(path, _Server(path))
    server.answer, server.auth = answer, plan["auth"].encode() + b"\r\n"
    secret = {"secret": b"user word", "frame_secret": SECRET} if plan["secret"] else {}
    pool = MemcachedPool(ClientSettings((f"unix:{path}",), timeout=5.0, connect_timeout=5.0, **secret))
    try:
        good = _ask(plan["op"], pool, f"unix:{path}", bool(plan["secret"]))
        counts, _ = pool.take()
    finally:
        pool.close()
    if counts.get("timeouts"):
        raise AssertionError(f"a server that had answered was taken for one that is late: {counts}")
    if good:
        return "ok"
    broken = any(counts.get(name) for name in ("errors", "fill_errors"))
    return "stage0" if broken and not _begins_well(plan["op"], answer) else "refused"


def _begins_well(op: str, answer: bytes) -> bool:
    """Whether the first line of an answer is one that this request may get."""
    words = answer.partition(b"\r\n")[0].split()
    kinds = {"get": b"VALUE", "present": b"HD", "put": b"STORED", "version": b"VERSION", "stats": b"STAT"}
    return words[:1] == [kinds[op]]


def _ask(op: str, pool: MemcachedPool, name: str, secret: bool) -> bool:
    """Make one call; whether everything that was asked for came back."""
    match op:
        case "get":
            payloads = pool.get(ROUTE, list(_FRAMES))
            for key, payload in payloads.items():
                if payload != _FRAMES[key]:
                    raise AssertionError(f"another payload for {key!r} was accepted")
            return len(payloads) == len(_FRAMES)
        case "present":
            return sum(pool.present(ROUTE, list(_FRAMES))) >= len(_FRAMES) - 1
        case "put":
            return pool.put(ROUTE, [(b"f1:0", b"payload")]) == 1
        case "version":
            return pool.probe() == {name: True}
    connection = Connection(name, timeout=5.0, connect_timeout=5.0, secret=b"user word" if secret else None)
    try:
        return len(connection.stats()) == 50
    except Exception as error:  # noqa: BLE001  callers of stats() catch what a broken server causes
        if isinstance(error, (AssertionError, AttributeError, NameError)):
            raise
        return False
    finally:
        connection.close()


def _file(op: str, text: bytes, file: Path) -> str:
    file.write_bytes(text)
    try:
        if op == "servers":
            for server in read_servers(file):
                parse(server)
        elif b" " not in read_secret(file) or not frame_secret(file):
            raise AssertionError("a secret without its parts")
    except UserError as error:
        if str(file) not in str(error) and "memcached server" not in str(error):
            raise AssertionError(f"unclear: {error}") from error
        return "refused"
    return "ok"
