"""The client side of the reader `memcached`, against real servers: what comes back is right, or comes from the disk."""

from __future__ import annotations

import copy
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datasets.memcached.client import ClientSettings, MemcachedPool, _first_in_use, _State
from datasets.memcached.source import MemcachedSource, key_of, route_of
from datasets.memcached.wire import Connection, CorruptValue, Seal, parse, read_secret, read_servers
from datasets.readers.frame_source import FilesSource
from launch.memcached import can_ask_for_a_secret
from tests.memcached import MISSING, Server, free_port, wait_for
from utils.errors import MediaError, UserError

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
pack, check = Seal().pack, Seal().check
NAMES = [f"img_{number:05d}.jpg" for number in range(1, 9)]
Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers; they end with the test."""
    servers: list[Server] = []

    def one(name: str = "s", **options: Any) -> Server:
        servers.append(Server(tmp_path, name, **options))
        return servers[-1]

    yield one
    for server in servers:
        server.close()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    folder = tmp_path / "video"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(os.urandom(20_000 + 3_000 * number))
    return folder


def source_of(*servers: Server | str, timeout: float = 0.25, **options: Any) -> MemcachedSource:
    names = tuple(server if isinstance(server, str) else server.name for server in servers)
    return MemcachedSource(FilesSource(), MemcachedPool(ClientSettings(names, timeout=timeout, **options)))


def on_disk(video: Path) -> list[bytes]:
    return [(video / name).read_bytes() for name in NAMES]


def filled(source: MemcachedSource, video: Path) -> None:
    """Read once, so that the servers have the video."""
    source.read_many(str(video), NAMES)
    assert source.pool.flush()
    source.pool.take()


@pytest.mark.parametrize("tcp", [False, True])
def test_the_second_time_comes_from_the_server(start: Start, video: Path, tcp: bool) -> None:
    source = source_of(start(tcp=tcp))
    filled(source, video)
    assert source.read_many(str(video), NAMES[::-1]) == on_disk(video)[::-1]
    counts, events = source.pool.take()
    assert (counts["hits"], counts.get("misses", 0), events) == (8, 0, [])
    assert counts["bytes"] == sum(map(len, on_disk(video)))
    source.pool.close()


def test_single_files_have_a_route_of_their_own(start: Start, video: Path) -> None:
    source = source_of(start())
    path = str(video / NAMES[0])
    assert source.read(path) == source.inner.read(path)
    assert source.pool.flush()
    assert source.read(path) == source.inner.read(path)
    assert source.pool.take()[0]["hits"] == 1
    source.pool.close()


def test_a_new_dump_makes_new_keys(start: Start, video: Path) -> None:
    source = source_of(start())
    filled(source, video)
    os.rename(video, video.with_name("old"))
    video.mkdir()
    for name in NAMES:
        (video / name).write_bytes(b"new " + name.encode())
    assert source.read_many(str(video), NAMES[:2]) == [b"new " + name.encode() for name in NAMES[:2]]
    assert route_of(str(video)) != route_of(str(video), "another namespace")
    source.pool.close()


def test_wrong_values_are_counted_and_read_from_the_disk(start: Start, video: Path) -> None:
    server = start()
    source = source_of(server)
    filled(source, video)
    route = route_of(str(video))
    assert route is not None
    keys, data = [key_of(route, name) for name in NAMES], on_disk(video)
    flipped = bytearray(pack(keys[0], data[0]))
    flipped[777] ^= 4
    wrong = [bytes(flipped), pack(keys[1], data[1])[:-100], pack(keys[3], data[2]), data[3], b"", b"FS", b"\r\nEND\r\n"]
    raw = Connection(server.name, timeout=1, connect_timeout=1)
    for key, value in zip(keys, wrong, strict=False):
        raw.set(key, value)
    raw.close()
    assert source.read_many(str(video), NAMES) == data
    assert source.pool.flush()
    counts, _ = source.pool.take()
    assert (counts["corrupt"], counts["hits"], counts["fills"]) == (len(wrong), 8 - len(wrong), len(wrong))
    assert source.read_many(str(video), NAMES) == data
    assert source.pool.take()[0]["hits"] == 8
    source.pool.close()


def test_a_checksum_is_bound_to_its_key() -> None:
    value = pack(b"one", b"payload")
    check(b"one", value[:16], value[16:])
    with pytest.raises(CorruptValue):
        check(b"two", value[:16], value[16:])


def test_a_frozen_server_costs_one_time_out_and_comes_back(start: Start, video: Path) -> None:
    server = start()
    source = source_of(server)
    filled(source, video)
    server.signal(signal.SIGSTOP)
    began = time.perf_counter()
    assert source.read_many(str(video), NAMES) == on_disk(video)
    assert 0.2 < time.perf_counter() - began < 0.5
    began = time.perf_counter()
    for _ in range(20):
        assert source.read_many(str(video), NAMES) == on_disk(video)
    assert time.perf_counter() - began < 0.2
    server.signal(signal.SIGCONT)
    assert wait_for(source.pool.usable)
    assert source.read_many(str(video), NAMES) == on_disk(video)
    counts, events = source.pool.take()
    assert (counts["timeouts"], counts["hits"]) == (1, 8)
    assert [text.partition(" (")[0] for _, text in events] == ["out of use", "in use again"]
    source.pool.close()


def test_a_server_that_trickles_is_late(video: Path) -> None:
    """One byte every 20 ms: a bound on each receive alone would let it go on."""
    port, stop = free_port(), threading.Event()
    listener = socket.create_server(("127.0.0.1", port))

    def trickle() -> None:
        connection, _ = listener.accept()
        with connection:
            for byte in b"VALUE " + b"x" * 1000:
                if stop.wait(0.02):
                    return
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    return

    thread = threading.Thread(target=trickle)
    thread.start()
    source = source_of(f"127.0.0.1:{port}")
    began = time.perf_counter()
    assert source.read_many(str(video), NAMES) == on_disk(video)
    assert time.perf_counter() - began < 0.5
    stop.set()
    thread.join()
    listener.close()
    source.pool.close()


def test_a_killed_server_is_replaced_by_the_next(start: Start, video: Path) -> None:
    first, second = start("a"), start("b")
    source = source_of(first, second)
    filled(source, video)
    route = route_of(str(video))
    assert route is not None
    owner = _first_in_use(source.pool._state().servers, route)
    assert owner is not None
    dead = first if owner.name == first.name else second
    dead.kill()
    filled(source, video)  # a miss, and stored on the other one
    filled(source, video)
    assert source.read_many(str(video), NAMES) == on_disk(video)
    assert source.pool.take()[0]["hits"] == 8
    dead.start()
    assert wait_for(lambda: owner.up)
    filled(source, video)
    assert source.read_many(str(video), NAMES) == on_disk(video)
    source.pool.close()


def test_without_any_server_the_disk_answers(video: Path) -> None:
    for source in (source_of(), source_of("unix:/nowhere/s", f"127.0.0.1:{free_port()}")):
        for _ in range(3):
            assert source.read_many(str(video), NAMES) == on_disk(video)
        assert source.pool.take()[0]["no_server"] >= 8
        with pytest.raises(MediaError, match="img_00009"):
            source.read_many(str(video), ["img_00009.jpg"])
        with pytest.raises(MediaError, match="gone"):
            source.read_many(str(video / "gone"), NAMES)
        source.pool.close()


def test_a_full_server_keeps_what_it_has_and_says_so_once(start: Start, tmp_path: Path) -> None:
    source = source_of(start(megabytes=8), timeout=2.0)
    for number in range(12):
        folder = tmp_path / f"v{number}"
        folder.mkdir()
        for name in NAMES:
            (folder / name).write_bytes(os.urandom(150_000))
        source.read_many(str(folder), NAMES)
        assert source.pool.flush()
    counts, events = source.pool.take()
    assert counts["fills"] >= 30
    assert counts["fill_full"] == 96 - counts["fills"]
    assert [text for _, text in events] == ["full; it keeps what it has"]
    assert source.read_many(str(tmp_path / "v0"), NAMES) == on_disk(tmp_path / "v0")
    assert source.pool.take()[0]["hits"] == 8
    source.pool.close()


def test_what_waits_to_be_stored_is_bounded_and_counted_right(start: Start, tmp_path: Path) -> None:
    pool = MemcachedPool(ClientSettings((start().name,), timeout=2.0))
    for number in range(3000):  # far more than the queue holds: what was dropped must not block what comes later
        pool.put_later(b"r" * 16, [(b"key%d" % (number % 50), bytes(20_000))])
    assert pool.flush()
    state = pool._state()
    assert state.bytes_in == state.bytes_out
    counts, _ = pool.take()
    assert counts["fills"] + counts["fill_dropped"] == 3000
    assert counts["fill_dropped"] > 0
    pool.put_later(b"r" * 16, [(b"last", b"value")])
    assert pool.flush()
    assert pool.get(b"r" * 16, [b"last"]) == {b"last": b"value"}
    pool.close()


def test_a_forked_child_has_connections_of_its_own(start: Start, video: Path) -> None:
    source = source_of(start(), timeout=5.0)
    filled(source, video)
    expected, children = on_disk(video), []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            right = all(source.read_many(str(video), NAMES) == expected for _ in range(200))
            os._exit(0 if right and source.pool.take()[0].get("hits") == 1600 else 1)
        children.append(pid)
    assert all(source.read_many(str(video), NAMES) == expected for _ in range(200))
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    counts, _ = source.pool.take()
    assert (counts["hits"], counts.get("errors", 0)) == (1600, 0)
    source.pool.close()


def test_a_copied_source_carries_its_settings_only(start: Start, video: Path) -> None:
    source = source_of(start())
    filled(source, video)
    other = copy.deepcopy(source)  # what a spawned process gets
    assert other.pool._now.servers[0] is not source.pool._now.servers[0]
    assert other.read_many(str(video), NAMES) == on_disk(video)
    assert other.pool.take()[0]["hits"] == 8
    other.pool.close()
    source.pool.close()


def test_a_lost_server_moves_its_own_videos_only() -> None:
    servers = _State(ClientSettings(tuple(f"10.0.0.{number}:11211" for number in range(1, 9)))).servers
    routes = [os.urandom(16) for _ in range(4000)]
    before = [_first_in_use(servers, route) for route in routes]
    shares = [before.count(server) / len(routes) for server in servers]
    assert max(shares) < 1.2 / 8
    assert min(shares) > 0.8 / 8
    servers[3].up = False
    after = [_first_in_use(servers, route) for route in routes]
    moved = {old for old, new in zip(before, after, strict=True) if old is not new}
    assert moved == {servers[3]}


def test_a_secret_is_said_on_every_connection(start: Start, video: Path, tmp_path: Path) -> None:
    if not can_ask_for_a_secret():
        pytest.skip("this memcached has no -Y")
    secret = tmp_path / "secret"
    secret.write_text("zoetrope:s3cret\n")
    server = start(tcp=True, secret=secret)
    source = source_of(server, secret=read_secret(secret))
    filled(source, video)
    server.kill()
    assert source.read_many(str(video), NAMES) == on_disk(video)
    server.start()
    assert wait_for(source.pool.usable)
    filled(source, video)
    assert source.read_many(str(video), NAMES) == on_disk(video)
    assert source.pool.take()[0]["hits"] == 8
    for words in (None, b"zoetrope wrong"):
        refused = source_of(server, secret=words)
        assert refused.read_many(str(video), NAMES) == on_disk(video)
        assert refused.pool.take()[0]["errors"] == 1
        refused.pool.close()
    source.pool.close()


def test_present_tells_without_fetching(start: Start, video: Path) -> None:
    pool = MemcachedPool(ClientSettings((start().name,)))
    route = b"r" * 16
    keys = [key_of(route, name) for name in NAMES]
    assert pool.put(route, [(keys[0], b"a"), (keys[5], b"b" * 50_000)]) == 2
    assert pool.present(route, keys) == [True, False, False, False, False, True, False, False]
    assert pool.get(route, keys) == {keys[0]: b"a", keys[5]: b"b" * 50_000}
    pool.close()


@pytest.mark.parametrize("wrong", ["10.0.0.1", "10.0.0.1:0", "10.0.0.1:port", "unix:relative", "a b:1", ":11211", ""])
def test_what_is_no_server_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="host:port"):
        parse(wrong)


def test_files_of_servers_and_secrets(tmp_path: Path) -> None:
    file = tmp_path / "servers"
    file.write_text("# two\n10.0.0.1:11211  # first\n\nunix:/tmp/s\n[::1]:11211\n")
    assert read_servers(file) == ["10.0.0.1:11211", "unix:/tmp/s", "[::1]:11211"]
    assert parse("[::1]:11211") == ("::1", 11211)
    for text in ("", "# nothing\n", "nonsense\n"):
        file.write_text(text)
        with pytest.raises(UserError):
            read_servers(file)
    with pytest.raises(UserError, match="absent"):
        read_servers(tmp_path / "absent")
    file.write_text("no colon\n")
    with pytest.raises(UserError, match="user:password"):
        read_secret(file)
