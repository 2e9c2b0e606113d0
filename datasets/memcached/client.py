"""Read frames from several memcached servers. Choose the server of a video and handle servers that fail.

The rules below ensure that a reader is never much slower than its disk:

- **Route.** All frames of a video are on one server, chosen by rendezvous hashing. A clip is one round trip, and a lost
  server moves its own videos only.
- **Deadline.** A call takes `timeout` seconds at most, whatever the server does.
- **Breaker.** The first failure takes a server out of use, and the next server in the video's order takes over. Only
  the fill thread probes the failed server, after 0.5, 1, 2, ... 10 s. A reader never waits for a second time-out.
- **Integrity.** A value that was not stored for its key is a miss, is counted, and is overwritten. With a secret no
  other writer can store one (`wire.Seal`).
- **Bytes.** An answer larger than the request allows is a fault of the server, like a late one.
- **Fill.** A daemon thread stores missing frames from a bounded queue. Frames that do not fit are dropped. A server
  without room for a value of some size is not offered that size again for a minute (it runs without evictions).
- **Guard.** A forked child makes its own connections, queue and thread. A pickled pool carries its settings only.
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
FULL_SECONDS = 60.0  # before a size that found no room is offered again
BACKOFF_SECONDS = (0.5, 10.0)  # first and longest wait before a probe
PROBE_SECONDS = 0.5  # readers do not wait for a probe, so it may take longer than their calls
_EVENTS_KEPT = 64
#: Counters; each has one writing thread. `seconds` is the time that readers spent in calls.
READ_COUNTS = ("requests", "frames", "hits", "misses", "corrupt", "timeouts", "errors", "no_server", "bytes", "seconds")
FILL_COUNTS = ("fills", "fill_bytes", "fill_dropped", "fill_full", "fill_errors")


Counts = tuple[dict[str, float], list[tuple[str, str]]]  # of a process since the last report, and (server, event)


@dataclasses.dataclass(frozen=True)
class ClientSettings:
    """Plain values, as in a configuration.

    Attributes:
        servers: "host:port" or "unix:/path". All processes of a job need the same texts, which decide the routes.
        timeout: of a whole call [s]. connect_timeout: the part of it for connecting [s].
        secret: "user password" for servers that require it.
        frame_secret: secret behind the checksum of the values; None = a checksum that detects accidents only.
    """

    servers: tuple[str, ...]
    timeout: float = 0.25
    connect_timeout: float = 0.1
    secret: bytes | None = None
    frame_secret: bytes | None = dataclasses.field(default=None, repr=False)


class Server:
    """One server in the view of one process: connections to read, to fill and to probe, and the breaker."""

    def __init__(self, name: str, settings: ClientSettings) -> None:
        self.name = name
        # The server's own hash seed: its score for a route does not depend on the other servers.
        self.seed = xxhash.xxh3_64_intdigest(name.encode())

        connection = functools.partial(
            Connection, name, connect_timeout=settings.connect_timeout, secret=settings.secret
        )
        self.reading = connection(timeout=settings.timeout)
        # Filling may take longer: no reader waits for it.
        self.filling = connection(timeout=max(settings.timeout, 1.0))
        self._probing = connection(timeout=max(settings.connect_timeout, PROBE_SECONDS))

        self.failures = 0
        self.ask_again = 0.0  # monotonic time of the next probe
        # Looking up a host name has no time limit, so the first probe of the fill thread does it, and not a reader.
        self.up = not self.reading.needs_look_up
        self._refused: dict[int, float] = {}  # class of sizes -> time until which it is not offered

    def fail(self) -> None:
        """Take the server out of use until a probe succeeds."""
        wait = min(BACKOFF_SECONDS[0] * 2**self.failures, BACKOFF_SECONDS[1])
        self.failures = min(self.failures + 1, 16)
        self.ask_again = time.monotonic() + wait
        self.up = False
        # The server may come back as another process. Connections to the old one must not count as a second failure.
        self.reading.stale = self.filling.stale = True

    def probe(self) -> bool:
        """Request the version. Return True if the server answered in time, and use it again."""
        try:
            self._probing.version()
        except Exception:  # noqa: BLE001  after any error the server stays out of use
            self.fail()
            return False
        finally:
            # A probe is rare, and an idle connection might be stale at the next one.
            self._probing.close()
        self.up = True
        return True

    def has_room(self, size: int) -> bool:
        """Return False for a size that was refused in the last minute."""
        until = self._refused.get(_size_class(size))
        return until is None or time.monotonic() > until

    def refused(self, size: int) -> bool:
        """Record that a value of this size found no room. Return True if the server had room for all sizes before."""
        news = not any(until > time.monotonic() for until in self._refused.values())
        self._refused[_size_class(size)] = time.monotonic() + FULL_SECONDS
        return news

    def close(self) -> None:
        """Close all connections."""
        for connection in (self.reading, self.filling, self._probing):
            connection.close()


def _size_class(size: int) -> int:
    """Return a class of sizes within about 1 %, finer than a server's slabs: a full slab blocks no neighbour."""
    # Keep the 7 leading bits of the size.
    power = max(size.bit_length() - 7, 0)
    return (power << 7) + (size >> power)


