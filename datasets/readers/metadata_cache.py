"""Keep the results of a scan for training: frames, height, width and rate of each file, without opening it.

A cache is one binary file, sorted by a hash of the absolute path and of everything else that decides the answer of
`Reader.probe`. Reader processes map it read-only, so it costs memory once per machine. An entry is valid only while
size and modification time of the file are those of the scan; for a folder of frames, those of the folder and of its
first frame. For everything else the reader is probed, so plans are the same with and without a cache.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from datasets.plan.metadata import VideoMetadata
from utils import files, renamed
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.readers.spec import Reader, ReaderSpec

#: Raise it when `probe` of a reader answers differently for the same file, so that older caches are refused.
PROBE_VERSION = 2
FILE = "metadata.bin"  # its name in the folder of a scan
_MAGIC = b"ZOEFACT1"
_ALIGN = 64  # bytes, a cache line: each column begins at a multiple
_COLUMNS = {
    "key": "<u8", "size": "<i8", "mtime": "<i8", "probe_file_size": "<i8", "probe_file_mtime": "<i8", "fps": "<f8",
    "frames": "<i4", "height": "<i4", "width": "<i4", "probe_file": "<i4", "grade": "<i4", "turns": "<i4",
    "decoder": "<i4", "missing": "<i4",
}  # fmt: skip
#: Reader -> kind of its records; None: the path decides.
_FAMILY = {"video": "video", "frames": "frames", "memcached": "frames", "dali": None}
#: Grades of a video whose frames are found by counting. Their index holds only metadata.
_COUNTING = ("counted", "scanned")
_FRAME_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".fsh")


class MetadataEntry(NamedTuple):
    """The cached metadata of one record.

    Attributes:
        stamp: of its file at the time of the scan.
        metadata: result of `probe`.
        grade, turns, decoder: of a video's index (video_index.Index: its value, rotation and codec); else "" and 0.
        missing: frames at the end of a video that do not decode and are not in `metadata`.
    """

    stamp: Stamp
    metadata: VideoMetadata
    grade: str = ""
    turns: int = 0
    decoder: str = ""
    missing: int = 0


class Stamp(NamedTuple):
    """Size and modification time of a file or folder. For a folder, also those of its first frame file.

    Attributes:
        size: bytes.
        mtime: nanoseconds.
        probe_file: name of the first frame file of a folder; "" for anything else.
        probe_file_size, probe_file_mtime: its size and time.
    """

    size: int
    mtime: int
    probe_file: str = ""
    probe_file_size: int = 0
    probe_file_mtime: int = 0


def stamp_of(path: str, probe_file: str = "") -> Stamp | None:
    """Return the stamp of a path now, or None if it does not exist."""
    try:
        status = os.stat(path)
        if not probe_file:
            return Stamp(status.st_size, status.st_mtime_ns)
        first = os.stat(os.path.join(path, probe_file))
    except (OSError, ValueError):
        return None
    return Stamp(status.st_size, status.st_mtime_ns, probe_file, first.st_size, first.st_mtime_ns)


def path_in(folder: Path) -> Path:
    """Return the file for the cache in the folder of a scan: by its old name if it is there, for configs name it."""
    old = [folder / name for name, new in renamed.FILES.items() if new == FILE and (folder / name).is_file()]
    return old[0] if old else folder / FILE


def family_of(path: str) -> str:
    """Return the kind of a path: "frames" for a folder, a pack or an image, "video" for any other file."""
    is_frames = os.path.splitext(path)[1].lower() in _FRAME_FILES or os.path.isdir(path)
    return "frames" if is_frames else "video"


def key_of(spec: ReaderSpec, family: str, path: str, start: int) -> int:
    """Return a hash of everything that decides the result of `probe`, except the file itself."""
    naming = f"frames {spec.template} {spec.frame_base} {spec.fps!r}"
    if family == "video":
        naming = f"video {spec.missing_share!r}"
    parts = (naming.encode(), str(start).encode(), os.fsencode(os.path.abspath(path)))
    return xxhash.xxh3_64_intdigest(b"\0".join(parts))


def _versions() -> dict[str, object]:
    return {"probe": PROBE_VERSION, "av": importlib.metadata.version("av")}


def write(path: str | os.PathLike[str], rows: Iterable[tuple[int, MetadataEntry]]) -> int:
    """Write a cache under a temporary name, then rename it. Of several rows with one `key_of` the last counts.

    Returns:
        Number of entries.
    """
    latest = dict(rows)

    # Columns hold numbers: a text is its index in the header's list of words.
    words = sorted({word for entry in latest.values() for word in (entry.stamp.probe_file, entry.grade, entry.decoder)})
    number = {word: i for i, word in enumerate(words)}

    columns: dict[str, list[float]] = {name: [] for name in _COLUMNS}
    for key in sorted(latest):
        stamp, metadata, grade, turns, decoder, missing = latest[key]
        row = {"key": key, "size": stamp.size, "mtime": stamp.mtime, "probe_file": number[stamp.probe_file]}
        row |= {"probe_file_size": stamp.probe_file_size, "probe_file_mtime": stamp.probe_file_mtime}
        row |= {"frames": metadata.frames, "height": metadata.height, "width": metadata.width, "fps": metadata.fps}
        row |= {"grade": number[grade], "turns": turns, "decoder": number[decoder], "missing": missing}
        for name, value in row.items():
            columns[name].append(value)

    text = json.dumps({"entries": len(latest), "words": words, **_versions()}).encode("ascii")
    with files.replacing(Path(path), sync=True) as temporary, open(temporary, "wb") as f:
        f.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for name, kind in _COLUMNS.items():
            f.write(bytes(-f.tell() % _ALIGN))
            f.write(np.array(columns[name], kind).data)
    return len(latest)


class MetadataCache:
    """An open cache.

    Args:
        path: `data.metadata`.

    Raises:
        UserError: no such file, not a cache, or a cache of a different version of Zoetrope or PyAV.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

        try:
            with open(self.path, "rb") as f:
                start = f.read(len(_MAGIC) + 8)
                length = int.from_bytes(start[len(_MAGIC) :], "little")
                if start[: len(_MAGIC)] == _MAGIC and length > os.path.getsize(self.path):
                    raise self._damaged()
                if start[: len(_MAGIC)] != _MAGIC:
                    raise UserError(f"data.metadata: {self.path} is not the metadata.bin of a scan")
                header = json.loads(f.read(length))
                at, size = f.tell(), os.fstat(f.fileno()).st_size
            versions = {name: header.get(name) for name in _versions()}
        except OSError as error:
            raise UserError(
                f"data.metadata: {self.path}: {error.strerror}; `python main.py scan LIST --root R` makes it"
            ) from error
        except (ValueError, AttributeError) as error:
            raise self._damaged() from error

        # Another PyAV may bring another FFmpeg, which may find other frames.
        if versions != _versions():
            raise UserError(
                f"data.metadata: {self.path} was made by probe version {versions['probe']} with PyAV {versions['av']}, "
                f"here are {PROBE_VERSION} and {_versions()['av']}: "
                "run `python main.py scan LISTS --root R --out FOLDER` again"
            )

        self._columns: dict[str, np.ndarray] = {}
        try:
            self._words, entries = [str(word) for word in header["words"]], int(header["entries"])
            for name, kind in _COLUMNS.items():
                at += -at % _ALIGN
                self._columns[name] = np.memmap(self.path, kind, "r", at, (entries,)) if entries else np.zeros(0, kind)
                at += entries * np.dtype(kind).itemsize
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise self._damaged() from error

        if at != size:
            raise self._damaged()

    def _damaged(self) -> UserError:
        return UserError(f"data.metadata: {self.path} is cut off or damaged, not a whole metadata.bin: scan again")

    def __len__(self) -> int:
        return len(self._columns["key"])

    def find(self, key: int, path: str) -> MetadataEntry | None:
        """Return the entry of a path, or None if there is none or the file has changed since the scan."""
        columns = self._columns
        row = int(np.searchsorted(columns["key"], np.uint64(key))) if len(self) else 0
        if row >= len(self) or int(columns["key"][row]) != key:
            return None

        here = {name: column[row].item() for name, column in columns.items()}
        probe_file, grade, decoder = (self._words[here[name]] for name in ("probe_file", "grade", "decoder"))
        stamp = Stamp(here["size"], here["mtime"], probe_file, here["probe_file_size"], here["probe_file_mtime"])
        if stamp_of(path, probe_file) != stamp:
            return None

        metadata = VideoMetadata(frames=here["frames"], height=here["height"], width=here["width"], fps=here["fps"])
        return MetadataEntry(stamp, metadata, grade, here["turns"], decoder, here["missing"])


