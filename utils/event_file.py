"""Points of curves for TensorBoard, written at once and by the thread that has them. Needs no torch.

`torch.utils.tensorboard` writes from a thread of its own, whose failure ends the run with two traces.
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
        folder: where it stands.
        resume_step: finished iterations at the start: TensorBoard drops what earlier processes wrote for later steps.
        remark: called with one sentence at the first failure.
    """

    def __init__(self, folder: Path, resume_step: int, remark: Callable[[str], object]) -> None:
        self._folder, self._remark, self._number = folder, remark, 0
        event_pb2, _ = _messages()
        mark = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        began = event_pb2.Event(step=resume_step + 1, wall_time=time.time(), session_log=mark)
        self._owed = _version() + _record(began)  # what the file must begin with
        self._file = self._next()
        self._append(b"")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point of each curve."""
        event_pb2, summary_pb2 = _messages()
        points = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        summary = summary_pb2.Summary(value=points)
        self._append(_record(event_pb2.Event(step=step, wall_time=time.time(), summary=summary)))

    def _append(self, data: bytes) -> None:
        if self._file.write(self._owed + data):
            self._owed = b""
            return
        self._file = self._next()  # the old one may end in half a record, and a reader goes no further
        self._owed = self._owed or _version()

    def sync(self) -> None:
        """Hand what was written to the disk."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next(self) -> AppendFile:
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{self._number}"
        remark = self._remark if self._number == 0 else (lambda text: None)
        self._number += 1
        return AppendFile(self._folder / name, remark, lines=False, reopened=_version)


def _version() -> bytes:
    return _record(_messages()[0].Event(wall_time=time.time(), file_version="brain.Event:2"))


def _messages() -> tuple[ModuleType, ModuleType]:
    """TensorBoard's modules of message types, which are made when they are imported."""
    from tensorboard.compat.proto import event_pb2, summary_pb2

    return event_pb2, summary_pb2


def _record(event: Message) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    parts: list[bytes] = []
    RecordWriter(_Collected(parts)).write(event.SerializeToString())
    return b"".join(parts)


class _Collected:
    """What `RecordWriter` takes for a file."""

    def __init__(self, parts: list[bytes]) -> None:
        self._parts = parts

    def write(self, data: bytes) -> None:
        self._parts.append(data)
