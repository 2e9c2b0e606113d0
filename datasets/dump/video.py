"""One video of a dump, as a worker process does it: read, write below a temporary name, rename when whole."""

from __future__ import annotations

import errno
import os
import shutil
from typing import TYPE_CHECKING

from datasets.dump.pixels import Coder
from datasets.dump.settings import Settings
from datasets.dump.source import Source, open_source, rate
from datasets.dump.write import ClipFile, FolderWriter, ShardFile, Writer, note_of
from datasets.lists.records import Records
from datasets.readers.ending import EndsEarly
from utils import files
from utils.faults import MediaError, UserError

if TYPE_CHECKING:
    from datasets.loading.messages import DumpVideo

_OF_THE_FOLDER = {  # no video can be written there, so none of them has failed
    errno.EDQUOT: "the quota is used up; make room",
    errno.EIO: "the disk or the file server failed; look at the machine's log",
    errno.ENOSPC: "the disk is full; make room",
    errno.EROFS: "it is read-only; choose another folder",
    errno.ESTALE: "the file server has forgotten the folder; mount it again",
    errno.ETIMEDOUT: "the file server did not answer in time",
}


class Dumper:
    """Does tasks of the kind `DumpVideo`."""

    def __init__(self, records: Records, missing_share: float) -> None:
        self.records = records
        self.missing_share = missing_share

    def answer(self, number: int, task: DumpVideo) -> files.Row:
        """Dump one video.

        Args:
            number: of the task; with the process id it names the temporary file.
            task: what to dump, and where to.

        Returns:
            The video's line in the manifest: path, source, stamp, digest, frames, height, width, fps, bytes; kept (it
            stood there already); missing (frames at its end that do not decode).

        Raises:
            MediaError: the video cannot be read to its end, or not be written in this form.
            UserError: nothing can be written there at all.
        """
        settings, target = task.settings, task.target
        path, shown = self.records.full_path(task.sample), self.records.path(task.sample)
        tmp = os.path.join(task.tmp, f"{os.getpid()}-{number}")
        made = {"path": shown, "source": os.path.abspath(path), "stamp": stamp(path), "digest": settings.digest()}
        if os.path.lexists(target):
            note = self._note(target, path, shown, settings)
            if all(note[key] == made[key] for key in ("stamp", "digest")):
                return {**note, **made, "kept": True}
            if settings.form == "frames" and any(os.path.isdir(os.path.join(target, n)) for n in os.listdir(target)):
                raise MediaError(shown, f"{target} holds folders too, perhaps of other videos; choose another folder")
        try:
            source = open_source(path, shown, self.missing_share)
            try:
                return dump_video(source, settings, target, tmp, made)
            except EndsEarly as end:
                source.end_at(end.frames, end.missing)
                return dump_video(source, settings, target, tmp, made)
        except OSError as error:
            advice = _OF_THE_FOLDER.get(error.errno or 0)
            if advice and error.filename != path:
                raise UserError(f"{target}: {advice}, then run the same command again") from error
            raise MediaError(shown, f"it cannot be written ({error.strerror or error})") from error

    @staticmethod
    def _note(target: str, path: str, shown: str, settings: Settings) -> files.Row:
        """What the dumped video at `target` says of itself; MediaError if it must not be replaced by this one."""
        if os.path.exists(target) and os.path.samefile(target, path):
            raise MediaError(shown, f"{target} is the video itself; choose another folder")
        note = note_of(target, settings.form)
        if note is None or not note.keys() >= {"path", "stamp", "digest", "frames"}:
            raise MediaError(shown, f"something that no dump made stands at {target}; move it away")
        if other := other_source(note, shown, path):
            raise MediaError(shown, f"{target} stands there from {other}; choose another folder")
        return note


def other_source(note: files.Row, shown: str, path: str) -> str:
    """The video that a dumped one was made from, if that is not the one at `path` and still exists; else "".

    Args:
        note: what the dumped video or its line in the manifest says.
        shown, path: a video as the list writes it, and where it is.
    """
    source = note.get("source")
    if not isinstance(source, str):  # from before sources were noted: the root is not known, it may be the same
        root = path.removesuffix(shown)
        source = path if note["path"] == shown else os.path.join(root, note["path"])
    if os.path.abspath(path) == source or not os.path.exists(source):
        return ""
    return "" if os.path.exists(path) and os.path.samefile(source, path) else source


def dump_video(source: Source, settings: Settings, target: str, tmp: str, made: files.Row) -> files.Row:
    """Read a video, write it below `tmp`, rename that to `target`.

    Args:
        source: the video.
        settings: how to store it.
        target, tmp: final and temporary path.
        made: what the result shall remember of its source.

    Returns:
        `made` and frames, height, width, fps, bytes, missing.
    """
    coder = Coder(settings, source.turns, source.facts)
    info = made | {"frames": source.facts.frames, "height": coder.size[0], "width": coder.size[1]}
    info["fps"] = float(rate(source.facts)) if settings.form == "clips" else source.facts.fps
    writer = _writer(tmp, coder, settings, info, source)
    try:
        for picture in source.pictures():
            writer.add(picture)
        info["bytes"] = writer.close()
    except BaseException:
        writer.abandon()
        raise
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if settings.form == "frames" and os.path.isdir(target):  # an older dump: a full folder cannot be renamed over
        os.rename(target, f"{tmp}-old")
        os.rename(tmp, target)
        shutil.rmtree(f"{tmp}-old")
    else:
        os.rename(tmp, target)
    return info | {"missing": source.missing}


def _writer(tmp: str, coder: Coder, settings: Settings, info: files.Row, source: Source) -> Writer:
    if settings.form == "frames":
        return FolderWriter(tmp, coder, settings, info)
    if settings.form == "shards":
        return ShardFile(tmp, coder, settings, info)
    return ClipFile(tmp, coder, settings, info, rate(source.facts))


def stamp(path: str) -> list[int]:
    """[bytes, ns of the last change] of a source: another stamp means another video."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise MediaError(path, error.strerror or str(error)) from error
    return [info.st_size, info.st_mtime_ns]
