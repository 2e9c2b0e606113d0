"""Keep the results of a scan for training: frames, height, width and rate of each file, without opening it.

A cache is one binary file, sorted by a hash of the absolute path and of everything else that decides the answer of
`Reader.probe`. Reader processes map it read-only, so it costs memory once per machine. An entry is valid only while
size and modification time of the file are those of the scan; for a folder of frames, those of the folder and of its
first frame. For everything else the reader is probed, so plans are the same with and without a cache.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from datasets.plan.facts import Facts
from utils import files
from utils.faults import UserError

if TYPE_CHECKING:
    from datasets.lists.records import Records
    from datasets.readers.spec import Reader, ReaderSpec

#: Raise it when `probe` of a reader answers differently for the same file, so that older caches are refused.
PROBE_VERSION = 2
_MAGIC = b"ZOEFACT1"
_ALIGN = 64  # bytes, a cache line: each column begins at a multiple
_COLUMNS = {
    "key": "<u8", "size": "<i8", "mtime": "<i8", "witness_size": "<i8", "witness_mtime": "<i8", "fps": "<f8",
    "frames": "<i4", "height": "<i4", "width": "<i4", "witness": "<i4", "grade": "<i4", "turns": "<i4",
    "decoder": "<i4", "missing": "<i4",
}  # fmt: skip
#: Reader -> kind of its records; None: the path decides.
_FAMILY = {"video": "video", "frames": "frames", "memcached": "frames", "dali": None}
#: Grades of a video whose frames are found by counting. Their index holds only facts.
_COUNTING = ("counted", "scanned")
_FRAME_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".fsh")


class Entry(NamedTuple):
    """The cached facts of one record.

    Attributes:
        stamp: of its file at the time of the scan.
        facts: result of `probe`.
        grade, turns, decoder: of a video's index (video_index.Index: its value, rotation and codec); else "" and 0.
        missing: frames at the end of a video that do not decode and are not in `facts`.
    """

    stamp: Stamp
    facts: Facts
    grade: str = ""
    turns: int = 0
    decoder: str = ""
    missing: int = 0


class Stamp(NamedTuple):
    """Size and modification time of a file or folder. For a folder, also those of its first frame file.

    Attributes:
        size: bytes.
        mtime: nanoseconds.
        witness: name of the first frame file of a folder; "" for anything else.
        witness_size, witness_mtime: its size and time.
    """

    size: int
    mtime: int
    witness: str = ""
    witness_size: int = 0
    witness_mtime: int = 0


def stamp_of(path: str, witness: str = "") -> Stamp | None:
    """Return the stamp of a path now, or None if it does not exist."""
    try:
        status = os.stat(path)
        if not witness:
            return Stamp(status.st_size, status.st_mtime_ns)
        first = os.stat(os.path.join(path, witness))
    except (OSError, ValueError):
        return None
    return Stamp(status.st_size, status.st_mtime_ns, witness, first.st_size, first.st_mtime_ns)


def family_of(path: str) -> str:
    """Return the kind of a path: "frames" for a folder, a shard or an image, "video" for any other file."""
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
    return {"probe": PROBE_VERSION, "av": metadata.version("av")}


def write(path: str | os.PathLike[str], rows: Iterable[tuple[int, Entry]]) -> int:
    """Write a cache under a temporary name, then rename it. Of several rows with one `key_of` the last counts.

    Returns:
        Number of entries.
    """
    latest = dict(rows)

    # Columns hold numbers: a text is its index in the header's list of words.
    words = sorted({word for entry in latest.values() for word in (entry.stamp.witness, entry.grade, entry.decoder)})
    number = {word: i for i, word in enumerate(words)}

    columns: dict[str, list[float]] = {name: [] for name in _COLUMNS}
    for key in sorted(latest):
        stamp, facts, grade, turns, decoder, missing = latest[key]
        row = {"key": key, "size": stamp.size, "mtime": stamp.mtime, "witness": number[stamp.witness]}
        row |= {"witness_size": stamp.witness_size, "witness_mtime": stamp.witness_mtime}
        row |= {"frames": facts.frames, "height": facts.height, "width": facts.width, "fps": facts.fps}
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


class FactsCache:
    """An open cache.

    Args:
        path: `data.facts`.

    Raises:
        UserError: no such file, not a cache, or a cache of another version of Zoetrope or PyAV.
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
                    raise UserError(f"data.facts: {self.path} is not the facts.bin of a scan")
                header = json.loads(f.read(length))
                at, size = f.tell(), os.fstat(f.fileno()).st_size
            versions = {name: header.get(name) for name in _versions()}
        except OSError as error:
            raise UserError(
                f"data.facts: {self.path}: {error.strerror}; `python main.py scan LIST --root R` makes it"
            ) from error
        except (ValueError, AttributeError) as error:
            raise self._damaged() from error

        # Another PyAV may bring another FFmpeg, which may find other frames.
        if versions != _versions():
            raise UserError(
                f"data.facts: {self.path} was made by probe version {versions['probe']} with PyAV {versions['av']}, "
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
        return UserError(f"data.facts: {self.path} is cut off or damaged, not a whole facts.bin: scan again")

    def __len__(self) -> int:
        return len(self._columns["key"])

    def find(self, key: int, path: str) -> Entry | None:
        """Return the entry of a path, or None if there is none or the file has changed since the scan."""
        columns = self._columns
        row = int(np.searchsorted(columns["key"], np.uint64(key))) if len(self) else 0
        if row >= len(self) or int(columns["key"][row]) != key:
            return None

        here = {name: column[row].item() for name, column in columns.items()}
        witness, grade, decoder = (self._words[here[name]] for name in ("witness", "grade", "decoder"))
        stamp = Stamp(here["size"], here["mtime"], witness, here["witness_size"], here["witness_mtime"])
        if stamp_of(path, witness) != stamp:
            return None

        facts = Facts(frames=here["frames"], height=here["height"], width=here["width"], fps=here["fps"])
        return Entry(stamp, facts, grade, here["turns"], decoder, here["missing"])


class KnownFacts:
    """A reader that looks up facts in the cache first. It passes everything else to the reader inside.

    Args:
        reader: the reader inside.
        spec: how it was opened.
        records: its list.
        cache: an open cache.
    """

    def __init__(self, reader: Reader, spec: ReaderSpec, records: Records, cache: FactsCache) -> None:
        self.reader, self.read, self.close = reader, reader.read, reader.close
        self.spec = spec
        self.records = records
        self.cache = cache
        #: Number of probes that the cache answered, and of all probes.
        self.hits = self.asked = 0
        self._missing: dict[int, int] = {}

    def probe(self, i: int) -> Facts:
        """See `Reader.probe`."""
        self.asked += 1
        path, declared = self.records.full_path(i), int(self.records.frames[i])
        family = _FAMILY.get(self.spec.kind) or family_of(path)
        entry = self.cache.find(key_of(self.spec, family, path, int(self.records.starts[i])), path)

        # The frames reader uses a count in the list after a check of the files. If it differs from the count of the
        # scan, the reader has to check.
        if entry is None or (family == "frames" and 0 < declared != entry.facts.frames):
            return self.reader.probe(i)

        self.hits += 1
        self._missing[i] = entry.missing
        if entry.grade in _COUNTING and self.spec.kind == "video":
            self._spare_counting(i, entry)
        frames = self.records.length_of(i, entry.facts.frames) if family == "video" else entry.facts.frames
        return dataclasses.replace(entry.facts, frames=frames)

    def missing(self, i: int) -> int:
        """See `VideoReader.missing`. It refers to the last `probe`."""
        if i in self._missing:
            return self._missing[i]
        missing = getattr(self.reader, "missing", None)
        return missing(i) if missing else 0

    def _spare_counting(self, i: int, entry: Entry) -> None:
        """Give the video reader an index for reading by counting, which saves a decode of the whole file."""
        from datasets.readers.video_index import Grade, Index

        # An index covers the whole file, an entry only the frames from the record's start on.
        facts = dataclasses.replace(entry.facts, frames=entry.facts.frames + int(self.records.starts[i]))

        none = np.zeros(0, np.int64)
        packets = (none, none, none, none.astype(bool), none)
        index = Index(facts, Grade(entry.grade), entry.turns, entry.decoder, *packets, entry.missing)
        self.reader.assume(i, index)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)
