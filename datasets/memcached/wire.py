"""One connection to one memcached server: pymemcache speaks, the socket below it keeps the deadline of the whole call.

What pymemcache lacks for us is added from outside, by its `socket_module` argument and the method that it leaves open
for other ways of taking values (`_extract_value`):

- Its timeout bounds each receive, so a server that trickles bytes is never late. Here every wait is bounded by what is
  left of the call's time, connecting and authentication included.
- It receives 4096 bytes at a time. Small receives cost system calls, and have stalled on the loopback; here a large
  buffer is filled, a line or a value is taken out of it, and a value is copied once.

- It reads a line until its end, however long that is, and takes values of any size and number. Here an answer is
  bounded in bytes (`Limits`): what is longer than the request can ask for ends the connection.

Every value carries a header, `<2sBBI`: magic, version, kind, length of the payload. Then comes a checksum:

- version 1, without a secret: xxh3_64 of the payload seeded with xxh64 of the key, 8 bytes. It finds accidents. The
  seed makes a value that belongs to another key as wrong as one with a flipped bit.
- version 2, with a secret: keyed BLAKE2b of key and payload, 16 bytes. Who has no secret cannot make one.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
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
from typing import TYPE_CHECKING, Any

import xxhash

from utils.faults import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        self.deadline = 0.0
        self.left = Limits()  # of the call that is being made
        self.stale = False  # set by any thread: the next call opens another connection
        address = parse(server)
        self.needs_look_up = isinstance(address, tuple) and not is_address(address[0])
        self._header_bytes = 0
        self._client = _client_class()(
            address, connect_timeout=1, timeout=1, no_delay=True, default_noreply=False, socket_module=_Module(self)
        )

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
        self._header_bytes = header_bytes
        return self._call(deadline, self._client.get_many, keys, limits=Limits.of(len(keys), largest))

    def set(self, key: bytes, value: bytes) -> None:
        """Store one value and wait for the answer; MemcacheServerError if the server has no room for it."""
        self._call(None, self._client.set, key, value)

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys the server has, without their values."""
        return self._call(None, self._client.present, keys, limits=Limits.of(len(keys), 0))

    def version(self) -> bytes:
        """The server's version."""
        return self._call(None, self._client.version)

    def stats(self) -> dict[str, str]:
        """The server's own counters."""
        found = self._call(None, self._client.stats)
        return {_text(name): _text(value) for name, value in found.items()}

    def close(self) -> None:
        """Close the descriptor; nothing is sent, so that a forked child may close what it inherited."""
        self._client.close()

    def take_line(self, size: int, line: int) -> None:
        """Count bytes of a line that has `line` bytes so far; AnswerTooLarge if it has too many."""
        self.left.lines -= size
        if line > self.left.line or self.left.lines < 0:
            raise AnswerTooLarge("the server sends lines without end")

    def take_value(self, size: int) -> int:
        """Count a value that the server announces and return the length of its header; raise AnswerTooLarge."""
        self.left.values -= size
        self.left.count -= 1
        if size > self.left.value or self.left.values < 0 or self.left.count < 0:
            raise AnswerTooLarge(f"the server sends more than was asked for (a value of {size} bytes)")
        return min(size, self._header_bytes)

    def _call(self, deadline: float | None, function: Any, *args: Any, limits: Limits | None = None) -> Any:
        self.left = limits or Limits()
        self.deadline = time.monotonic() + self.timeout if deadline is None else deadline
        if self.stale:
            self.stale = False
            self._client.close()
        try:
            return function(*args)
        except BaseException:
            # pymemcache does this for an Exception; a KeyboardInterrupt in mid-call must not leave half an answer.
            self._client.close()
            raise


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