class KnownMetadata:
    """A reader that looks up metadata in the cache first. It passes everything else to the reader inside.

    Args:
        reader: the reader inside.
        spec: how it was opened.
        records: its list.
        cache: an open cache.
    """

    def __init__(self, reader: Reader, spec: ReaderSpec, records: Records, cache: MetadataCache) -> None:
        self.reader, self.read, self.close = reader, reader.read, reader.close
        self.spec = spec
        self.records = records
        self.cache = cache
        #: Number of probes that the cache answered, and of all probes.
        self.hits = self.asked = 0
        self._missing: dict[int, int] = {}

    def probe(self, i: int) -> VideoMetadata:
        """See `Reader.probe`."""
        self.asked += 1
        path, declared = self.records.full_path(i), int(self.records.frames[i])
        family = _FAMILY.get(self.spec.kind) or family_of(path)
        entry = self.cache.find(key_of(self.spec, family, path, int(self.records.starts[i])), path)

        # The frames reader uses a count in the list after a check of the files. If it differs from the count of the
        # scan, the reader has to check.
        if entry is None or (family == "frames" and 0 < declared != entry.metadata.frames):
            return self.reader.probe(i)

        self.hits += 1
        self._missing[i] = entry.missing
        if entry.grade in _COUNTING and self.spec.kind == "video":
            self._spare_counting(i, entry)
        frames = self.records.length_of(i, entry.metadata.frames) if family == "video" else entry.metadata.frames
        return dataclasses.replace(entry.metadata, frames=frames)

    def missing(self, i: int) -> int:
        """See `VideoReader.missing`. It refers to the last `probe`."""
        if i in self._missing:
            return self._missing[i]
        missing = getattr(self.reader, "missing", None)
        return missing(i) if missing else 0

    def _spare_counting(self, i: int, entry: MetadataEntry) -> None:
        """Give the video reader an index for reading by counting, which saves a decode of the whole file."""
        from datasets.readers.video_index import Grade, Index

        # An index covers the whole file, an entry only the frames from the record's start on.
        metadata = dataclasses.replace(entry.metadata, frames=entry.metadata.frames + int(self.records.starts[i]))

        none = np.zeros(0, np.int64)
        packets = (none, none, none, none.astype(bool), none)
        index = Index(metadata, Grade(entry.grade), entry.turns, entry.decoder, *packets, entry.missing)
        self.reader.use_index(i, index)  # pyright: ignore[reportAttributeAccessIssue]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)
