"""`McDataset`: images of a list `path label`, read through memcached. A plain torch data set, for a notebook too.

    from datasets.memcached_dataset import McDataset
    images = McDataset("data/images", "data/images/train.txt", servers=["10.0.0.5:11211"])
    image, label = images[0]

It works without a server (everything comes from the disk), with a DataLoader of any start method, and after a server
has gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from datasets.lists.records import Records
from datasets.memcached.servers import servers_of
from datasets.memcached.source import MemcachedReader
from datasets.readers.frames import decode
from datasets.readers.spec import ReaderSpec
from utils.config.schema import Data, Memcached

Paths = str | os.PathLike[str]


class McRecords(torch.utils.data.Dataset):
    """What both data sets share: the list, and a reader that each process opens for itself.

    Args:
        root: folder in front of the paths of the list.
        source: list file.
        servers: "host:port" and "unix:/path", or a file with one per line; None = no server.
        template, frame_base: names of frame files, as in `ReaderSpec`; None = found by looking.
        options: of `data.memcached`: timeout_ms, connect_timeout_ms, secret_file, namespace.
    """

    def __init__(
        self,
        root: Paths,
        source: Paths,
        servers: Sequence[str] | Paths | None = None,
        *,
        template: str | None = None,
        frame_base: int | None = None,
        **options: Any,
    ) -> None:
        self.records = Records.load(source, root, num_class=None)
        if isinstance(servers, os.PathLike):
            servers = os.fspath(servers)
        plain: dict[str, Any] = {"servers": [], **options}
        if servers is not None:
            named = servers if isinstance(servers, str) else tuple(servers)
            plain = servers_of(Memcached.model_validate({"servers": named, **options}))
        self.spec = ReaderSpec(
            "memcached", missing_share=Data().missing_share, template=template, frame_base=frame_base, memcached=plain
        )
        self._reader: MemcachedReader | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    @property
    def reader(self) -> MemcachedReader:
        """This process's reader; its pool sees by itself that it was forked."""
        if self._reader is None:
            self._reader = MemcachedReader(self.spec, self.records)
        return self._reader

    def label(self, i: int) -> int:
        """Label of record i."""
        return int(self.records.labels[i])

    def counters(self) -> dict[str, float]:
        """Hits, misses, corrupt values, time-outs, ... in this process since the last call."""
        return self.reader.counters().get("counts", {})

    def close(self) -> None:
        """Close the connections; the next access opens them again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class McDataset(McRecords):
    """Images: item i is (image, label).

    Args:
        root, source, servers, options: see `McRecords`.
        transform: called with the image, (H, W, 3) uint8 RGB; None gives it as a torch tensor.
        encoded: give the bytes of the file instead, for a decoder elsewhere.
    """

    def __init__(
        self,
        root: Paths,
        source: Paths,
        servers: Sequence[str] | Paths | None = None,
        transform: Callable[[np.ndarray], Any] | None = None,
        *,
        encoded: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(root, source, servers, **options)
        self.transform, self.encoded = transform, encoded

    def __getitem__(self, i: int) -> tuple[Any, int]:
        """(image, label) of record i; MediaError names a file that cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        path = self.records.full_path(i)
        data = self.reader.source.read(path)
        if self.encoded:
            return data, self.label(i)
        image = decode(data, path)
        return (torch.from_numpy(image) if self.transform is None else self.transform(image)), self.label(i)