class _Module:
    """What a Client takes for the module `socket`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def socket(self, family: int, kind: int, proto: int = 0) -> _Socket:
        """A socket that keeps the deadline."""
        return _Socket(socket.socket(family, kind | socket.SOCK_CLOEXEC, proto), self._connection)


class _Socket:
    """The methods of a socket that pymemcache calls, and `take`."""

    def __init__(self, inner: socket.socket, connection: Connection) -> None:
        self._inner, self.connection = inner, connection
        inner.setblocking(False)
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._line = self._last = 0  # bytes of the line that is being received, and the last of them
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(inner, select.POLLIN)
        self._writable.register(inner, select.POLLOUT)

    def setsockopt(self, *args: Any) -> None:
        self._inner.setsockopt(*args)

    def settimeout(self, _: float | None) -> None:
        """Nothing: the deadline counts."""

    def close(self) -> None:
        self._inner.close()

    def connect(self, address: Any) -> None:
        """Connect, and say the secret, within the connect timeout and the deadline."""
        wait_until = min(self.connection.deadline, time.monotonic() + self.connection.connect_timeout)
        failed = self._inner.connect_ex(address)
        if failed == errno.EINPROGRESS:
            self._wait(self._writable, wait_until)
            failed = self._inner.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            raise OSError(failed, os.strerror(failed))
        if self.connection.secret is not None:
            words = self.connection.secret
            self.sendall(b"set auth 0 0 %d\r\n%b\r\n" % (len(words), words))
            answer = b""
            while not answer.endswith(b"\n"):
                more = self.recv(256)  # which bounds the length of a line
                if not more:
                    raise ConnectionError("closed instead of taking the secret")
                answer += more
            if answer != b"STORED\r\n":
                raise ConnectionError("the secret was refused")

    def sendall(self, data: bytes) -> None:
        """Send everything before the deadline."""
        sent, view = 0, memoryview(data)
        while sent < len(data):
            try:
                sent += self._inner.send(view[sent:])
            except BlockingIOError:
                self._wait(self._writable, self.connection.deadline)

    def recv(self, size: int) -> bytes:
        """At most one line, at most `size` bytes; nothing at the end of the stream."""
        if self._start == self._end and not self._fill():
            return b""
        stop = min(self._start + size, self._end)
        line_end = self._buffer.find(b"\n", self._start, stop)
        stop = stop if line_end < 0 else line_end + 1
        self._line += stop - self._start
        self.connection.take_line(stop - self._start, self._line)
        # A line ends with CR LF, which may come in two parts; a bare LF is a part of it.
        before = self._buffer[stop - 2] if stop - 2 >= self._start else self._last
        self._last = self._buffer[stop - 1]
        if line_end >= 0 and before == _CR:
            self._line = 0
        start, self._start = self._start, stop
        return bytes(self._view[start:stop])

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes; ConnectionError where the stream ends before."""
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
            self._wait(self._readable, self.connection.deadline)
            try:
                self._start, self._end = 0, self._inner.recv_into(self._buffer)
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


@functools.cache
def _client_class() -> type[Any]:
    try:
        from pymemcache.client.base import Client
    except ImportError as error:
        raise UserError("reader memcached needs the package pymemcache: pip install 'pymemcache>=4'") from error

    class FrameClient(Client):
        """A Client that takes values from `_Socket` without further copies, header and payload apart."""

        def _extract_value(
            self, expect_cas: bool, line: bytes, buf: bytes, remapped_keys: dict, prefixed_keys: list
        ) -> tuple[Any, Any, bytes]:
            words = line.split()
            key = remapped_keys.get(words[1]) if len(words) == 4 and words[3].isdigit() else None
            if buf or expect_cas or key is None:
                raise ValueError(f"an answer that was not asked for: {line[:80]!r}")
            size = int(words[3])
            sock: Any = self.sock
            header = sock.take(sock.connection.take_value(size))
            payload = sock.take(size - len(header))
            if sock.take(2) != b"\r\n":
                raise ValueError("a value is longer than was announced")
            return key, (header, payload), b""

        def present(self, keys: Sequence[bytes]) -> list[bool]:
            """One round trip of meta gets that ask for the key only, one line of answer for each."""
            lines = self._misc_cmd([b"mg %b k\r\n" % key for key in keys], b"mg", False)
            return [line == b"HD k" + key for line, key in zip(lines, keys, strict=True)]

    return FrameClient
