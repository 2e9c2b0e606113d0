"""The state of a folder of dumped videos: settings, manifest, lock and failures, all but the last in `DST/.dump/`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from datasets.dump.names import FAILED, Names, read_json, write_text
from datasets.dump.settings import DumpSettings
from datasets.dump.video import other_source, stamp
from utils import files
from utils.append_file import AppendFile
from utils.errors import MediaError, UserError

DumpEntry = files.Row


class DumpFolder:
    """One open folder of dumped videos. A lock keeps other dumps from writing to it until `close`.

    Args:
        folder: DST.
        settings: settings of this dump.
        names: the files other than videos that dumps have written.
        redo: accept a folder with other settings, and write its videos again.

    Raises:
        UserError: another dump writes there, the settings differ, or the file of the settings is damaged.
    """

    def __init__(self, folder: Path, settings: DumpSettings, names: Names, *, redo: bool) -> None:
        self.folder, self.settings, self._names = folder, settings, names
        self._work_folder = folder / ".dump"
        self._work_folder.mkdir(parents=True, exist_ok=True)

        self._lock = os.open(self._work_folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not files.lock(self._lock):
                raise UserError(f"{folder}: another dump is writing there; wait for it or choose another folder")
            self._check_settings(redo)
        except BaseException:  # no `close` follows a failed constructor
            os.close(self._lock)
            raise

        # The lock is held, so only a killed dump can have left temporary files.
        self.tmp = self._work_folder / "tmp"
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir()

        self._known: dict[str, DumpEntry] = {}  # by target
        self._older: dict[str, DumpEntry] = {}  # by path: lines of an older version, without a target
        self._read()

        self._manifest = AppendFile(self._work_folder / "manifest.jsonl", print)

    def close(self) -> None:
        """Release the folder, so that other dumps can write to it."""
        self._manifest.close()
        shutil.rmtree(self.tmp, ignore_errors=True)
        os.close(self._lock)  # last: it lets the next dump in

    def _check_settings(self, redo: bool) -> None:
        file = self._work_folder / "settings.json"
        if file.exists():
            before, now = read_json(file), json.loads(self.settings.to_json())
            differ = [f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
            if differ and not redo:
                raise UserError(
                    f"{self.folder} was written with other settings ({'; '.join(differ)}); choose another folder, "
                    "or add --redo to write its videos again"
                )

            # Not even --redo mixes folders, packs and clips: their names would clash.
            if before.get("form") != now["form"]:
                raise UserError(f"{self.folder} holds {before.get('form')}; choose another folder for {now['form']}")

        write_text(file, self.settings.to_json() + "\n")

    def _read(self) -> None:
        for entry in files.read_rows(self._work_folder / "manifest.jsonl"):
            if not isinstance(entry.get("frames"), int):
                continue
            if isinstance(entry.get("target"), str):
                self._known[entry["target"]] = entry
            elif isinstance(entry.get("path"), str):
                self._older[entry["path"]] = entry

    def done(self, target: str, shown: str, path: str) -> DumpEntry | None:
        """Return the entry of a video that needs no work: same settings, same source, result still there. Else None.

        Args:
            target: name of the result below the folder.
            shown, path: the source as the list writes it, and its path on disk.
        """
        entry = self._known.get(target) or self._older.get(shown)
        if entry is None or entry.get("digest") != self.settings.digest() or other_source(entry, shown, path):
            return None

        # The manifest may list a video that someone has deleted.
        if not os.path.exists(self.folder / target):
            return None
        try:
            return entry if entry.get("stamp") == stamp(path) else None
        except MediaError:
            return None  # the source cannot be read: dumping it will report why

    def add(self, target: str, entry: DumpEntry) -> DumpEntry:
        """Add a finished video, which is on the disk, to the manifest. Return its entry."""
        entry = self._known[target] = {**entry, "target": target}
        self._manifest.append((json.dumps(entry) + "\n").encode())
        return entry

    def note_failures(self, asked: Iterable[str], failures: dict[str, str]) -> Path:
        """Rewrite failed.txt, `path<tab>reason` per line. Failures of videos that are not in `asked` stay."""
        file = self.folder / FAILED
        kept: dict[str, str] = {}
        if file.exists():
            for line in file.read_text(errors="surrogateescape").splitlines():
                path, _, reason = line.partition("\t")
                kept[path] = reason

        for path in asked:
            kept.pop(path, None)
        kept |= failures

        # A complete dump has no failed.txt.
        if not kept:
            file.unlink(missing_ok=True)
            self._names.drop(FAILED)
            return file

        # Claim the name before the file exists, so that a killed dump does not leave a file without an owner.
        self._names.claim(FAILED, "")
        lines = [f"{path}\t{' '.join(reason.split())}\n" for path, reason in kept.items()]
        write_text(file, "".join(lines))
        return file
