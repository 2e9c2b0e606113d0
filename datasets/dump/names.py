"""Keep track of the files that a dump writes into DST next to its videos: lists and failed.txt. Replace no others."""

from __future__ import annotations

import json
import os
from pathlib import Path

from datasets.lists.formats import is_json
from datasets.lists.records import Records
from utils import files
from utils.errors import UserError

FAILED = "failed.txt"
_NOT_LISTS = {".mp4", ".fsh"}  # dumped videos


class Names:
    """The files other than videos that dumps have written: `DST/.dump/lists.json`, name -> the list of its origin.

    Args:
        folder: DST; it need not exist yet.

    Raises:
        UserError: lists.json is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / ".dump" / "lists.json"
        self._known = self._read()

    def _read(self) -> dict[str, str]:
        if self._file.exists():
            return {name: str(source) for name, source in read_json(self._file).items()}
        manifest = self._file.with_name("manifest.jsonl")
        # A folder of an older version, which wrote no lists.json: find its files by their content.
        if manifest.exists() and manifest.stat().st_size:
            return {file.name: "" for file in self.folder.iterdir() if _was_written_here(file)}
        return {}

    def check(self, name: str, source: str) -> None:
        """Raise UserError if no dump wrote the file of this name, or one made it from another list that still exists.

        Args:
            name: a file in DST.
            source: absolute path of the list that the file is made from; "" for failed.txt.
        """
        file = self.folder / name
        if name not in self._known:
            if os.path.lexists(file):
                raise UserError(f"{file}: no dump wrote this file; move it away, or choose another folder")
            return

        # A list that was moved keeps its dump; two lists must not replace each other's result.
        before = self._known[name]
        if before and os.path.exists(before) and not (os.path.exists(source) and os.path.samefile(before, source)):
            raise UserError(
                f"{file} was made from {before}, which is still there; give {source} another name, or choose another "
                "folder"
            )

    def claim(self, name: str, source: str) -> None:
        """Record that the dump is about to write this file; see `check`."""
        self.check(name, source)
        if self._known.get(name) != source or not self._file.exists():
            self._known[name] = source
            self._write()

    def drop(self, name: str) -> None:
        """Record that the dump has removed its file of this name."""
        if self._known.pop(name, None) is not None:
            self._write()

    def _write(self) -> None:
        write_text(self._file, json.dumps(self._known, indent=1) + "\n")


def list_name(list_file: Path, dst: Path) -> str:
    """Return the name of the new list in DST: that of the old one, with .txt for a JSON list.

    Raises:
        UserError: the name is that of failed.txt, or the new list would replace the old one.
    """
    name = f"{list_file.stem}.txt" if is_json(str(list_file)) else list_file.name
    if name == FAILED:
        raise UserError(f"dump: {list_file}: {FAILED} is the name of the dump's own report; rename the list")
    if os.path.realpath(dst / name) == os.path.realpath(list_file):
        raise UserError(f"dump: {dst} is the folder of the list: the new one would replace it; choose another folder")
    return name


def read_json(file: Path) -> files.Row:
    """Return the dict in a JSON file of the dump. Raise UserError if there is none."""
    try:
        content = json.loads(file.read_text())
        if isinstance(content, dict):
            return content
    except ValueError:
        pass
    raise UserError(f"{file}: this file of the dump is damaged; delete it, then run the same command as before again")


def _was_written_here(file: Path) -> bool:
    """Return True if an older dump wrote this file: each line names a file in the folder, or a failure."""
    if file.suffix in _NOT_LISTS or file.name.startswith(".") or not file.is_file():
        return False
    if file.name == FAILED:
        return all("\t" in line for line in file.read_text(errors="replace").splitlines())

    try:
        records = Records.load(file, file.parent, num_class=None)
    except UserError:
        return file.stat().st_size == 0  # an old dump without a success left an empty list
    return all(os.path.exists(records.full_path(i)) for i in range(len(records)))


def write_text(file: Path, text: str) -> None:
    """Replace a small file as a whole, so that no reader sees half of it."""
    partial = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    with files.replacing(file, temporary=partial, sync=True) as temporary:
        # Paths that are not UTF-8 keep their bytes.
        temporary.write_text(text, errors="surrogateescape")
