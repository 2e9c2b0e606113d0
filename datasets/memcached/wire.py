"""Talk to one memcached server over one connection: five commands of its text protocol, with a deadline per call.

- The time left of the call bounds every wait, including connecting and authentication. A server that trickles bytes is
  late.
- Bytes are received into a large buffer, and each value is copied out of it once. Small receives cost system calls, and
  have stalled on the loopback.
- The bytes of an answer are bounded (`Limits`). An answer longer than the request allows ends the connection.

Every value has a header, `<2sBBI`: magic, version, kind, length of the payload. A checksum follows:

- version 1, without a secret: xxh3_64 of the payload, seeded with xxh64 of the key, 8 bytes. It detects accidents. Due
  to the seed, a value of another key fails like one with a flipped bit.
- version 2, with a secret: keyed BLAKE2b of key and payload, 16 bytes. Only processes with the secret can make one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import hmac
import ipaddress
import math
import os
import re
import select
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HEADER = struct.Struct("<2sBBI")
MAGIC, IMAGE = b"FS", 1
UNKEYED, KEYED = 1, 2  # versions of the header
BUFFER_BYTES = 1 << 17
LINE_BYTES = 2048  # of one line; a key has at most 250
LINES_BYTES = 1 << 18  # of all lines of one answer
VALUE_BYTES, VALUES_BYTES = 1 << 20, 8 << 20  # of one value and of all values of an answer, while no frame is known
ROOM = 4  # a value may be this many times as large as the largest frame from the disk
LATE_SECONDS, LAST_WAIT_SECONDS = 0.1, 0.01  # see `_Stream._wait`
Address = str | tuple[object, ...]  # in the form of a socket's address
_UNIX = "unix:"
_CR = ord("\r")


class CorruptValue(Exception):
    """A value differs from the one that was stored under its key."""


class AnswerTooLarge(Exception):
    """A server sends more than the request allows."""


class Seal:
    """Make and check the values that are stored: a header with a checksum, and the payload.

    Args:
        secret: bytes that only our processes have; the checksum is then a message authentication code. None = the
            checksum detects accidents only.

    Attributes:
        header_bytes: length of the header with its checksum.
        key_prefix: beginning of every key, 3 bytes, so that values of a different version are never requested.
        salt: part of every key, so that readers with different secrets do not overwrite each other's values.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        self.version = UNKEYED if secret is None else KEYED
        self.header_bytes = HEADER.size + (8 if secret is None else 16)
        self.key_prefix = b"f%d:" % self.version
        # One secret per purpose: keys, which servers see, reveal nothing about the checksum's secret.
        self._key = b"" if secret is None else _derived(secret, b"zoetrope.frames")
        self.salt = b"" if secret is None else _derived(secret, b"zoetrope.names")[:8]

    def pack(self, key: bytes, payload: bytes) -> bytes:
        """Return header and payload, as stored."""
        return HEADER.pack(MAGIC, self.version, IMAGE, len(payload)) + self._checksum(key, payload) + payload

    def check(self, key: bytes, header: bytes, payload: bytes) -> None:
        """Raise CorruptValue unless these bytes were packed for this key with this secret."""
        if len(header) != self.header_bytes:
            raise CorruptValue("shorter than a header")

        magic, version, kind, length = HEADER.unpack_from(header)
        if (magic, version, kind) != (MAGIC, self.version, IMAGE) or length != len(payload):
            raise CorruptValue("another header")
        if not hmac.compare_digest(header[HEADER.size :], self._checksum(key, payload)):
            raise CorruptValue("checksum")

    def _checksum(self, key: bytes, payload: bytes) -> bytes:
        if self.version == UNKEYED:
            return xxhash.xxh3_64_intdigest(payload, xxhash.xxh64_intdigest(key)).to_bytes(8, "little")
        code = hashlib.blake2b(key=self._key, digest_size=16)
        code.update(b"%d:%b" % (len(key), key))  # the length separates key and payload unambiguously
        code.update(payload)
        return code.digest()


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(secret, person=purpose, digest_size=32).digest()


