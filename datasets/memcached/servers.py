"""Which memcached servers a configuration means: named ones, those of a file, or those that the launcher started.

`launch/memcached.py` starts one server per node and says where in a folder, which ranks find in $ZOETROPE_MEMCACHED:
one file NAME.server for each, and `secret` where the servers ask for one. All ranks of a job must have the same list,
for it decides which server has which video; so they wait until as many are there as $ZOETROPE_MEMCACHED_NODES says.
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


def servers_of(wanted: Any) -> dict[str, Any]:
    """Plain values for `ReaderSpec.memcached` from the section `data.memcached` of a configuration.

    Without servers (auto, and not started by the launcher) the list is empty: everything comes from the disk, and the
    log says so.

    Raises:
        UserError: the file of servers cannot be read, or a server's name is wrong.
    """
    plain: dict[str, Any] = {name: getattr(wanted, name) for name in ("timeout_ms", "connect_timeout_ms", "namespace")}
    secret = wanted.secret_file
    if wanted.servers == "auto":
        folder = os.environ.get(FOLDER)
        servers = []
        if folder:
            _wait_for(folder, int(os.environ.get(NODES) or 1))
            servers = started(Path(folder), 0)
        own = Path(folder or "") / "secret"
        secret = secret or (str(own) if folder and own.is_file() else None)
    else:
        servers = read_servers(wanted.servers) if isinstance(wanted.servers, str) else list(wanted.servers)
    for server in servers:
        parse(server)
    return plain | {"servers": servers, "secret_file": secret and os.path.abspath(secret)}


@functools.cache
def _wait_for(folder: str, nodes: int) -> None:
    """Once per process: where a node gave no server, the run has waited enough."""
    started(Path(folder), nodes)


def started(folder: Path, nodes: int, seconds: float = WAIT_SECONDS) -> list[str]:
    """The servers that the launcher started, sorted; waits until all have said where they are, or the time is over."""
    end = time.monotonic() + seconds
    while True:
        found = sorted(file.read_text("utf-8").strip() for file in folder.glob("*.server"))
        if len(found) >= nodes or time.monotonic() > end:
            return found
        time.sleep(0.1)
