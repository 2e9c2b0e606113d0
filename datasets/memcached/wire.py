"""One connection to one memcached server: five commands of its text protocol, with a deadline for the whole call.

- Every wait is bounded by what is left of the call's time, connecting and authentication included: a server that
  trickles bytes is late.
- A large buffer is filled, a line or a value is taken out of it, and a value is copied once. Small receives cost system
  calls, and have stalled on the loopback.
- An answer is bounded in bytes (`Limits`): what is longer than the request can ask for ends the connection.

Every value carries a header, `<2sBBI`: magic, version, kind, length of the payload. Then comes a checksum:

- version 1, without a secret: xxh3_64 of the payload seeded with xxh64 of the key, 8 bytes. It finds accidents. The
  seed makes a value that belongs to another key as wrong as one with a flipped bit.
- version 2, with a secret: keyed BLAKE2b of key and payload, 16 bytes. Who has no secret cannot make one.
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

from utils.faults import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HEADER = struct.Struct("<2sBBI")
MAGIC, IMAGE = b"FS", 1
PLAIN, KEYED = 1, 2  # versions of the header
BUFFER_BYTES = 1 << 17
LINE_BYTES = 2048  # of one line; a key has at most 250
LINES_BYTES = 1 << 18  # of all lines of one answer
VALUE_BYTES, VALUES_BYTES = 1 << 20, 8 << 20  # of one value, and of all of one answer, before any frame is known
ROOM = 4  # one value may have so many times the bytes of the largest frame that the disk gave
LATE_SECONDS, LAST_WAIT_SECONDS = 0.1, 0.01
Address = str | tuple[object, ...]  # as a socket takes it
_UNIX = "unix:"
_CR = ord("\r")


class CorruptValue(Exception):
    """A value that is not what was stored under its key."""


class AnswerTooLarge(Exception):
    """A server sends more than the request can ask for."""


class Seal:
    """Make and check the values that are stored: a header with a checksum, and the payload.

    Args:
        secret: bytes that only we know; the checksum then is a message authentication code. None = it finds accidents
            only.

    Attributes:
        header_bytes: length of the header with its checksum.
        key_prefix: beginning of every key, 3 bytes: values of another version are never looked up.
        salt: part of every key, so that readers with different secrets do not overwrite each other's values.
    """

    def __init__(self, secret: bytes | None = None) -> None:
        self.version = PLAIN if secret is None else KEYED
        self.header_bytes = HEADER.size + (8 if secret is None else 16)
        self.key_prefix = b"f%d:" % self.version
        self._key = b"" if secret is None else _derived(secret, b"zoetrope.frames")
        self.salt = b"" if secret is None else _derived(secret, b"zoetrope.names")[:8]

    def pack(self, key: bytes, payload: bytes) -> bytes:
        """Return header and payload, as stored."""
        return HEADER.pack(MAGIC, self.version, IMAGE, len(payload)) + self._checksum(key, payload) + payload

    def check(self, key: bytes, header: bytes, payload: bytes) -> None:
        """Raise CorruptValue unless these bytes were packed for this key, with this secret."""
        if len(header) != self.header_bytes:
            raise CorruptValue("shorter than a header")
        magic, version, kind, length = HEADER.unpack_from(header)
        if (magic, version, kind) != (MAGIC, self.version, IMAGE) or length != len(payload):
            raise CorruptValue("another header")
        if not hmac.compare_digest(header[HEADER.size :], self._checksum(key, payload)):
            raise CorruptValue("checksum")

    def _checksum(self, key: bytes, payload: bytes) -> bytes:
        if self.version == PLAIN:
            return xxhash.xxh3_64_intdigest(payload, xxhash.xxh64_intdigest(key)).to_bytes(8, "little")
        code = hashlib.blake2b(key=self._key, digest_size=16)
        code.update(b"%d:%b" % (len(key), key))  # the length: no other key and payload give the same bytes
        code.update(payload)
        return code.digest()


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(secret, person=purpose, digest_size=32).digest()


@dataclasses.dataclass
class Limits:
    """How many bytes one answer may have.

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
            keys: how many.
            largest: bytes of the largest frame that came from the disk so far; 0 = none did.
        """
        value = max(VALUE_BYTES, ROOM * largest + 64)  # 64: more than any header
        values = max(VALUES_BYTES, value, keys * 2 * largest)
        return cls(lines=LINES_BYTES + keys * 512, value=value, values=values, count=keys)


def parse(server: str) -> tuple[str, int] | str:
    """(host, port) of "host:port" or "[ipv6]:port", the path of "unix:/path"; UserError for anything else."""
    if server.startswith(_UNIX) and server[len(_UNIX) :].startswith("/"):
        return server[len(_UNIX) :]
    host, colon, port = server.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    number = int(port) if re.fullmatch(r"\d{1,5}", port, re.ASCII) else 0
    if not (host and colon and 0 < number < 65536) or "/" in host or " " in host:
        raise UserError(f"memcached server {server!r:.200}: write host:port (an address, 10.0.0.5:11211) or unix:/path")
    return host, int(port)


def read_servers(path: str | Path) -> list[str]:
    """Servers of a file: one per line, # begins a remark. UserError if it cannot be read or a line is wrong."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the list of memcached servers cannot be read ({error})") from error
    found = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = [line for line in found if line]
    for line in found:
        parse(line)
    if not found:
        raise UserError(f"{path}: names no memcached server")
    return found