@dataclasses.dataclass
class Limits:
    """The largest sizes that an answer may have, in bytes.

    Attributes:
        line, lines: of one line and of all lines.
        value, values: of one value and of all values.
        count: number of values.
    """

    line: int = LINE_BYTES
    lines: int = LINES_BYTES
    value: int = VALUE_BYTES
    values: int = VALUES_BYTES
    count: int = 1

    @classmethod
    def of(cls, keys: int, largest: int) -> Limits:
        """Return the limits of an answer to a request for some keys.

        Args:
            keys: number of keys.
            largest: bytes of the largest frame that came from the disk so far; 0 = none yet.
        """
        value = max(VALUE_BYTES, ROOM * largest + 64)  # 64: more than any header
        # Twice the largest frame so far for each key: later frames may be larger.
        values = max(VALUES_BYTES, value, keys * 2 * largest)
        return cls(lines=LINES_BYTES + keys * 512, value=value, values=values, count=keys)


def parse(server: str) -> tuple[str, int] | str:
    """Return (host, port) of "host:port" or "[ipv6]:port", the path of "unix:/path". Raise UserError for other text."""
    if server.startswith(_UNIX) and server[len(_UNIX) :].startswith("/"):
        return server[len(_UNIX) :]

    # From the right, because an IPv6 address has colons too.
    host, colon, port = server.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    number = int(port) if re.fullmatch(r"\d{1,5}", port, re.ASCII) else 0
    if not (host and colon and 0 < number < 65536) or "/" in host or " " in host:
        # At most 200 characters of it: a wrong path may name a binary file.
        raise UserError(f"memcached server {server!r:.200}: write host:port (an address, 10.0.0.5:11211) or unix:/path")

    return host, int(port)


def read_servers(path: str | Path) -> list[str]:
    """Return the servers in a file: one per line, # begins a comment. Raise UserError if it or a line is wrong."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the list of memcached servers cannot be read ({error})") from error

    servers = [line.partition("#")[0].strip() for line in text.splitlines()]
    servers = [line for line in servers if line]
    for line in servers:
        parse(line)

    if not servers:
        raise UserError(f"{path}: names no memcached server")
    return servers


def frame_secret(path: str | Path) -> bytes:
    """Return the secret behind the checksum of frames: all lines of memcached's secret file.

    The first line is sent to every server, so a process that pretends to be a server can learn it. A second line is
    never sent, and keeps the checksum safe from that too.
    """
    read_secret(path)  # for its checks
    return b"\n".join(line.strip() for line in Path(path).read_bytes().splitlines() if line.strip())


def read_secret(path: str | Path) -> bytes:
    """Return the first line "user:password" of memcached's secret file (-Y) as "user password", as clients send it."""
    try:
        line = Path(path).read_bytes().splitlines()[0].strip()
    except (OSError, IndexError) as error:
        raise UserError(f"{path}: the secret of the memcached servers cannot be read ({error})") from error

    user, colon, password = line.partition(b":")
    if not (user and colon and password) or any(byte <= 32 for byte in line):
        raise UserError(f"{path}: the first line must be user:password, without spaces")
    return user + b" " + password


