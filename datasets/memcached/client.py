"""Frames in the memory of several memcached servers: which server has which video, and what happens when one is ill.

Rules, each of which keeps a reader at the speed of its disk at worst:

- **Route.** All frames of a video lie on one server, chosen by rendezvous hashing: a clip is one round trip, and a
  lost server moves its own videos only.
- **Deadline.** A call takes `timeout` seconds at most, whatever the server does.
- **Breaker.** The first failure takes a server out of use; the next one in the video's own order takes over. Only the
  fill thread asks a server whether it is back, after 0.5, 1, 2, ... 10 s: a reader never waits for a second time-out.
- **Integrity.** A value that was not stored for its key is a miss, is counted, and is overwritten. With a secret no
  other writer can store one (`wire.Seal`).
- **Bytes.** An answer larger than the request can ask for is a fault of the server, like one that comes too late.
- **Fill.** What was missing is stored by a daemon thread from a bounded queue; what does not fit is dropped. A server
  that has no room for a value of some size is not offered that size again for a minute (it runs without evictions).
- **Guard.** A forked child makes its own connections, queue and thread; a pickled pool carries its settings only.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import queue
import threading
import time
from collections.abc import Sequence

import xxhash

from datasets.memcached.wire import Connection, CorruptValue, NoRoom, Seal, parse

QUEUE_CLIPS = 64
QUEUE_BYTES = 64 << 20
FULL_SECONDS = 60.0
BACKOFF_SECONDS = (0.5, 10.0)
PROBE_SECONDS = 0.5  # nobody waits for a probe
_EVENTS_KEPT = 64
#: What is counted; each name has one writing thread. `seconds` is the time that readers spent in calls.
READ_COUNTS = ("requests", "frames", "hits", "misses", "corrupt", "timeouts", "errors", "no_server", "bytes", "seconds")
FILL_COUNTS = ("fills", "fill_bytes", "fill_dropped", "fill_full", "fill_errors")


Counts = tuple[dict[str, float], list[tuple[str, str]]]  # of a process since it was last asked, and (server, event)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Plain values, as they stand in a configuration.

    Attributes:
        servers: "host:port" or "unix:/path"; the same texts in the same job, for they decide the routes.
        timeout: of a whole call [s]. connect_timeout: of the part of it spent connecting [s].
        secret: "user password" of servers that ask for one.
        frame_secret: secret behind the checksum of the values; None = a checksum that finds accidents only.
    """

    servers: tuple[str, ...]
    timeout: float = 0.25
    connect_timeout: float = 0.1
    secret: bytes | None = None
    frame_secret: bytes | None = dataclasses.field(default=None, repr=False)


class Server:
    """One server as one process sees it: two connections, one to read and one to fill, and the breaker."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.seed = xxhash.xxh3_64_intdigest(name.encode())
        connection = functools.partial(
            Connection, name, connect_timeout=settings.connect_timeout, secret=settings.secret
        )
        self.reading = connection(timeout=settings.timeout)
        self.filling = connection(timeout=max(settings.timeout, 1.0))
        self._probing = connection(timeout=max(settings.connect_timeout, PROBE_SECONDS))
        self.failures = 0
        self.ask_again = 0.0  # monotonic time of the next probe
        # A name has to be looked up, which has no time limit: the fill thread's first probe does it.
        self.up = not self.reading.needs_look_up
        self._refused: dict[int, float] = {}  # class of sizes -> time until which it is not offered

    def fail(self) -> None:
        """Take the server out of use until a probe says that it is back."""
        wait = min(BACKOFF_SECONDS[0] * 2**self.failures, BACKOFF_SECONDS[1])
        self.failures = min(self.failures + 1, 16)
        self.ask_again = time.monotonic() + wait
        self.up = False
        # A server that comes back may be another process: what is still connected to the old one must not fail again.
        self.reading.stale = self.filling.stale = True

    def probe(self) -> bool:
        """Ask for the version; True if the server answered in time and is in use again."""
        try:
            self._probing.version()
        except Exception:  # noqa: BLE001  whatever is wrong with a server, it stays out of use
            self.fail()
            return False
        finally:
            self._probing.close()
        self.up = True
        return True

    def has_room(self, size: int) -> bool:
        """False for a size that was refused in the last minute."""
        until = self._refused.get(_size_class(size))
        return until is None or time.monotonic() > until

    def refused(self, size: int) -> bool:
        """Note that a value of this size found no room; True if that is news."""
        news = not any(until > time.monotonic() for until in self._refused.values())
        self._refused[_size_class(size)] = time.monotonic() + FULL_SECONDS
        return news

    def close(self) -> None:
        """Close all connections."""
        for connection in (self.reading, self.filling, self._probing):
            connection.close()


def _size_class(size: int) -> int:
    """Sizes within about 1 %, finer than a server's slab classes: one that is full says nothing of its neighbours."""
    power = max(size.bit_length() - 7, 0)
    return (power << 7) + (size >> power)


