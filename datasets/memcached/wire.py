"""One connection to one memcached server: five commands of its text protocol, within the deadline of the whole call.

- Every wait is bounded by the time that is left of the call, connecting and authentication included: a server that
  trickles bytes is late too.
- A large buffer is filled at once, since small receives cost system calls and have stalled on the loopback. A line or a
  value is taken out of it, and a value is copied once.
- An answer is bounded in bytes (`Limits`): what is longer than the request can ask for ends the connection.

Every value carries a header, `<2sBBI`: magic, version, kind, length of the payload. Then comes a checksum:

- version 1, without a secret: xxh3_64 of the payload seeded with xxh64 of the key, 8 bytes. It finds accidents. The
  seed makes a value that belongs to another key as wrong as one with a flipped bit.
- version 2, with a secret: keyed BLAKE2b of key and payload, 16 bytes. Who has no secret cannot make one.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING, TypeVar

import xxhash

from utils.faults import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HEADER = struct.Struct("<2sBBI")
MAGIC, IMAGE = b"FS", 1
PLAIN, KEYED = 1, 2  # versions of the header
BUFFER_BYTES = 1 << 17
LINE_BYTES = 2048  # of one line; a key has at most 250
LINES_BYTES = 1 << 18  # of all lines of one answer
VALUE_BYTES, VALUES_BYTES = 1 << 20, 8 << 20  # of one value, and of all of one answer, before any frame is known
ROOM = 4  # one value may have so many times the bytes of the largest frame that the disk gave
LATE_SECONDS, LAST_WAIT_SECONDS = 0.1, 0.01
_UNIX = "unix:"
_T = TypeVar("_T")


class CorruptValue(Exception):
    """A value that is not what was stored under its key."""


class AnswerTooLarge(Exception):
    """A server sends more than the request can ask for."""


class NoRoom(Exception):
    """A server answers SERVER_ERROR: it has no room for a value, or takes none of that size."""


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

        def ask(stream: _Stream) -> dict[bytes, tuple[bytes, bytes]]:
            wanted, found = set(keys), {}
            stream.send(b"get %b\r\n" % b" ".join(keys))
            while (line := stream.answer()) != b"END":
                words = line.split()
                if len(words) != 4 or words[0] != b"VALUE" or words[1] not in wanted or not words[3].isdigit():
                    raise ValueError(f"an answer that was not asked for: {line[:80]!r}")
                found[words[1]] = stream.value(int(words[3]), header_bytes)
            return found

        return self._call(ask, deadline, Limits.of(len(keys), largest))

    def set(self, key: bytes, value: bytes) -> None:
        """Store one value and wait for the answer; NoRoom if the server has no room for it."""
        self._one_line(b"set %b 0 0 %d\r\n%b\r\n" % (key, len(value), value), b"STORED")

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys the server has, without their values: one line of answer for each, in one round trip."""

        def ask(stream: _Stream) -> list[bool]:
            stream.send(b"".join(b"mg %b k\r\n" % key for key in keys))
            return [stream.answer() == b"HD k" + key for key in keys]

        return self._call(ask, limits=Limits.of(len(keys), 0))

    def version(self) -> bytes:
        """The server's version."""
        return self._one_line(b"version\r\n", b"VERSION")

    def stats(self) -> dict[str, str]:
        """The server's own counters."""

        def ask(stream: _Stream) -> dict[str, str]:
            found = {}
            stream.send(b"stats\r\n")
            while (line := stream.answer()) != b"END":
                word, name, value = (*line.decode("latin-1").split(" ", 2), "", "")[:3]
                if word != "STAT":
                    raise ValueError(f"an answer that was not asked for: {line[:80]!r}")
                found[name] = value
            return found

        return self._call(ask)

    def close(self) -> None:
        """Close the descriptor; nothing is sent, so that a forked child may close what it inherited."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _one_line(self, command: bytes, word: bytes) -> bytes:
        """Send a command; return what follows `word` in its answer of one line."""

        def ask(stream: _Stream) -> bytes:
            stream.send(command)
            first, _, rest = stream.answer().partition(b" ")
            if first != word:
                raise ValueError(f"{first[:80]!r} instead of {word!r}")
            return rest

        return self._call(ask)

    def _call(self, ask: Callable[[_Stream], _T], deadline: float | None = None, limits: Limits | None = None) -> _T:
        deadline = time.monotonic() + self.timeout if deadline is None else deadline
        if self.stale:
            self.stale = False
            self.close()
        try:
            if self._stream is None:
                self._stream = _Stream(self._address)
                self._stream.begin(deadline, limits or Limits())
                self._stream.connect(self.connect_timeout, self.secret)
            else:
                self._stream.begin(deadline, limits or Limits())
            return ask(self._stream)
        except BaseException:  # a KeyboardInterrupt in mid-call must not leave half an answer
            self.close()
            raise


class _Stream:
    """A socket that keeps the deadline and the limits of a call."""

    def __init__(self, address: tuple[str, int] | str) -> None:
        if isinstance(address, str):
            family, self._address = socket.AF_UNIX, address
        else:
            family, _, _, _, self._address = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        if family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._deadline, self._left = 0.0, Limits()
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._writable.register(self._socket, select.POLLOUT)

    def begin(self, deadline: float, limits: Limits) -> None:
        """Begin a call."""
        self._deadline, self._left = deadline, limits

    def close(self) -> None:
        self._socket.close()

    def connect(self, timeout: float, secret: bytes | None) -> None:
        """Connect within `timeout` and the deadline, and send the secret."""
        wait_until = min(self._deadline, time.monotonic() + timeout)
        failed = self._socket.connect_ex(self._address)
        if failed == errno.EINPROGRESS:
            self._wait(self._writable, wait_until)
            failed = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            raise OSError(failed, os.strerror(failed))
        if secret is not None:
            self.send(b"set auth 0 0 %d\r\n%b\r\n" % (len(secret), secret))
            if self.line() != b"STORED":
                raise ConnectionError("the secret was refused")

    def send(self, data: bytes) -> None:
        """Send everything before the deadline."""
        sent, view = 0, memoryview(data)
        while sent < len(data):
            try:
                sent += self._socket.send(view[sent:])
            except BlockingIOError:
                self._wait(self._writable, self._deadline)

    def answer(self) -> bytes:
        """Return one line of an answer; raise what it refuses."""
        line = self.line()
        if line.startswith(b"SERVER_ERROR"):
            raise NoRoom(line[:80].decode("latin-1"))
        if line.startswith((b"ERROR", b"CLIENT_ERROR")):
            raise ValueError(f"the server refuses the request: {line[:80]!r}")
        return line

    def line(self) -> bytes:
        """Return one line without the CR LF at its end; a bare LF is a part of it."""
        line = bytearray()
        while not line.endswith(b"\r\n"):
            self._fill_if_empty()
            end = self._buffer.find(b"\n", self._start, self._end)
            stop = self._end if end < 0 else end + 1
            self._left.lines -= stop - self._start
            if len(line) + stop - self._start > self._left.line or self._left.lines < 0:
                raise AnswerTooLarge("the server sends lines without end")
            line += self._view[self._start : stop]
            self._start = stop
        return bytes(line[:-2])

    def value(self, size: int, header_bytes: int) -> tuple[bytes, bytes]:
        """Return (header, payload) of a value that the server has announced."""
        self._left.values -= size
        self._left.count -= 1
        if size > self._left.value or self._left.values < 0 or self._left.count < 0:
            raise AnswerTooLarge(f"the server sends more than was asked for (a value of {size} bytes)")
        header = self._take(min(size, header_bytes))
        payload = self._take(size - len(header))
        if self._take(2) != b"\r\n":
            raise ValueError("a value is longer than was announced")
        return header, payload

    def _take(self, size: int) -> bytes:
        """Return exactly `size` bytes."""
        if self._end - self._start >= size:
            start, self._start = self._start, self._start + size
            return bytes(self._view[start : self._start])
        parts = []
        while size:
            self._fill_if_empty()
            step = min(size, self._end - self._start)
            parts.append(bytes(self._view[self._start : self._start + step]))
            self._start += step
            size -= step
        return b"".join(parts)

    def _fill_if_empty(self) -> None:
        """Receive what there is into an empty buffer; ConnectionError at the end of the stream."""
        while self._start == self._end:
            self._wait(self._readable, self._deadline)
            try:
                self._start, self._end = 0, self._socket.recv_into(self._buffer)
            except BlockingIOError:
                continue
            if not self._end:
                raise ConnectionError("the server closed the connection in the middle of an answer")

    def _wait(self, poll: select.poll, deadline: float) -> None:
        # A machine with too much to do may stop this process for longer than a call may take; an answer that lies
        # ready then must not count against the server. Hence a last short wait, as often as the late limit allows.
        left = deadline - time.monotonic()
        late = left < -LATE_SECONDS
        if late or not poll.poll(math.ceil(max(left, LAST_WAIT_SECONDS) * 1000)):
            raise TimeoutError("the server took too long")