def is_address(host: str) -> bool:
    """Return True if a host is a numeric address. A name needs a look-up, which has no time limit."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class NoRoom(Exception):  # noqa: N818 (an answer of the server, not a fault)
    """A server has no room for a value, or refuses its size."""


class Connection:
    """One connection. It is opened on first use, and again after every error.

    Args:
        server: "host:port" or "unix:/path".
        timeout: of a whole call [s].
        connect_timeout: the part of it for connecting [s].
        secret: result of `read_secret`; None = the server requires none.
    """

    def __init__(self, server: str, *, timeout: float, connect_timeout: float, secret: bytes | None = None) -> None:
        self.timeout, self.connect_timeout, self.secret = timeout, connect_timeout, secret
        self.stale = False  # any thread may set it: the next call opens a new connection
        self._address = parse(server)
        self.needs_look_up = isinstance(self._address, tuple) and not is_address(self._address[0])
        self._stream: _Stream | None = None

    def get_many(
        self, keys: Sequence[bytes], deadline: float | None = None, *, header_bytes: int = 16, largest: int = 0
    ) -> dict[bytes, tuple[bytes, bytes]]:
        """Return key -> (header, payload), not verified, of those keys that the server has.

        Args:
            keys: at most 250 bytes each.
            deadline: monotonic time [s]; None = `timeout` from now.
            header_bytes: where a value is split into header and payload.
            largest: bytes of the largest frame that came from the disk; bounds the answer.
        """
        asked, values = set(keys), {}
        if not asked:
            return values

        with self._call(Limits.of(len(keys), largest), deadline) as stream:
            stream.send(b"get %b\r\n" % b" ".join(keys))
            while (line := stream.line()) != b"END":
                # "VALUE <key> <flags> <bytes>", then the bytes and CR LF.
                words = line.split()
                if len(words) != 4 or words[0] != b"VALUE" or words[1] not in asked or not words[3].isdigit():
                    raise _unexpected(line)
                size = int(words[3])
                # Count the bytes before receiving them: a false size must not fill the memory.
                stream.announce(size)
                header = stream.take(min(size, header_bytes))
                values[words[1]] = header, stream.take(size - len(header))
                if stream.take(2) != b"\r\n":
                    raise ValueError("a value is longer than was announced")

        return values

    def set(self, key: bytes, value: bytes) -> None:
        """Store one value and wait for the answer. Raise NoRoom if the server refuses it."""
        with self._call(Limits()) as stream:
            stream.send(b"set %b 0 0 %d\r\n%b\r\n" % (key, len(value), value))
            line = stream.line()
            if line.startswith(b"SERVER_ERROR"):
                raise NoRoom(line.decode("latin-1"))
            if line != b"STORED":
                raise _unexpected(line)

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which keys the server has, without their values, in one round trip of meta gets."""
        answers = []
        with self._call(Limits.of(len(keys), 0)) as stream:
            # All requests in one write. The answers come in the same order.
            stream.send(b"".join(b"mg %b k\r\n" % key for key in keys))
            for key in keys:
                line = stream.line()
                answers.append(line == b"HD k" + key)  # the server repeats the key, so a shifted answer is noticed
                if not answers[-1] and line.split(b" ")[0] != b"EN":
                    raise _unexpected(line)
        return answers

    def version(self) -> bytes:
        """Return the server's version."""
        with self._call(Limits()) as stream:
            stream.send(b"version\r\n")
            line = stream.line()
            if not line.startswith(b"VERSION "):
                raise _unexpected(line)
            return line.partition(b" ")[2]

    def stats(self) -> dict[str, str]:
        """Return the server's own counters."""
        counters = {}
        with self._call(Limits()) as stream:
            stream.send(b"stats\r\n")
            while (line := stream.line()) != b"END":
                word, name, value = line.decode("latin-1").split(" ", 2)
                if word != "STAT":
                    raise _unexpected(line)
                counters[name] = value
        return counters

    def close(self) -> None:
        """Close the descriptor without sending anything, so that a forked child may close inherited connections."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    @contextlib.contextmanager
    def _call(self, limits: Limits, deadline: float | None = None) -> Iterator[_Stream]:
        """Yield the open stream for one request and answer. Close it after an error, which may leave half an answer."""
        deadline = time.monotonic() + self.timeout if deadline is None else deadline

        # Another thread found the server faulty after this connection was opened.
        if self.stale:
            self.stale = False
            self.close()

        try:
            if self._stream is None:
                self._stream = self._connected(deadline)
            self._stream.deadline, self._stream.left = deadline, limits
            yield self._stream
        except BaseException:
            self.close()
            raise

    def _connected(self, deadline: float) -> _Stream:
        """Connect to the first address of the server that answers, and send the secret."""
        error: OSError = ConnectionError("the server has no address")
        for family, address in self._addresses():
            stream = _Stream(family, deadline)
            try:
                # One address must not use up the time of the next one.
                stream.connect(address, min(deadline, time.monotonic() + self.connect_timeout))
                if self.secret is not None:
                    stream.send(b"set auth 0 0 %d\r\n%b\r\n" % (len(self.secret), self.secret))
                    if stream.line() != b"STORED":
                        raise ConnectionError("the secret was refused")

                return stream
            except OSError as failure:
                stream.close()
                error = failure
            # Not a failure of this address, so no other one is tried.
            except BaseException:
                stream.close()
                raise

        # No address worked: report the last failure.
        raise error

    def _addresses(self) -> list[tuple[int, Address]]:
        if isinstance(self._address, str):
            # A look-up has no time limit, so the fill thread makes the first one (`needs_look_up`).
            return [(socket.AF_UNIX, self._address)]
        infos = socket.getaddrinfo(*self._address, socket.AF_UNSPEC, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        return [(info[0], info[4]) for info in infos]


def _unexpected(line: bytes) -> ValueError:
    return ValueError(f"an answer that was not requested: {line[:80]!r}")


class _Stream:
    """The bytes of one connection. Every wait ends at the deadline, and received bytes are counted.

    Attributes:
        deadline: of the call, monotonic [s].
        left: what remains of the answer's limits.
    """

    def __init__(self, family: int, deadline: float) -> None:
        self.deadline, self.left = deadline, Limits()
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

        if family != socket.AF_UNIX:
            # A request is one small write. Nagle's algorithm would delay it.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # of the received bytes that have not been taken

        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._writable.register(self._socket, select.POLLOUT)

    def close(self) -> None:
        self._socket.close()

    def connect(self, address: Address, deadline: float) -> None:
        """Connect before `deadline`. Raise OSError or TimeoutError."""
        failed = self._socket.connect_ex(address)
        if failed == errno.EINPROGRESS:
            self._wait(self._writable, deadline)
            failed = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def send(self, data: bytes) -> None:
        """Send all bytes before the deadline."""
        sent, view = 0, memoryview(data)
        while sent < len(data):
            try:
                sent += self._socket.send(view[sent:])
            except BlockingIOError:
                self._wait(self._writable, self.deadline)

    def line(self) -> bytes:
        """Return the next line without its CR LF; a bare LF is part of it. Raise AnswerTooLarge."""
        line = b""
        while not line.endswith(b"\r\n"):
            if self._start == self._end and not self._fill():
                raise ConnectionError("the server closed the connection")

            newline = self._buffer.find(b"\n", self._start, self._end)
            stop = self._end if newline < 0 else newline + 1
            line += self._view[self._start : stop]
            self.left.lines -= stop - self._start

            if len(line) > self.left.line or self.left.lines < 0:
                raise AnswerTooLarge("the server sends lines without end")
            self._start = stop

        return line[:-2]

    def announce(self, size: int) -> None:
        """Count a value of `size` bytes that the server announces. Raise AnswerTooLarge."""
        self.left.values -= size
        self.left.count -= 1
        if size > self.left.value or self.left.values < 0 or self.left.count < 0:
            raise AnswerTooLarge(f"the server sends more than was requested (a value of {size} bytes)")

    def take(self, size: int) -> bytes:
        """Return exactly `size` bytes. Raise ConnectionError if the stream ends before."""
        if self._end - self._start >= size:  # already in the buffer: one copy
            start, self._start = self._start, self._start + size
            return bytes(self._view[start : self._start])

        parts = []
        while size:
            if self._start == self._end and not self._fill():
                raise ConnectionError("the server closed the connection in the middle of a value")
            step = min(size, self._end - self._start)
            parts.append(bytes(self._view[self._start : self._start + step]))
            self._start += step
            size -= step

        return b"".join(parts)

    def _fill(self) -> bool:
        """Receive available bytes into the empty buffer. Return False at the end of the stream."""
        while True:
            self._wait(self._readable, self.deadline)
            try:
                self._start, self._end = 0, self._socket.recv_into(self._buffer)
                return self._end > 0
            except BlockingIOError:  # a wake-up without data, which poll allows
                continue

    def _wait(self, poll: select.poll, deadline: float) -> None:
        # A busy machine may stop this process for longer than a call may take. An answer that has arrived by then must
        # not count against the server. Hence a last short wait, unless the call is already too late.
        left = deadline - time.monotonic()
        late = left < -LATE_SECONDS
        if late or not poll.poll(math.ceil(max(left, LAST_WAIT_SECONDS) * 1000)):
            raise TimeoutError("the server took too long")