class _State:
    """What belongs to one process: never shared with a forked child."""

    def __init__(self, settings: Settings) -> None:
        self.pid = os.getpid()
        self.servers = [Server(name, settings) for name in settings.servers]
        self.lock = threading.Lock()
        self.fill_lock = threading.Lock()
        self.start_lock = threading.Lock()
        self.queue: queue.Queue[tuple[bytes, list[tuple[bytes, bytes]], int] | None] = queue.Queue(QUEUE_CLIPS)
        self.queue_lock = threading.Lock()
        self.bytes_in = self.bytes_out = 0  # of the queue, since the start; the first under the lock
        self.thread: threading.Thread | None = None
        self.closed = False
        self.largest = 0  # bytes of the largest frame that came from the disk; bounds what servers may send
        self.counts: dict[str, float] = dict.fromkeys((*READ_COUNTS, *FILL_COUNTS), 0)
        self.taken: dict[str, float] = dict(self.counts)
        self.events: collections.deque[tuple[str, str]] = collections.deque(maxlen=_EVENTS_KEPT)
        if not settings.servers:
            self.events.append(("auto", "no servers (they are started by train.sh, eval.sh and python -m launch)"))


class MemcachedPool:
    """Values on several servers. Any thread may call; calls of one process go one after another.

    Args:
        settings: servers and times; UserError if a server's name is wrong.
    """

    def __init__(self, settings: Settings) -> None:
        for server in settings.servers:
            parse(server)
        self.settings = settings
        self.seal = Seal(settings.frame_secret)
        self._now = _State(settings)

    def __getstate__(self) -> dict[str, Settings]:
        return {"settings": self.settings}

    def __setstate__(self, state: dict[str, Settings]) -> None:
        self.settings = state["settings"]
        self.seal = Seal(self.settings.frame_secret)
        self._now = _State(self.settings)

    def _state(self) -> _State:
        if self._now.pid != os.getpid():  # we are a forked child: the descriptors are shared, their streams must not be
            inherited, self._now = self._now, _State(self.settings)
            for server in inherited.servers:
                server.close()
        return self._now

    def usable(self) -> bool:
        """Whether any server is in use; wakes the thread that asks the others, if none is."""
        state = self._state()
        for server in state.servers:
            if server.up:
                return True
        if state.thread is None:
            self._start_thread(state)
        return False

    def count_unserved(self, frames: int) -> None:
        """Count frames that were asked for while no server was in use."""
        counts = self._state().counts
        counts["frames"] += frames
        counts["no_server"] += frames

    def get(self, route: bytes, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Payloads of those keys that a server has, every one checked; never raises for what a server does.

        Args:
            route: digest of the video; decides on the server.
            keys: at most 250 bytes each, without blanks.
        """
        began = time.monotonic()
        state = self._state()
        counts = state.counts
        counts["requests"] += 1
        counts["frames"] += len(keys)
        if not state.lock.acquire(timeout=self.settings.timeout):
            counts["timeouts"] += 1
            counts["misses"] += len(keys)
            return {}
        try:
            server = _first_in_use(state.servers, route)
            if server is None:
                counts["no_server"] += len(keys)
                return {}
            found = self._read(state, server, keys, began + self.settings.timeout)
        finally:
            state.lock.release()
        payloads = {}
        for key, (header, payload) in found.items():
            try:
                self.seal.check(key, header, payload)
            except CorruptValue:
                counts["corrupt"] += 1
                continue
            payloads[key] = payload
        counts["hits"] += len(payloads)
        counts["misses"] += len(keys) - len(payloads)
        counts["bytes"] += sum(map(len, payloads.values()))
        counts["seconds"] += time.monotonic() - began
        return payloads

    def _read(
        self, state: _State, server: Server, keys: Sequence[bytes], deadline: float
    ) -> dict[bytes, tuple[bytes, bytes]]:
        try:
            found = server.reading.get_many(keys, deadline, header_bytes=self.seal.header_bytes, largest=state.largest)
        except TimeoutError:
            state.counts["timeouts"] += 1
            self._failed(state, server, f"did not answer within {self.settings.timeout:g} s")
        except Exception as error:  # noqa: BLE001  any doubt about a server or its stream costs speed, nothing else
            state.counts["errors"] += 1
            self._failed(state, server, f"{type(error).__name__}: {error}")
        else:
            server.failures = 0
            return found
        return {}

    def _failed(self, state: _State, server: Server, why: str) -> None:
        server.fail()
        state.events.append((server.name, f"out of use ({why[:200]})"))
        self._start_thread(state)

    def put_later(self, route: bytes, items: list[tuple[bytes, bytes]]) -> None:
        """Store payloads in the background; dropped and counted when too much waits already."""
        state = self._state()
        size = sum(len(payload) for _, payload in items)
        _note_sizes(state, items)
        if state.thread is None:
            self._start_thread(state)
        with state.queue_lock:
            try:
                if state.bytes_in - state.bytes_out + size > QUEUE_BYTES:
                    raise queue.Full
                state.queue.put_nowait((route, items, size))
                state.bytes_in += size
            except queue.Full:
                state.counts["fill_dropped"] += len(items)

    def put(self, route: bytes, items: list[tuple[bytes, bytes]]) -> int:
        """Store payloads now, on the video's first server in use. The number of those that were stored."""
        state, stored = self._state(), 0
        _note_sizes(state, items)
        with state.fill_lock:
            server = _first_in_use(state.servers, route)
            for key, payload in items if server is not None else ():
                assert server is not None
                size = len(key) + self.seal.header_bytes + len(payload)
                if not server.has_room(size):
                    state.counts["fill_full"] += 1
                elif server.up:
                    stored += self._store(state, server, key, payload, size)
        return stored

    def _store(self, state: _State, server: Server, key: bytes, payload: bytes, size: int) -> bool:
        try:
            server.filling.set(key, self.seal.pack(key, payload))
        except NoRoom:  # no room under -M, or larger than the server takes
            state.counts["fill_full"] += 1
            if server.refused(size):
                state.events.append((server.name, "full, keeps what it has"))
        except Exception as error:  # noqa: BLE001  as in `_read`
            state.counts["fill_errors"] += 1
            if server.up:
                self._failed(state, server, f"{type(error).__name__} while storing: {error}")
        else:
            state.counts["fills"] += 1
            state.counts["fill_bytes"] += len(payload)
            return True
        return False

    def present(self, route: bytes, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are stored where `put` would store them; all False where no server can be asked."""
        state = self._state()
        with state.fill_lock:
            server = _first_in_use(state.servers, route)
            if server is not None:
                try:
                    return server.filling.present(keys)
                except Exception as error:  # noqa: BLE001  as in `_read`
                    self._failed(state, server, f"{type(error).__name__}: {error}")
        return [False] * len(keys)

    def probe(self) -> dict[str, bool]:
        """Ask every server now: name -> whether it answered."""
        return {server.name: server.probe() for server in self._state().servers}

    def take(self) -> Counts:
        """(what was counted since the last call, changes of state as (server, text))."""
        state = self._state()
        now = dict(state.counts)
        news = {name: value - state.taken[name] for name, value in now.items() if value != state.taken[name]}
        state.taken = now
        events = [state.events.popleft() for _ in range(len(state.events))]
        return news, events

    def flush(self, seconds: float = 10.0) -> bool:
        """Wait until what was put before is stored or dropped; False when that takes too long."""
        end = time.monotonic() + seconds
        while self._now.queue.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.002)
        return not self._now.queue.unfinished_tasks

    def close(self) -> None:
        """End the thread and close all connections; what waits to be stored is dropped."""
        state, self._now = self._state(), _State(self.settings)
        state.closed = True
        if state.thread is not None:
            with contextlib.suppress(queue.Full):  # then the thread has work, and sees `closed` after it
                state.queue.put_nowait(None)
            state.thread.join(timeout=2.0)
        for server in state.servers:
            server.close()

    def _start_thread(self, state: _State) -> None:
        with state.start_lock:
            if state.thread is None and state.servers and not state.closed:
                state.thread = threading.Thread(target=self._serve, args=(state,), name="memcached-fill", daemon=True)
                state.thread.start()

    def _serve(self, state: _State) -> None:
        """The fill thread: store what is queued, and ask servers that are out of use whether they are back."""
        while not state.closed:
            try:
                work = state.queue.get(timeout=0.1)
            except queue.Empty:
                work = None
            else:
                if work is not None and not state.closed:
                    state.bytes_out += work[2]
                    self.put(work[0], work[1])
                state.queue.task_done()
            for server in state.servers:
                if not server.up and time.monotonic() >= server.ask_again and not state.closed and server.probe():
                    state.events.append((server.name, "in use again"))


def _note_sizes(state: _State, items: Sequence[tuple[bytes, bytes]]) -> None:
    """Note how large frames are, from what the disk gave: what servers send must not raise its own limit."""
    state.largest = max(state.largest, *(len(payload) for _, payload in items), 0)


def _first_in_use(servers: Sequence[Server], route: bytes) -> Server | None:
    """The server with the highest score for this video among those in use (rendezvous hashing)."""
    best, best_score = None, -1
    for server in servers:
        if server.up:
            score = xxhash.xxh3_64_intdigest(route, server.seed)
            if score > best_score:
                best, best_score = server, score
    return best