class _State:
    """The state of one process, never shared with a forked child."""

    def __init__(self, settings: ClientSettings) -> None:
        self.pid = os.getpid()
        self.servers = [Server(name, settings) for name in settings.servers]
        self.lock = threading.Lock()  # of the reading connections
        self.fill_lock = threading.Lock()  # of the filling connections
        self.start_lock = threading.Lock()  # of `thread`

        self.queue: queue.Queue[tuple[bytes, list[tuple[bytes, bytes]], int] | None] = queue.Queue(QUEUE_CLIPS)
        self.queue_lock = threading.Lock()
        self.bytes_in = self.bytes_out = 0  # of the queue since the start; `queue_lock` guards the first only
        self.thread: threading.Thread | None = None
        self.closed = False
        self.largest = 0  # bytes of the largest frame that came from the disk; limits what servers may send
        self.counts: dict[str, float] = dict.fromkeys((*READ_COUNTS, *FILL_COUNTS), 0)
        self.taken: dict[str, float] = dict(self.counts)  # `counts` at the last `take`
        self.events: collections.deque[tuple[str, str]] = collections.deque(maxlen=_EVENTS_KEPT)
        if not settings.servers:
            self.events.append(("auto", "no servers (they are started by train.sh, eval.sh and python -m launch)"))