def frame_secret(path: str | Path) -> bytes:
    """Return the secret behind the checksum of frames: all lines of memcached's secret file.

    The first line is sent to every server, so a process that pretends to be one can learn it. A second line, which is
    never sent, keeps the checksum safe from that too.
    """
    read_secret(path)
    return b"\n".join(line.strip() for line in Path(path).read_bytes().splitlines() if line.strip())


def read_secret(path: str | Path) -> bytes:
    """The first line "user:password" of memcached's own secret file (-Y), as the two words that a client sends."""
    try:
        line = Path(path).read_bytes().splitlines()[0].strip()
    except (OSError, IndexError) as error:
        raise UserError(f"{path}: the secret of the memcached servers cannot be read ({error})") from error
    user, colon, password = line.partition(b":")
    if not (user and colon and password) or any(byte <= 32 for byte in line):
        raise UserError(f"{path}: the first line must be user:password, without blanks")
    return user + b" " + password


def is_address(host: str) -> bool:
    """Whether a host is a number: a name takes a look-up, which has no time limit."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class NoRoom(Exception):  # noqa: N818 (what a server says, not a fault)
    """A server has no room for a value, or takes none of its size."""


class Connection:
    """One connection, opened when it is first used and again after every error.

    Args:
        server: "host:port" or "unix:/path".
        timeout: of a whole call [s].
        connect_timeout: of the part of it that is spent connecting [s].
        secret: what `read_secret` gave; None = the server asks for none.
    """

    def __init__(self, server: str, *, timeout: float, connect_timeout: float, secret: bytes | None = None) -> None:
        self.timeout, self.connect_timeout, self.secret = timeout, connect_timeout, secret
        self.stale = False  # set by any thread: the next call opens another connection
        self._address = parse(server)
        self.needs_look_up = isinstance(self._address, tuple) and not is_address(self._address[0])
        self._stream: _Stream | None = None

    def get_many(
        self, keys: Sequence[bytes], deadline: float | None = None, *, header_bytes: int = 16, largest: int = 0
    ) -> dict[bytes, tuple[bytes, bytes]]:
        """Return key -> (header, payload), unchecked, of those keys that the server has.

        Args:
            keys: at most 250 bytes each.
            deadline: monotonic time [s]; None = `timeout` from now.
            header_bytes: where a value is cut into header and payload.
            largest: bytes of the largest frame that came from the disk; bounds the answer.
        """
        asked, found = set(keys), {}
        if not asked:
            return found
        with self._call(Limits.of(len(keys), largest), deadline) as stream:
            stream.send(b"get %b\r\n" % b" ".join(keys))
            while (line := stream.line()) != b"END":
                words = line.split()
                if len(words) != 4 or words[0] != b"VALUE" or words[1] not in asked or not words[3].isdigit():
                    raise _unexpected(line)
                size = int(words[3])
                stream.announce(size)
                header = stream.take(min(size, header_bytes))
                found[words[1]] = header, stream.take(size - len(header))
                if stream.take(2) != b"\r\n":
                    raise ValueError("a value is longer than was announced")
        return found

    def set(self, key: bytes, value: bytes) -> None:
        """Store one value and wait for the answer; raise NoRoom if the server does not take it."""
        with self._call(Limits()) as stream:
            stream.send(b"set %b 0 0 %d\r\n%b\r\n" % (key, len(value), value))
            line = stream.line()
            if line.startswith(b"SERVER_ERROR"):
                raise NoRoom(line.decode("latin-1"))
            if line != b"STORED":
                raise _unexpected(line)

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Return which keys the server has, without their values, in one round trip of meta gets."""
        found = []
        with self._call(Limits.of(len(keys), 0)) as stream:
            stream.send(b"".join(b"mg %b k\r\n" % key for key in keys))
            for key in keys:
                line = stream.line()
                found.append(line == b"HD k" + key)
                if not found[-1] and line.split(b" ")[0] != b"EN":
                    raise _unexpected(line)
        return found

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
        found = {}
        with self._call(Limits()) as stream:
            stream.send(b"stats\r\n")
            while (line := stream.line()) != b"END":
                word, name, value = line.decode("latin-1").split(" ", 2)
                if word != "STAT":
                    raise _unexpected(line)
                found[name] = value
        return found

    def close(self) -> None:
        """Close the descriptor; nothing is sent, so that a forked child may close what it inherited."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    @contextlib.contextmanager
    def _call(self, limits: Limits, deadline: float | None = None) -> Iterator[_Stream]:
        """Give the open stream for one request and its answer; close it after an error, which leaves half an answer."""
        deadline = time.monotonic() + self.timeout if deadline is None else deadline
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
                stream.connect(address, min(deadline, time.monotonic() + self.connect_timeout))
                if self.secret is not None:
                    stream.send(b"set auth 0 0 %d\r\n%b\r\n" % (len(self.secret), self.secret))
                    if stream.line() != b"STORED":
                        raise ConnectionError("the secret was refused")
                return stream
            except OSError as failure:
                stream.close()
                error = failure
            except BaseException:
                stream.close()
                raise
        raise error

    def _addresses(self) -> list[tuple[int, Address]]:
        if isinstance(self._address, str):
            return [(socket.AF_UNIX, self._address)]
        found = socket.getaddrinfo(*self._address, socket.AF_UNSPEC, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        return [(info[0], info[4]) for info in found]


def _unexpected(line: bytes) -> ValueError:
    return ValueError(f"an answer that was not asked for: {line[:80]!r}")


class _Stream:
    """The bytes of one connection: every wait ends at the deadline, and what is received is counted.

    Attributes:
        deadline: of the call, monotonic [s].
        left: what the answer may still have.
    """

    def __init__(self, family: int, deadline: float) -> None:
        self.deadline, self.left = deadline, Limits()
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        if family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._writable.register(self._socket, select.POLLOUT)

    def close(self) -> None:
        self._socket.close()

    def connect(self, address: Address, deadline: float) -> None:
        """Connect before `deadline`."""
        failed = self._socket.connect_ex(address)
        if failed == errno.EINPROGRESS:
            self._wait(self._writable, deadline)
            failed = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def send(self, data: bytes) -> None:
        """Send everything before the deadline."""
        sent, view = 0, memoryview(data)
        while sent < len(data):
            try:
                sent += self._socket.send(view[sent:])
            except BlockingIOError:
                self._wait(self._writable, self.deadline)

    def line(self) -> bytes:
        """Return the next line without its CR LF; a bare LF is a part of it. Raise AnswerTooLarge."""
        line = b""
        while not line.endswith(b"\r\n"):
            if self._start == self._end and not self._fill():
                raise ConnectionError("the server closed the connection")
            found = self._buffer.find(b"\n", self._start, self._end)
            stop = self._end if found < 0 else found + 1
            line += self._view[self._start : stop]
            self.left.lines -= stop - self._start
            if len(line) > self.left.line or self.left.lines < 0:
                raise AnswerTooLarge("the server sends lines without end")
            self._start = stop
        return line[:-2]

    def announce(self, size: int) -> None:
        """Count a value of `size` bytes that the server announces; raise AnswerTooLarge."""
        self.left.values -= size
        self.left.count -= 1
        if size > self.left.value or self.left.values < 0 or self.left.count < 0:
            raise AnswerTooLarge(f"the server sends more than was asked for (a value of {size} bytes)")

    def take(self, size: int) -> bytes:
        """Return exactly `size` bytes; raise ConnectionError where the stream ends before."""
        if self._end - self._start >= size:
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
        """Receive what there is into the empty buffer; False at the end of the stream."""
        while True:
            self._wait(self._readable, self.deadline)
            try:
                self._start, self._end = 0, self._socket.recv_into(self._buffer)
                return self._end > 0
            except BlockingIOError:
                continue

    def _wait(self, poll: select.poll, deadline: float) -> None:
        # A machine with too much to do may stop this process for longer than a call may take; an answer that lies
        # ready then must not count against the server. Hence a last short wait, as often as the late limit allows.
        left = deadline - time.monotonic()
        late = left < -LATE_SECONDS
        if late or not poll.poll(math.ceil(max(left, LAST_WAIT_SECONDS) * 1000)):
            raise TimeoutError("the server took too long")
