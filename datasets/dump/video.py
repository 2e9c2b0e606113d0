"""Dump one video in a worker process: read it, write it under a temporary name, rename it when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
from typing import TYPE_CHECKING

from datasets.dump.pixels import Coder
from datasets.dump.settings import DumpSettings
from datasets.dump.source import DumpSource, open_source, rate
from datasets.dump.write import ClipFile, FolderWriter, PackFile, VideoWriter, note_of
from datasets.lists.records import Records
from datasets.readers.ending import EndsEarly
from utils import files
from utils.errors import MediaError, UserError

if TYPE_CHECKING:
    from datasets.loading.messages import DumpVideo

_OF_THE_FOLDER = {  # errors that stop every video, so they are not a failure of this one
    errno.EDQUOT: "the quota is used up; make room",
    errno.EIO: "the disk or the file server failed; look at the machine's log",
    errno.ENOSPC: "the disk is full; make room",
    errno.EROFS: "it is read-only; choose another folder",
    errno.ESTALE: "the file server has forgotten the folder; mount it again",
    errno.ETIMEDOUT: "the file server did not answer in time",
}


class Dumper:
    """Do tasks of the kind `DumpVideo`."""

    def __init__(self, records: Records, missing_share: float) -> None:
        self.records = records
        self.missing_share = missing_share

    def answer(self, number: int, task: DumpVideo) -> files.Row:
        """Dump one video.

        Args:
            number: number of the task; with the process id it makes the name of the temporary file unique.
            task: the video, its target and the settings.

        Returns:
            The video's line in the manifest: path, source, stamp, digest, frames, height, width, fps, bytes; kept (the
            complete result was there already); missing (frames at its end that do not decode).

        Raises:
            MediaError: the video cannot be read to its end, or cannot be written in this form.
            UserError: no video can be written there.
        """
        settings, target = task.settings, task.target
        path, shown = self.records.full_path(task.sample), self.records.path(task.sample)
        tmp = os.path.join(task.tmp, f"{os.getpid()}-{number}")

        # The stamp is taken before reading: a source that changes during the dump is dumped again next time.
        origin = {"path": shown, "source": os.path.abspath(path), "stamp": stamp(path), "digest": settings.digest()}

        # A result without a line in the manifest comes from a killed dump, or from other settings.
        if os.path.lexists(target):
            note = self._note(target, path, shown, settings)
            if all(note[key] == origin[key] for key in ("stamp", "digest")):  # complete, since it was renamed when done
                return {**note, **origin, "kept": True}
            # The whole folder is replaced, and other videos must not be lost with it.
            if settings.form == "frames" and any(os.path.isdir(os.path.join(target, n)) for n in os.listdir(target)):
                raise MediaError(shown, f"{target} holds folders too, perhaps of other videos; choose another folder")

        try:
            source = open_source(path, shown, self.missing_share)
            try:
                return dump_video(source, settings, target, tmp, origin)
            except EndsEarly as end:
                source.end_at(end.frames, end.missing)  # write again from the start, without the last frames
                return dump_video(source, settings, target, tmp, origin)
        except OSError as error:
            advice = _OF_THE_FOLDER.get(error.errno or 0)
            # An error that names the source is about reading, whatever its number.
            if advice and error.filename != path:
                raise UserError(f"{target}: {advice}, then run the same command again") from error
            raise MediaError(shown, f"it cannot be written ({error.strerror or error})") from error

    @staticmethod
    def _note(target: str, path: str, shown: str, settings: DumpSettings) -> files.Row:
        """Return the note of the dumped video at `target`. Raise MediaError if this video must not replace it."""
        if os.path.exists(target) and os.path.samefile(target, path):
            raise MediaError(shown, f"{target} is the video itself; choose another folder")

        note = note_of(target, settings.form)
        if note is None or not note.keys() >= {"path", "stamp", "digest", "frames"}:
            raise MediaError(shown, f"{target} exists and was not written by a dump; move it away")
        if other := other_source(note, shown, path):
            raise MediaError(shown, f"{target} already exists from {other}; choose another folder")

        return note


def other_source(note: files.Row, shown: str, path: str) -> str:
    """Return the source of a dumped video if it is a different one than `path` and still exists; else "".

    Args:
        note: the note in the dumped video, or its line in the manifest.
        shown, path: a video as the list writes it, and its path on disk.
    """
    source = note.get("source")
    if not isinstance(source, str):  # an older version noted no source; assume that the list had the same root
        root = path.removesuffix(shown)
        source = path if note["path"] == shown else os.path.join(root, note["path"])

    if os.path.abspath(path) == source or not os.path.exists(source):
        return ""
    # Two paths may lead to one file, through a link for example.
    return "" if os.path.exists(path) and os.path.samefile(source, path) else source


def dump_video(source: DumpSource, settings: DumpSettings, target: str, tmp: str, origin: files.Row) -> files.Row:
    """Read a video, write it to `tmp`, and rename that to `target`.

    Args:
        source: the video.
        settings: how to store it.
        target, tmp: final and temporary path.
        origin: metadata of the source that the result keeps.

    Returns:
        `origin` with frames, height, width, fps, bytes and missing.
    """
    coder = Coder(settings, source.turns, source.metadata)
    info = origin | {"frames": source.metadata.frames, "height": coder.size[0], "width": coder.size[1]}
    # Only a clip needs a frame rate: the other forms keep an unknown rate as unknown.
    info["fps"] = float(rate(source.metadata)) if settings.form == "clips" else source.metadata.fps

    writer = _writer(tmp, coder, settings, info, source)
    try:
        for picture in source.pictures():
            writer.add(picture)
        info["bytes"] = writer.close()
    except BaseException:  # even when the process is stopped
        writer.abandon()
        raise

    os.makedirs(os.path.dirname(target), exist_ok=True)
    # An older dump may be in the way, and a folder can only be renamed over an empty one.
    if settings.form == "frames" and os.path.isdir(target):
        os.rename(target, f"{tmp}-old")
        os.rename(tmp, target)
        shutil.rmtree(f"{tmp}-old")
    else:
        os.rename(tmp, target)
    return info | {"missing": source.missing}


def _writer(tmp: str, coder: Coder, settings: DumpSettings, info: files.Row, source: DumpSource) -> VideoWriter:
    if settings.form == "frames":
        return FolderWriter(tmp, coder, settings, info)
    if settings.form == "packs":
        return PackFile(tmp, coder, settings, info)
    return ClipFile(tmp, coder, settings, info, rate(source.metadata))


def stamp(path: str) -> list[int]:
    """Return [bytes, ns of the last change] of a source; a different stamp means a different video."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise MediaError(path, error.strerror or str(error)) from error
    return [info.st_size, info.st_mtime_ns]
