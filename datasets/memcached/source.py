"""Read frames through memcached: from a server if it has them, else from the source below.

A key is the hash of a video's path, size and time of change, and the name of the frame. A new dump makes new keys, so a
value is never out of date. The time is that of the folder (or of the pack). If a tool overwrites frames in place
and keeps the folder, its time does not change. In that case set another `namespace`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xxhash

from datasets.memcached.client import ClientSettings, Counts, MemcachedPool
from datasets.memcached.wire import Seal, frame_secret, read_secret
from datasets.readers.frames import FramesReader
from utils.errors import MediaError

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.readers.frame_source import FrameSource
    from datasets.readers.spec import ReaderSpec

PLAIN_SEAL = Seal()
_AT_ONCE = 64  # frames that `warm` keeps in memory


def route_of(path: str, namespace: str = "") -> bytes | None:
    """Return the 16-byte digest of a folder, pack or file as it is now, or None if it is missing. One `stat`."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return None

    path = path if path.startswith("/") else os.path.abspath(path)
    text = f"{namespace}\0{path}\0{info.st_size}\0{info.st_mtime_ns}"
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def key_of(route: bytes, name: str, seal: Seal = PLAIN_SEAL) -> bytes:
    """Return the key of one frame: 35 bytes for any length of path."""
    text = seal.salt + route + name.encode("utf-8", "surrogateescape")
    return seal.key_prefix + xxhash.xxh3_128_hexdigest(text).encode()


class MemcachedSource:
    """A `FrameSource` in front of another one. It returns the same bytes, perhaps from a server.

    Args:
        inner: source of the frames that no server has.
        pool: the servers.
        namespace: part of every key.
    """

    def __init__(self, inner: FrameSource, pool: MemcachedPool, namespace: str = "") -> None:
        self.inner, self.pool, self.namespace = inner, pool, namespace
        # Servers have bytes only. All questions about files go to the source below.
        self.exists, self.is_folder = inner.exists, inner.is_folder
        self.names, self.describe = inner.names, inner.describe

    def read(self, path: str) -> bytes:
        """Return all bytes of one file (see `FrameSource.read`). Its route is that of the file, not of its folder."""
        route = route_of(path, self.namespace) if self.pool.usable() else None
        if route is None:
            self.pool.count_unserved(1)
            return self.inner.read(path)

        key = key_of(route, "", self.pool.seal)
        payloads = self.pool.get(route, [key])
        if key in payloads:
            return payloads[key]

        data = self.inner.read(path)
        self.pool.put_later(route, [(key, data)])
        return data

    def read_many(self, folder: str, names: Sequence[str]) -> list[bytes]:
        """Return all bytes of several files of one folder or pack, in the given order: one round trip."""
        route = route_of(folder, self.namespace) if self.pool.usable() else None
        if route is None:
            self.pool.count_unserved(len(names))
            return self.inner.read_many(folder, names)

        keys = [key_of(route, name, self.pool.seal) for name in names]
        payloads = self.pool.get(route, keys)

        if len(payloads) < len(keys):
            # `inner` answers in the order of the names, which pairs each frame with its key.
            missing = {key: name for key, name in zip(keys, names, strict=True) if key not in payloads}
            items = list(zip(missing, self.inner.read_many(folder, list(missing.values())), strict=True))
            self.pool.put_later(route, items)
            payloads.update(items)

        return [payloads[key] for key in keys]


@dataclasses.dataclass(frozen=True)
class Warmed:
    """The result of `MemcachedReader.warm`: frames requested, present before, stored now; bytes read from the disk."""

    frames: int
    there: int
    stored: int
    read_bytes: int


class MemcachedReader(FramesReader):
    """The reader `memcached`: the frames reader, with servers in front of the disk.

    Args:
        spec: `spec.memcached` holds the servers and times, as `servers.servers_of` gives them.
        records: the list.
        inner: source of the frames; None = folders and packs.
    """

    def __init__(self, spec: ReaderSpec, records: Records, inner: FrameSource | None = None) -> None:
        settings = dict(spec.memcached or {})
        self.pool = open_pool(settings)
        super().__init__(spec, records, inner)
        #: The source on disk. Set as `source`, it makes a reader probe and read without servers, to `warm` them.
        self.below, self._namespace = self.source, settings.get("namespace", "")
        self.source: FrameSource = MemcachedSource(self.below, self.pool, self._namespace)

    def warm(self, i: int, ordinals: Sequence[int] | None = None) -> Warmed:
        """Store frames of record i that no server has: all of them, or those with these ordinals.

        Raises:
            MediaError: the record or one of its frames cannot be read.
        """
        metadata, layout = self._metadata(i)
        requested = range(metadata.frames) if ordinals is None else ordinals

        path = self.records.full_path(i)
        route = route_of(path, self._namespace)
        if route is None:
            raise MediaError(self.records.path(i), "it is gone")

        # A record without a layout is one image: its only frame has no name.
        names = [""] if layout is None else [layout.template.format(layout.base + ordinal) for ordinal in requested]

        there = stored = size = 0
        # In parts, so that a long video does not fill the memory.
        for first in range(0, len(names), _AT_ONCE):
            some = names[first : first + _AT_ONCE]
            keys = [key_of(route, name, self.pool.seal) for name in some]
            present = self.pool.present(route, keys)
            missing = [(name, key) for name, key, has in zip(some, keys, present, strict=True) if not has]

            there += len(some) - len(missing)
            if missing:
                asked = [name for name, _ in missing]
                below = self.below
                data = [below.read(path)] if layout is None else below.read_many(path, asked)
                stored += self.pool.put(route, [(key, each) for (_, key), each in zip(missing, data, strict=True)])
                size += sum(map(len, data))

        return Warmed(len(names), there, stored, size)

    def counters(self) -> Counts | None:
        """Return the counters since the last call, or None if nothing happened."""
        counts, events = self.pool.take()
        return (counts, events) if counts or events else None

    def close(self) -> None:
        """Close the connections."""
        super().close()
        self.pool.close()


def open_pool(settings: dict[str, Any]) -> MemcachedPool:
    """Return the pool for plain values (servers, timeout_ms, connect_timeout_ms, secret_file); may raise UserError."""
    secret = settings.get("secret_file")
    return MemcachedPool(
        ClientSettings(
            tuple(settings.get("servers", ())),
            timeout=settings.get("timeout_ms", 250) / 1000,
            connect_timeout=settings.get("connect_timeout_ms", 100) / 1000,
            secret=read_secret(secret) if secret else None,
            frame_secret=frame_secret(secret) if secret else None,
        )
    )
