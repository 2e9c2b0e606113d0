"""Remember the answers of a scan: one line of JSON for each, from which the metadata for training is made."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from datasets.plan.metadata import VideoMetadata
from datasets.readers import metadata_cache
from datasets.readers.spec import ReaderSpec
from datasets.scan.file import LEVELS
from utils import files, renamed
from utils.errors import UserError

JOURNAL = "files.jsonl"
ScanEntry = files.Row


class Journal:
    """The answers about files: DIR/files.jsonl, one line per examination of a file. The last line of a file counts.

    Another kind of line names the list to which a clean list in DIR belongs. Lines that lack a needed value are left
    out, and their files are examined again.

    Args:
        folder: DIR; created if it does not exist.
        spec: naming of frame folders; entries with another naming are not used.

    Raises:
        UserError: the file was not written by a scan, is damaged, or another scan is writing to the folder.
    """

    def __init__(self, folder: Path, spec: ReaderSpec) -> None:
        self.file = folder / JOURNAL
        self.spec = spec
        self.known: dict[tuple[str, int], ScanEntry] = {}
        self._lists: dict[str, list[str]] = {}

        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._out = open(self.file, "ab")  # noqa: SIM115  open as long as the scan
        except OSError as error:
            raise UserError(f"--out: {error.filename}: {error.strerror}") from error

        try:
            if not files.lock(self._out.fileno()):
                raise UserError(f"--out: another scan is writing to {folder}")
            whole = self._load()
            self._out.truncate(whole)  # removes half a line that a killed scan left
            if not whole:
                self._write({"zoetrope": "scan", "version": 1})
        except BaseException:  # no `close` follows a failed constructor
            self._out.close()
            raise

    def _load(self) -> int:
        """Read the lines of earlier scans. Return the bytes of the complete lines."""
        whole = 0
        with open(self.file, "rb") as f:
            first = f.readline()
            if not first:
                return 0
            if not first.startswith(b'{"zoetrope": "scan"'):
                raise UserError(f"{self.file}: this file was not written by a scan; choose another --out")

            whole = len(first)
            for number, line in enumerate(f, start=2):
                if not line.endswith(b"\n"):
                    break  # the last line, cut off when a scan was killed
                whole += len(line)
                try:
                    entry = renamed.scanned(json.loads(line))
                    if "clean" in entry:
                        self._lists[str(entry["clean"])] = [str(entry["list"]), str(entry["root"])]
                    elif entry["naming"] == self._naming(entry["family"]) and _is_whole(entry):
                        self.known[entry["path"], entry["start"]] = entry
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{self.file}:{number}: this line is damaged; delete it, or the file") from None

        return whole

    def _naming(self, family: str) -> list[object]:
        # Whatever changes the metadata of a file: with a different value its entries do not hold.
        if family == "frames":
            return [self.spec.template, self.spec.frame_base, self.spec.fps]
        return [metadata_cache.PROBE_VERSION, self.spec.missing_share]

    def _write(self, entry: ScanEntry) -> None:
        self._out.write(json.dumps(entry).encode("ascii") + b"\n")
        self._out.flush()

    def add(self, path: str, start: int, answer: ScanEntry) -> None:
        """Record the answer about a path."""
        family = "video" if answer.get("kind", "video") == "video" else "frames"
        entry = {"path": path, "start": start, "family": family, "naming": self._naming(family), **answer}
        self.known[path, start] = entry
        self._write(entry)

    def check_owner(self, clean: Path, list_file: str, root: str) -> None:
        """Raise UserError if the clean list to be written belongs to another list, or was not written by a scan."""
        owner = self._lists.get(clean.name)
        if owner == _owner(list_file, root) or not os.path.lexists(clean):
            return

        whose = f"belongs to {owner[0]} with root {owner[1]}" if owner else "exists and was not written by a scan"
        raise UserError(f"--out: {clean} {whose}; scan {list_file} with another --out, or move that file away")

    def record_list(self, clean: str, list_file: str, root: str) -> None:
        """Record to which list the clean list of this name belongs."""
        owner = _owner(list_file, root)
        if self._lists.get(clean) != owner:
            self._lists[clean] = owner
            self._write({"clean": clean, "list": owner[0], "root": owner[1]})

    def stamp(self, path: str, start: int, level: str) -> metadata_cache.Stamp | None:
        """Return the stamp under which a path need not be examined again at this level; None if it must be."""
        entry = self.known.get((path, start))
        if entry is None or entry.get("again") or LEVELS.index(entry["level"]) < LEVELS.index(level):
            return None
        return metadata_cache.Stamp(*entry["stamp"]) if entry["stamp"] else None

    def metadata(self) -> Iterator[tuple[int, metadata_cache.MetadataEntry]]:
        """Yield the rows of the metadata cache: every file for which `probe` had an answer."""
        for (path, start), entry in self.known.items():
            if entry.get("stamp") and "frames" in entry:
                # The cache holds what `probe` returns, even if fewer frames can be decoded.
                frames = entry.get("probed", entry["frames"])
                metadata = VideoMetadata(frames, *(entry[name] for name in ("height", "width", "fps")))
                stamp, video = metadata_cache.Stamp(*entry["stamp"]), entry.get("grade", "")
                details = (video, entry["turns"], entry["decoder"], entry["missing"]) if video else ()
                key = metadata_cache.key_of(self.spec, entry["family"], path, start)
                yield key, metadata_cache.MetadataEntry(stamp, metadata, *details)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()


def _owner(list_file: str, root: str) -> list[str]:
    return [os.path.abspath(list_file), os.path.abspath(root)]


def _is_whole(entry: ScanEntry) -> bool:
    """Return True if an entry holds all values that results, metadata and the comparison of files need."""
    stamp, bad, notes = entry.get("stamp"), entry.get("bad"), entry.get("notes")
    if entry.get("level") not in LEVELS or not isinstance(bad, str) or not isinstance(notes, list):
        return False
    if stamp is not None and not (isinstance(stamp, list) and len(stamp) == len(metadata_cache.Stamp._fields)):
        return False

    if "frames" in entry or not bad:
        # A bool is an int in Python, so the type is compared.
        sizes = [entry.get(name) for name in ("frames", "height", "width")]
        if not all(type(size) is int and size > 0 for size in sizes) or not isinstance(entry.get("fps"), (int, float)):
            return False
        if not math.isfinite(entry["fps"]) or (
            entry.get("grade") and not {"turns", "decoder", "missing"} <= entry.keys()
        ):
            return False

    if bad:
        return True
    return stamp is not None and "kind" in entry and (entry["kind"] != "folder" or "first" in entry)
