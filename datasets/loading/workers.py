"""Run a reader process: `python -m datasets.loading.workers` serves tasks until its input ends. Torch-free.

A worker takes one task at a time from the queue that all workers share (its standard input, a SEQPACKET socket). It
draws, probes, resolves and reads into a shared slot, and sends an answer back (messages.py). Its first message is its
`Setup`, on the socket for answers. Before each task it writes the task's id and the time into its row of the control
block, so that the parent can detect a late task. It dies with its parent (PR_SET_PDEATHSIG), and exits when the queue
is closed.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import socket
import time
import traceback
from typing import TYPE_CHECKING

import numpy as np

from datasets.lists.records import Records
from datasets.loading.messages import (
    MESSAGE_BYTES,
    Answer,
    DumpVideo,
    Look,
    ReadClip,
    ReadVideo,
    Task,
    packed,
    unpacked,
)
from datasets.loading.slots import Slot
from datasets.plan.train import TrainSpec, draw, resolve
from datasets.plan.views import EvalSpec, resolve_eval
from datasets.readers import open_reader
from datasets.readers.ending import EndsEarly, on_what_decodes
from datasets.readers.repair import read_what_decodes
from datasets.readers.resize import place
from datasets.readers.spec import Reader, ReaderSpec
from utils.errors import MediaError, UserError
from utils.signals import end_with_parent

if TYPE_CHECKING:
    from datasets.plan.crops import Box
    from datasets.plan.train import Plan
    from datasets.scan.file import Examiner

_WHOLE_BYTES = 1 << 28  # largest size of whole frames that a process keeps to cut several views from them


@dataclasses.dataclass(frozen=True)
class Setup:
    """The setup of a worker, its first message.

    Attributes:
        reader: kind and options of the reader.
        train, eval: which clips or views; None if not used.
        seed: of the run.
        repair: in an evaluation, show the nearest frame if one does not decode.
        records_fd, control_fd, slot_fds: inherited descriptors (unused inline).
        row: of the control block.
        folder: working directory of the parent, which relative paths are relative to.
        parent: process id of the parent.
    """

    reader: ReaderSpec
    train: TrainSpec | None = None
    eval: EvalSpec | None = None
    seed: int = 0
    repair: bool = False
    records_fd: int = -1
    control_fd: int = -1
    slot_fds: tuple[int, ...] = ()
    row: int = 0
    folder: str = "."
    parent: int = 0


class ReadHandler:
    """Do tasks: the work itself, the same inside a worker and inline."""

    def __init__(self, setup: Setup, records: Records, slots: list[Slot]) -> None:
        self.setup = setup
        self.records = records
        self.slots = slots
        self.reader = open_reader(setup.reader, records)
        self._examiner: Examiner | None = None

    def close(self) -> None:
        """Close the reader."""
        self.reader.close()

    def answer(self, number: int, task: Task) -> Answer:
        """Do one task. The answer carries the reader's counters since the last one."""
        work = {ReadClip: self._clip, ReadVideo: self._video, Look: self._look, DumpVideo: self._dump}[type(task)]
        missing = 0

        try:
            if isinstance(task, ReadClip | ReadVideo):
                answer, missing = on_what_decodes(self.reader, task.sample, lambda reader: work(number, task, reader))
            else:
                answer = work(number, task)
        except MediaError as error:
            answer = Answer(number, path=error.path, reason=error.reason)
        except UserError as error:
            answer = Answer(number, user=str(error))
        except Exception:  # noqa: BLE001  the parent raises it with this traceback
            answer = Answer(number, bug=traceback.format_exc())

        counters = getattr(self.reader, "counters", None)
        if not missing and not counters:
            return answer
        # Rebuild the answer only if there is something to add: most answers have neither.
        return dataclasses.replace(answer, missing=missing, counters=counters() if counters else None)

    def _clip(self, number: int, task: ReadClip, reader: Reader) -> Answer:
        """Plan and read a training clip with a reader, with its further views."""
        spec = self.setup.train
        assert spec is not None

        # Further views draw their own crops and flips, but the frames of the first view.
        first = task.position if task.frames_of is None else task.frames_of
        places = ((task.position, task.offset), *task.views)
        draws = [draw(self.setup.seed, task.epoch, position, spec, frames_of=first) for position, _ in places]
        metadata = reader.probe(task.sample)
        plan, *views = (resolve(drawn, metadata, spec, task.sample) for drawn in draws)

        answer = Answer(number, plan, tuple(views))
        if task.stored is not None:
            answer = self._stored(answer, task, plan.box)
        # No stored bytes were requested, or they were refused: read pixels.
        if answer.stored is None:
            shape = (len(plan.frames), *plan.size, 3)
            outs = [self.slots[task.slot].view(offset, shape) for _, offset in places]
            whole = (len(plan.frames), metadata.height, metadata.width, 3)
            # Views of the same frames are cut from one decode, unless the whole frames take too much memory.
            if views and math.prod(whole) <= _WHOLE_BYTES:
                _cut(reader, np.empty(whole, np.uint8), [plan, *views], outs)
            else:
                for one, out in zip((plan, *views), outs, strict=True):
                    reader.read(one.sample, one.frames, one.box, one.size, out)
        return answer

    def _video(self, number: int, task: ReadVideo, reader: Reader) -> Answer:
        """Plan and read one video of an evaluation with a reader."""
        spec, slot = self.setup.eval, self.slots[task.slot]
        assert spec is not None
        plan = resolve_eval(reader.probe(task.sample), spec, task.sample)

        answer = Answer(number, plan)
        if task.stored is not None:
            answer = self._stored(answer, task, None)
            if answer.stored is not None:
                return answer

        shape = (len(plan.frames), *plan.size, 3)
        slot.grow(int(np.prod(shape)))
        out = slot.view(0, shape)
        try:
            reader.read(task.sample, plan.frames, None, plan.size, out)
        except EndsEarly:
            raise  # `on_what_decodes` plans again for the shorter video
        except MediaError as error:
            if not self.setup.repair:
                raise
            shown = dataclasses.replace(plan, frames=read_what_decodes(reader, plan, out, error))
            return dataclasses.replace(answer, plan=shown, repaired=error.reason)
        return answer

    def _stored(self, answer: Answer, task: ReadClip | ReadVideo, box: Box | None) -> Answer:
        """Put the stored bytes of a clip into the slot, for a decoder on the device, or record why not."""
        from datasets.dali.encoded import pack

        assert answer.plan is not None
        assert task.stored is not None
        return dataclasses.replace(
            answer, **pack(self.reader, answer.plan, box, self.slots[task.slot], task.offset, task.stored)
        )

    def _look(self, number: int, task: Look) -> Answer:
        # Imported only here: readers of training clips do not need the scan.
        from datasets.scan.file import Examiner

        if self._examiner is None:
            self._examiner = Examiner(self.setup.reader, self.records)
        return Answer(number, result=self._examiner.answer(task))

    def _dump(self, number: int, task: DumpVideo) -> Answer:
        from datasets.dump.video import Dumper

        return Answer(number, result=Dumper(self.records, self.setup.reader.missing_share).answer(number, task))


