"""Find the memcached servers of a configuration: named ones, those of a file, or those that the launcher started.

`launch/memcached.py` starts one server per node and writes their addresses to a folder, which ranks find in
$ZOETROPE_MEMCACHED: one file NAME.server per server, and `secret` if the servers require one. All ranks of a job need
the same list, because it decides which server has which video. So they wait until there are as many servers as
$ZOETROPE_MEMCACHED_NODES.
"""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

from datasets.memcached.wire import parse, read_servers

FOLDER, NODES = "ZOETROPE_MEMCACHED", "ZOETROPE_MEMCACHED_NODES"
WAIT_SECONDS = 30.0


def servers_of(section: Any) -> dict[str, Any]:
    """Return plain values for `ReaderSpec.memcached` from the section `data.memcached` of a configuration.

    Without servers (auto, and not started by the launcher) the list is empty. Then everything comes from the disk, and
    the log has a line about it.

    Raises:
        UserError: the file of servers cannot be read, or the name of a server is wrong.
    """
    spec: dict[str, Any] = {name: getattr(section, name) for name in ("timeout_ms", "connect_timeout_ms", "namespace")}

    secret = section.secret_file
    if section.servers == "auto":
        folder = os.environ.get(FOLDER)
        servers = []
        if folder:
            _wait_for(folder, int(os.environ.get(NODES) or 1))
            servers = started(Path(folder), 0)
        secret_file = Path(folder or "") / "secret"
        secret = secret or (str(secret_file) if folder and secret_file.is_file() else None)
    else:
        servers = read_servers(section.servers) if isinstance(section.servers, str) else list(section.servers)

    for server in servers:
        parse(server)
    # Absolute: reader processes may run in another folder.
    return spec | {"servers": servers, "secret_file": secret and os.path.abspath(secret)}


@functools.cache
def _wait_for(folder: str, nodes: int) -> None:
    """Wait for all servers, once per process: a second wait for a node that started none would not help."""
    started(Path(folder), nodes)


def started(folder: Path, nodes: int, seconds: float = WAIT_SECONDS) -> list[str]:
    """Return the servers that the launcher started, sorted. Wait until all have reported, or the time is over."""
    end = time.monotonic() + seconds
    while True:
        addresses = sorted(file.read_text("utf-8").strip() for file in folder.glob("*.server"))
        if len(addresses) >= nodes or time.monotonic() > end:
            return addresses
        time.sleep(0.1)
