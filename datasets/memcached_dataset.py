"""Provide `McDataset`: images of a list `path label`, read through memcached. A plain torch data set.

    from datasets.memcached_dataset import McDataset
    images = McDataset("data/images", "data/images/train.txt", servers=["10.0.0.5:11211"])
    image, label = images[0]

It works without a server (everything comes from the disk), with a DataLoader of any start method, and after a server
has failed. It is for notebooks: experiments read the same frames with `data.reader: memcached`.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch

from datasets.lists.records import Records
from datasets.memcached.servers import servers_of
from datasets.memcached.source import MemcachedReader
from datasets.readers.frames import decode
from datasets.readers.spec import ReaderSpec
from utils.config.schema import Data, Memcached

Paths = str | os.PathLike[str]


class McRecords(torch.utils.data.Dataset, abc.ABC):
    """Base of both data sets: the list, and a reader that each process opens for itself.

    Args:
        root: folder that the paths of the list are relative to.
        source: list file.
        servers: "host:port" and "unix:/path", or a file with one per line; None = no server.
        transform: called with the pixels, uint8 RGB; None returns them as a torch tensor.
        encoded: return the bytes of the files instead, for a decoder elsewhere.
        template, frame_base: names of frame files, as in `ReaderSpec`; None = detected from the files.
        options: of `data.memcached`: timeout_ms, connect_timeout_ms, secret_file, namespace.
    """

    def __init__(
        self,
        root: Paths,
        source: Paths,
        servers: Sequence[str] | Paths | None = None,
        transform: Callable[[np.ndarray], object] | None = None,
        *,
        encoded: bool = False,
        template: str | None = None,
        frame_base: int | None = None,
        **options: object,
    ) -> None:
        self.records = Records.load(source, root, num_class=None)
        self.transform, self.encoded = transform, encoded

        # Without servers nothing connects, so the options need no check.
        settings: dict[str, object] = {"servers": [], **options}
        if servers is not None:
            named = os.fspath(servers) if isinstance(servers, (str, os.PathLike)) else tuple(servers)
            settings = servers_of(Memcached.model_validate({"servers": named, **options}))

        share = Data().missing_share
        self.spec = ReaderSpec(
            "memcached", missing_share=share, template=template, frame_base=frame_base, memcached=settings
        )
        self._reader: MemcachedReader | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[object, int]:
        """Return (pixels or bytes, label) of record i. MediaError names a file that cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        shown = self._read(i)
        if isinstance(shown, np.ndarray):
            shown = torch.from_numpy(shown) if self.transform is None else self.transform(shown)

        return shown, int(self.records.labels[i])

    def __getstate__(self) -> dict[str, object]:
        # A reader owns connections and open files, so each DataLoader worker opens its own.
        return {**self.__dict__, "_reader": None}

    @property
    def reader(self) -> MemcachedReader:
        """The reader of this process. Its pool detects a fork by itself."""
        if self._reader is None:
            self._reader = MemcachedReader(self.spec, self.records)
        return self._reader

    def counters(self) -> dict[str, float]:
        """Return hits, misses, corrupt values, time-outs, ... in this process since the last call."""
        counts, _ = self.reader.counters() or ({}, [])
        return counts

    def close(self) -> None:
        """Close the connections. The next access opens them again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @abc.abstractmethod
    def _read(self, i: int) -> np.ndarray | bytes | list[bytes]:
        """Return the pixels of record i, uint8 RGB, or its bytes with `encoded`."""


class McDataset(McRecords):
    """Images: item i is (image (H, W, 3), label). Arguments as in `McRecords`."""

    def _read(self, i: int) -> np.ndarray | bytes | list[bytes]:
        path = self.records.full_path(i)
        data = self.reader.source.read(path)
        return data if self.encoded else decode(data, path)
