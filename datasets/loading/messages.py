"""Define the messages between loaders and reader processes: tasks and answers, as pickled frozen dataclasses.

Both ends of a socket are our own processes, which inherit it. No other process can write to it. Torch-free.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from utils.files import Row

if TYPE_CHECKING:
    from datasets.dali.encoded import Stored
    from datasets.dump.settings import DumpSettings
    from datasets.memcached.client import Counts
    from datasets.plan.train import Plan
    from datasets.plan.views import VideoPlan
    from datasets.readers.metadata_cache import Stamp

#: Buffer of one `recv`. A SEQPACKET message that does not fit would be cut off silently.
MESSAGE_BYTES = 1 << 18


@dataclass(frozen=True)
class AsStored:
    """A request for stored bytes instead of pixels, for a decoder on the device.

    Attributes:
        room: largest number of bytes; None lets the slot grow.
        without: codecs that the decoder cannot decode.
    """

    room: int | None
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadClip:
    """Draw, resolve and read the training clip at a global position into a slot.

    Attributes:
        frames_of: the position whose frames are shown; None = `position`.
        views: (position, offset) of further views of the same frames, which are read in the same task.
    """

    sample: int
    epoch: int
    position: int
    slot: int = 0
    offset: int = 0
    stored: AsStored | None = None
    frames_of: int | None = None
    views: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ReadVideo:
    """Read the distinct frames of a video at test scale into a slot, which grows as needed."""

    sample: int
    slot: int = 0
    stored: AsStored | None = None
    offset = 0  # no field: an evaluation slot holds one video; `ReadClip` has an offset


@dataclass(frozen=True)
class Look:
    """Examine one file of a list, for a scan.

    Attributes:
        what: a level of `scan.file.LEVELS`, or "digest".
        known: the stamp of an earlier answer, or None.
        names: for "digest", the files of a folder that are hashed.
    """

    sample: int
    what: str
    known: Stamp | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class DumpVideo:
    """Store one video: `target` is the final path, `tmp` a folder on the same file system."""

    sample: int
    settings: DumpSettings
    target: str
    tmp: str


Task = ReadClip | ReadVideo | Look | DumpVideo


@dataclass(frozen=True, eq=False)
class Answer:
    """The result of a task. Bad media gives an answer, not an exception.

    Attributes:
        id: of the task.
        plan: of a clip or a video.
        views: plans of the further views of a `ReadClip`.
        stored: which bytes are in the slot, if stored bytes were requested and are available.
        refused: why the slot holds pixels although stored bytes were requested.
        repaired: what is wrong with a video that is shown with some frames repeated.
        result: result of a scan or a dump.
        missing: number of frames at the end of the video that do not decode.
        counters: the reader's counters since the last answer.
        reason: why the media cannot be read, "" if they can. `path` is the file that failed, if it is known.
        timeout, crashed: the task was given up because it was late, or because it ended two processes.
        user: the text of a `UserError`.
        bug: the traceback of any other error.
    """

    id: int
    plan: Plan | VideoPlan | None = None
    views: tuple[Plan, ...] = ()
    stored: Stored | None = None
    refused: str = ""
    repaired: str = ""
    result: Row = field(default_factory=dict)
    missing: int = 0
    counters: Counts | None = None
    path: str | None = None
    reason: str = ""
    timeout: bool = False
    crashed: bool = False
    user: str = ""
    bug: str = ""

    @property
    def ok(self) -> bool:
        """True if the task was done."""
        return not (self.reason or self.user or self.bug)

    @property
    def why(self) -> str:
        """The reason why the task was not done, in one line."""
        return self.reason or f"not expected: {self.bug.strip().splitlines()[-1]}"


def packed(message: object) -> bytes:
    """Return the bytes of a message."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def unpacked(data: bytes) -> Any:
    """Return the message in these bytes, which one of our own processes packed."""
    return pickle.loads(data)  # noqa: S301  only our own processes have this socket