def _cut(reader: Reader, whole: np.ndarray, plans: list[Plan], outs: list[np.ndarray]) -> None:
    """Read the frames of several views at once into `whole` (T, H, W, 3), and cut each view from them."""
    size = whole.shape[1:3]
    reader.read(plans[0].sample, plans[0].frames, None, size, whole)
    for plan, out in zip(plans, outs, strict=True):
        for image, row in zip(whole, out, strict=True):
            place(image, plan.box, size, row)


def _serve(handler: ReadHandler, queue: socket.socket, out: socket.socket, control: np.ndarray) -> None:
    out.send(packed(None))  # ready
    while message := queue.recv(MESSAGE_BYTES):  # empty: the parent closed the queue or is gone
        number, task = unpacked(message)

        # Time before id: the parent judges a task late only once its id is there.
        control[1] = time.monotonic_ns()
        control[0] = number
        answer = handler.answer(number, task)
        control[0] = 0

        out.send(packed(answer))


def main() -> None:
    """Run one worker."""
    queue = socket.socket(fileno=os.dup(0))
    out = socket.socket(fileno=os.dup(1))
    os.dup2(2, 1)  # output of libraries must not get between the answers

    setup: Setup = unpacked(out.recv(MESSAGE_BYTES))
    if setup.reader.kind == "dali":  # DALI runs alongside the model; a reader process only reads stored bytes
        setup = dataclasses.replace(setup, reader=dataclasses.replace(setup.reader, kind="encoded"))

    # Before cv2 is imported, which is slow, so that no orphan is left if the parent dies during the start.
    end_with_parent(setup.parent, signal.SIGKILL)()
    import cv2

    cv2.setNumThreads(0)  # one worker is one core
    os.chdir(setup.folder)

    control = Slot(setup.control_fd).view(setup.row * 16, (2,), np.int64)
    handler = ReadHandler(setup, Records.from_fd(setup.records_fd), [Slot(fd) for fd in setup.slot_fds])

    try:
        _serve(handler, queue, out, control)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    finally:
        handler.close()
        queue.close()
        out.close()


if __name__ == "__main__":
    main()
