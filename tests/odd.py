"""Things that are not files, to put where a file should be: opening them may wait for ever."""

from __future__ import annotations

import os
import socket
from pathlib import Path

KINDS = ("fifo", "socket", "device", "folder")


def put_something_odd(path: Path, kind: str) -> Path:
    """Make a named pipe, a socket, a link to a device, or a folder; returns the path."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            here = os.getcwd()
            os.chdir(path.parent)  # the address of a socket has at most 107 bytes
            try:
                end.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/full")
    else:
        path.mkdir()
    return path
