"""Write points of curves for TensorBoard, at once and in the calling thread. Needs no torch.

`torch.utils.tensorboard` writes from a background thread, whose failure ends the run with two traces.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from utils.append_file import AppendFile

if TYPE_CHECKING:
    from google.protobuf.message import Message


class EventFile:
    """An ``events.out.tfevents...`` file of this process; like an `AppendFile` it never ends a run.

    Args:
        folder: the folder of the file.
        resume_step: finished iterations at the start. TensorBoard drops points of later steps from earlier processes.
        remark: called with one sentence at the first failure.
    """

    def __init__(self, folder: Path, resume_step: int, remark: Callable[[str], object]) -> None:
        self._folder, self._remark, self._number = folder, remark, 0

        event_pb2, _ = _messages()
        mark = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        # SessionLog.START is TensorBoard's sign of a restart: it discards points from this step on.
        began = event_pb2.Event(step=resume_step + 1, wall_time=time.time(), session_log=mark)
        self._owed = _version() + _record(began)  # bytes that the file must begin with
        self._file = self._next()
        self._append(b"")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point of each curve."""
        event_pb2, summary_pb2 = _messages()
        points = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        summary = summary_pb2.Summary(value=points)

        self._append(_record(event_pb2.Event(step=step, wall_time=time.time(), summary=summary)))

    def _append(self, data: bytes) -> None:
        # Bytes that are still owed go first: a file without its version record is not read at all.
        if self._file.write(self._owed + data):
            self._owed = b""
            return

        self._file = self._next()  # the old file may end in half a record, and a reader stops there
        self._owed = self._owed or _version()

    def sync(self) -> None:
        """Flush the written bytes to the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next(self) -> AppendFile:
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{self._number}"
        # Only the first file reports: a full disk would otherwise cause one remark per file.
        remark = self._remark if self._number == 0 else (lambda text: None)
        self._number += 1
        return AppendFile(self._folder / name, remark, lines=False, reopened=_version)


def _version() -> bytes:
    return _record(_messages()[0].Event(wall_time=time.time(), file_version="brain.Event:2"))


def _messages() -> tuple[ModuleType, ModuleType]:
    """Return TensorBoard's modules of message types. They are created by their import."""
    from tensorboard.compat.proto import event_pb2, summary_pb2

    return event_pb2, summary_pb2


def _record(event: Message) -> bytes:
    # Imported here: tensorboard is optional and takes a moment to load.
    from tensorboard.summary.writer.record_writer import RecordWriter

    parts: list[bytes] = []
    RecordWriter(_Collected(parts)).write(event.SerializeToString())
    return b"".join(parts)


class _Collected:
    """A stand-in for the file that `RecordWriter` expects."""

    def __init__(self, parts: list[bytes]) -> None:
        self._parts = parts

    def write(self, data: bytes) -> None:
        self._parts.append(data)
