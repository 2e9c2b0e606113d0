"""A server on a unix socket that answers every request of the memcached protocol as its owner wants."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

#: Called with the first line of a request; gives the pieces of the answer, perhaps without end.
Script = Callable[[bytes], Iterable[bytes]]


class HostileServer:
    """One thread that serves one connection after another; each is closed after its answer, a login excepted.

    Args:
        path: of the socket.
        script: the answers.

    Attributes:
        heard: everything that clients have sent.
        sent: bytes that clients have taken.
    """

    def __init__(self, path: Path, script: Script) -> None:
        self.name = f"unix:{path}"
        self.script = script
        self.heard = bytearray()
        self.sent = 0
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(16)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(2.0)
        request = b""
        while True:
            while b"\r\n" not in request:
                more = connection.recv(1 << 16)
                if not more:
                    return
                request += more
                self.heard += more
            line, _, request = request.partition(b"\r\n")
            for piece in self.script(line):
                connection.sendall(piece)
                self.sent += len(piece)
            if not line.startswith(b"set auth "):
                return
            while request.count(b"\r\n") < 1:  # the words of the secret
                request += connection.recv(1 << 16)
                self.heard += request
            request = request.partition(b"\r\n")[2]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5.0)