class MemcachedPool:
    """Values on several servers. Every thread may call. Calls of one process run one after another.

    Args:
        settings: servers and times; UserError if a server's name is wrong.
    """

    def __init__(self, settings: ClientSettings) -> None:
        for server in settings.servers:
            parse(server)
        self.settings = settings
        self.seal = Seal(settings.frame_secret)
        self._now = _State(settings)

    def __getstate__(self) -> dict[str, ClientSettings]:
        return {"settings": self.settings}

    def __setstate__(self, state: dict[str, ClientSettings]) -> None:
        self.settings = state["settings"]
        self.seal = Seal(self.settings.frame_secret)
        self._now = _State(self.settings)

    def _state(self) -> _State:
        if self._now.pid != os.getpid():  # a forked child: parent and child would mix their bytes on one connection
            inherited, self._now = self._now, _State(self.settings)
            for server in inherited.servers:
                server.close()
        return self._now

    def usable(self) -> bool:
        """Return True if any server is in use. If none is, start the thread that probes them."""
        state = self._state()
        for server in state.servers:
            if server.up:
                return True
        if state.thread is None:
            self._start_thread(state)
        return False

    def count_unserved(self, frames: int) -> None:
        """Count frames that were requested while no server was in use."""
        counts = self._state().counts
        counts["frames"] += frames
        counts["no_server"] += frames

    def get(self, route: bytes, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the verified payloads of those keys that a server has. Never raise for a server's fault.

        Args:
            route: digest of the video; decides on the server.
            keys: at most 250 bytes each, without spaces.
        """
        began = time.monotonic()
        state = self._state()
        counts = state.counts
        counts["requests"] += 1
        counts["frames"] += len(keys)

        # Another thread may use the connections. Do not wait longer than for a server.
        if not state.lock.acquire(timeout=self.settings.timeout):
            counts["timeouts"] += 1
            counts["misses"] += len(keys)
            return {}

        try:
            server = _first_in_use(state.servers, route)
            if server is None:
                counts["no_server"] += len(keys)
                return {}
            values = self._read(state, server, keys, began + self.settings.timeout)
        finally:
            state.lock.release()

        # Check outside the lock, so that another thread can use the server.
        payloads = {}
        for key, (header, payload) in values.items():
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
            values = server.reading.get_many(keys, deadline, header_bytes=self.seal.header_bytes, largest=state.largest)
        except TimeoutError:
            # A slow server and a faulty one leave the stream in an unknown state, so both are taken out of use.
            state.counts["timeouts"] += 1
            self._failed(state, server, f"did not answer within {self.settings.timeout:g} s")
        except Exception as error:  # noqa: BLE001  any doubt about a server or its stream only costs speed
            state.counts["errors"] += 1
            self._failed(state, server, f"{type(error).__name__}: {error}")
        else:
            # The next failure starts with the shortest wait again.
            server.failures = 0
            return values
        return {}

    def _failed(self, state: _State, server: Server, why: str) -> None:
        server.fail()
        state.events.append((server.name, f"out of use ({why[:200]})"))
        self._start_thread(state)

    def put_later(self, route: bytes, items: list[tuple[bytes, bytes]]) -> None:
        """Store payloads in the background. Drop and count them if too much is queued."""
        state = self._state()
        size = sum(len(payload) for _, payload in items)
        _note_sizes(state, items)

        if state.thread is None:
            self._start_thread(state)

        with state.queue_lock:
            try:
                # Limit bytes too, not only entries: a few clips of large frames would fill the memory.
                if state.bytes_in - state.bytes_out + size > QUEUE_BYTES:
                    raise queue.Full
                state.queue.put_nowait((route, items, size))
                state.bytes_in += size
            except queue.Full:
                state.counts["fill_dropped"] += len(items)

    def put(self, route: bytes, items: list[tuple[bytes, bytes]]) -> int:
        """Store payloads now, on the first server in use for the video. Return the number of stored payloads."""
        state, stored = self._state(), 0
        _note_sizes(state, items)

        with state.fill_lock:
            server = _first_in_use(state.servers, route)
            for key, payload in items if server is not None else ():
                assert server is not None
                size = len(key) + self.seal.header_bytes + len(payload)
                # Check before sending: a refused value costs its whole transfer.
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
                state.events.append((server.name, "full; it keeps what it has"))
        except Exception as error:  # noqa: BLE001  as in `_read`
            state.counts["fill_errors"] += 1
            # Only the first failure is an event; the other values of this clip fail too.
            if server.up:
                self._failed(state, server, f"{type(error).__name__} while storing: {error}")
        else:
            state.counts["fills"] += 1
            state.counts["fill_bytes"] += len(payload)
            return True
        return False

    def present(self, route: bytes, keys: Sequence[bytes]) -> list[bool]:
        """Return which keys are stored where `put` would store them; all False if no server answers."""
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
        """Probe every server now. Return name -> whether it answered."""
        return {server.name: server.probe() for server in self._state().servers}

    def take(self) -> Counts:
        """Return (counters since the last call, changes of state as (server, text))."""
        state = self._state()
        now = dict(state.counts)
        news = {name: value - state.taken[name] for name, value in now.items() if value != state.taken[name]}
        state.taken = now

        events = [state.events.popleft() for _ in range(len(state.events))]
        return news, events

    def flush(self, seconds: float = 10.0) -> bool:
        """Wait until the queue has been stored or dropped. Return False if that takes longer than `seconds`."""
        end = time.monotonic() + seconds
        while self._now.queue.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.002)
        return not self._now.queue.unfinished_tasks

    def close(self) -> None:
        """End the thread and close all connections. Drop what is queued."""
        # A fresh state, so that the pool can be used again.
        state, self._now = self._state(), _State(self.settings)
        state.closed = True
        if state.thread is not None:
            with contextlib.suppress(queue.Full):  # a full queue wakes the thread too, and it then sees `closed`
                state.queue.put_nowait(None)
            state.thread.join(timeout=2.0)

        for server in state.servers:
            server.close()

    def _start_thread(self, state: _State) -> None:
        with state.start_lock:
            # Under the lock: several readers may find no thread at the same time.
            if state.thread is None and state.servers and not state.closed:
                state.thread = threading.Thread(target=self._serve, args=(state,), name="memcached-fill", daemon=True)
                state.thread.start()

    def _serve(self, state: _State) -> None:
        """Store what is queued, and probe servers that are out of use. This is the fill thread."""
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

            # The time limit of `get` above brings the thread here even if nothing is queued.
            for server in state.servers:
                if not server.up and time.monotonic() >= server.ask_again and not state.closed and server.probe():
                    state.events.append((server.name, "in use again"))


def _note_sizes(state: _State, items: Sequence[tuple[bytes, bytes]]) -> None:
    """Track the largest frame that came from the disk. Values from servers must not raise their own limit."""
    state.largest = max(state.largest, *(len(payload) for _, payload in items), 0)


def _first_in_use(servers: Sequence[Server], route: bytes) -> Server | None:
    """Return the server in use with the highest score for this video (rendezvous hashing)."""
    best, best_score = None, -1
    for server in servers:
        if server.up:
            # The seed is the server, so a lost server changes no other score.
            score = xxhash.xxh3_64_intdigest(route, server.seed)
            if score > best_score:
                best, best_score = server, score
    return best
