"""The state of a folder of dumped videos: settings, manifest, lock, failures. All but the last lie in `DST/.dump/`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from datasets.dump.names import FAILED, Names, read_json, write_text
from datasets.dump.settings import Settings
from datasets.dump.video import other_source, stamp
from utils import files
from utils.append_file import AppendFile
from utils.faults import MediaError, UserError

Entry = files.Row


class State:
    """One open folder of dumped videos; nobody else can write to it meanwhile.

    Args:
        folder: DST.
        settings: of this dump.
        names: the dump's own files in the folder.
        redo: accept other settings than the folder was made with; its videos are then made again.

    Raises:
        UserError: another dump is at work there, or its settings differ, or the file of its settings is damaged.
    """

    def __init__(self, folder: Path, settings: Settings, names: Names, *, redo: bool) -> None:
        self.folder, self.settings, self._names = folder, settings, names
        self._own = folder / ".dump"
        self._own.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._own / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not files.lock(self._lock):
                raise UserError(f"{folder}: another dump is writing there; wait for it or choose another folder")
            self._check_settings(redo)
        except BaseException:
            os.close(self._lock)
            raise
        self.tmp = self._own / "tmp"
        shutil.rmtree(self.tmp, ignore_errors=True)  # what a killed dump left
        self.tmp.mkdir()
        self._known: dict[str, Entry] = {}  # by target
        self._older: dict[str, Entry] = {}  # by path: lines from before they named their target
        self._read()
        self._manifest = AppendFile(self._own / "manifest.jsonl", print)

    def close(self) -> None:
        """Let others write."""
        self._manifest.close()
        shutil.rmtree(self.tmp, ignore_errors=True)
        os.close(self._lock)

    def _check_settings(self, redo: bool) -> None:
        file = self._own / "settings.json"
        if file.exists():
            before, now = read_json(file), json.loads(self.settings.to_json())
            differ = [f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
            if differ and not redo:
                raise UserError(
                    f"{self.folder} was made with other settings ({'; '.join(differ)}); choose another folder, or add "
                    "--redo to make its videos again"
                )
            if before.get("form") != now["form"]:
                raise UserError(f"{self.folder} holds {before.get('form')}; choose another folder for {now['form']}")
        write_text(file, self.settings.to_json() + "\n")

    def _read(self) -> None:
        for entry in files.read_rows(self._own / "manifest.jsonl"):
            if not isinstance(entry.get("frames"), int):
                continue
            if isinstance(entry.get("target"), str):
                self._known[entry["target"]] = entry
            elif isinstance(entry.get("path"), str):
                self._older[entry["path"]] = entry

    def done(self, target: str, shown: str, path: str) -> Entry | None:
        """The entry of a video that needs no work: same settings, source unchanged, and it is still there.

        Args:
            target: its name below the folder.
            shown, path: the source as the list writes it, and where it is.
        """
        entry = self._known.get(target) or self._older.get(shown)
        if entry is None or entry.get("digest") != self.settings.digest() or other_source(entry, shown, path):
            return None
        if not os.path.exists(self.folder / target):
            return None
        try:
            return entry if entry.get("stamp") == stamp(path) else None
        except MediaError:
            return None

    def add(self, target: str, entry: Entry) -> Entry:
        """Note a finished video, which is on the disk; its entry."""
        entry = self._known[target] = {**entry, "target": target}
        self._manifest.append((json.dumps(entry) + "\n").encode())
        return entry

    def note_failures(self, asked: Iterable[str], failures: dict[str, str]) -> Path:
        """Rewrite failed.txt: `path<tab>reason` a line; failures of videos that were not asked for this time stay."""
        file = self.folder / FAILED
        kept: dict[str, str] = {}
        if file.exists():
            for line in file.read_text(errors="surrogateescape").splitlines():
                path, _, reason = line.partition("\t")
                kept[path] = reason
        for path in asked:
            kept.pop(path, None)
        kept |= failures
        if not kept:
            file.unlink(missing_ok=True)
            self._names.drop(FAILED)
            return file
        self._names.claim(FAILED, "")
        lines = [f"{path}\t{' '.join(reason.split())}\n" for path, reason in kept.items()]
        write_text(file, "".join(lines))
        return file
