"""The files that a dump writes into DST beside its videos: lists and failed.txt. No other file is ever replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path

from datasets.lists.formats import is_json
from datasets.lists.records import Records
from utils import files
from utils.faults import UserError

FAILED = "failed.txt"
_NOT_LISTS = {".mp4", ".fsh"}


class Names:
    """Which files beside the videos are the dump's own: `DST/.dump/lists.json`, name -> the list it was made from.

    Args:
        folder: DST; need not exist yet.

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
        if manifest.exists() and manifest.stat().st_size:  # a folder from before there was a lists.json
            return {file.name: "" for file in self.folder.iterdir() if _was_written_here(file)}
        return {}

    def check(self, name: str, source: str) -> None:
        """UserError if the file of this name is not the dump's own, or was made from another list that still exists.

        Args:
            name: a file in DST.
            source: absolute path of the list it is made from; "" for failed.txt.
        """
        file = self.folder / name
        if name not in self._known:
            if os.path.lexists(file):
                raise UserError(f"{file}: no dump wrote this file; move it away, or choose another folder")
            return
        before = self._known[name]
        if before and os.path.exists(before) and not (os.path.exists(source) and os.path.samefile(before, source)):
            raise UserError(
                f"{file} was made from {before}, which is still there; give {source} another name, or choose another "
                "folder"
            )

    def claim(self, name: str, source: str) -> None:
        """Note that the dump writes this file, before it does; see `check`."""
        self.check(name, source)
        if self._known.get(name) != source or not self._file.exists():
            self._known[name] = source
            self._write()

    def drop(self, name: str) -> None:
        """The dump has removed its file of this name."""
        if self._known.pop(name, None) is not None:
            self._write()

    def _write(self) -> None:
        write_text(self._file, json.dumps(self._known, indent=1) + "\n")


def list_name(list_file: Path, dst: Path) -> str:
    """Name of the new list in DST: that of the old one, with .txt for a JSON list.

    Raises:
        UserError: the name is taken by failed.txt, or the new list would replace the old one.
    """
    name = f"{list_file.stem}.txt" if is_json(str(list_file)) else list_file.name
    if name == FAILED:
        raise UserError(f"dump: {list_file}: {FAILED} is the name of the dump's own report; rename the list")
    if os.path.realpath(dst / name) == os.path.realpath(list_file):
        raise UserError(f"dump: {dst} is the folder of the list: the new one would replace it; choose another folder")
    return name


def read_json(file: Path) -> files.Row:
    """A file of the dump that holds a dict; UserError if it does not."""
    try:
        content = json.loads(file.read_text())
        if isinstance(content, dict):
            return content
    except ValueError:
        pass
    raise UserError(f"{file}: this file of the dump is damaged; delete it, then run the same command as before again")


def _was_written_here(file: Path) -> bool:
    """Whether an older dump wrote this file: each of its lines names something in the folder, or a failure."""
    if file.suffix in _NOT_LISTS or file.name.startswith(".") or not file.is_file():
        return False
    if file.name == FAILED:
        return all("\t" in line for line in file.read_text(errors="replace").splitlines())
    try:
        records = Records.load(file, file.parent, num_class=None)
    except UserError:
        return file.stat().st_size == 0
    return all(os.path.exists(records.full_path(i)) for i in range(len(records)))


def write_text(file: Path, text: str) -> None:
    """Replace a small file as a whole."""
    own = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    with files.replacing(file, temporary=own, sync=True) as temporary:
        temporary.write_text(text, errors="surrogateescape")
