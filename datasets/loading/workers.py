"""Reader processes: `python -m datasets.loading.workers` serves requests until its input ends. Torch-free.

A worker takes one request at a time from the queue that all workers share (its standard input, a SEQPACKET socket: one
message per JSON line), draws, probes, resolves and reads into a shared slot, and sends one JSON line back. Before the
work it writes the request's id and the time into its row of the control block, so that the parent can see a late one.
It dies with its parent (PR_SET_PDEATHSIG), and leaves when the queue is closed.

Request: {"id", "slot", "offset", "kind": "train" | "eval", "epoch", "position", "sample"}, or "kind": "scan" with what
scan/file.py says, or "dump" with what dump/video.py says; with "encoded" and "room" the answer may be stored bytes
(dali/encoded.py) instead of pixels.
Answer:  {"id", "ok": true, <fields of the plan>} | {"id", "ok": false, "path", "reason"} | {"id", "ok": false, "bug"}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets.lists.records import Records
from datasets.loading.slots import Slot
from datasets.plan.facts import Facts
from datasets.plan.train import Plan, TrainSpec, draw, resolve
from datasets.plan.views import EvalSpec, VideoPlan, resolve_eval
from datasets.readers import open_reader
from datasets.readers.ending import EndsEarly, on_what_decodes
from datasets.readers.repair import read_what_decodes
from datasets.readers.spec import ReaderSpec
from utils.faults import MediaError, UserError
from utils.signals import end_with_parent

if TYPE_CHECKING:
    from datasets.scan.file import Examiner

MESSAGE_BYTES = 1 << 18


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a worker needs to know, as one JSON line in its arguments.

    Attributes:
        reader, train, eval: specs as JSON; an empty string where there is none.
        seed: of the run.
        repair: in an evaluation, show the nearest frame where one does not decode.
        records_fd, control_fd, slot_fds: inherited descriptors (unused by the inline desk).
        folder: working directory of the parent, which relative paths are relative to.
        parent: process id of the parent.
    """

    reader: str
    train: str
    eval: str
    seed: int
    repair: bool = False
    records_fd: int = -1
    control_fd: int = -1
    slot_fds: tuple[int, ...] = ()
    folder: str = "."
    parent: int = 0

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))


class Desk:
    """Answers requests: the work itself, the same inside a worker and inline."""

    def __init__(self, setup: Setup, records: Records, slots: list[Slot]) -> None:
        self.seed = setup.seed
        self.train = TrainSpec.from_json(setup.train) if setup.train else None
        self.eval = EvalSpec.from_json(setup.eval) if setup.eval else None
        self.repair = setup.repair
        self.records = records
        self.slots = slots
        self._spec = ReaderSpec.from_json(setup.reader)
        self.reader = open_reader(self._spec, records)
        self._examiner: Examiner | None = None

    def close(self) -> None:
        """Close the reader."""
        self.reader.close()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request; what the reader has counted meanwhile travels with the answer."""
        answer = self._answer(request)
        counters = getattr(self.reader, "counters", None)
        return answer | {"counters": counters()} if counters else answer

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Bad media is an answer, not an exception."""
        try:
            work = {"train": self._train, "eval": self._eval, "scan": self._scan, "dump": self._dump}[request["kind"]]
            fields = work(request)
        except MediaError as error:
            return {"id": request["id"], "ok": False, "path": error.path, "reason": error.reason}
        except UserError as error:
            return {"id": request["id"], "ok": False, "user": str(error)}
        except Exception:  # noqa: BLE001  the parent raises it with this traceback
            return {"id": request["id"], "ok": False, "bug": traceback.format_exc()}
        return {"id": request["id"], "ok": True, **fields}

    def _train(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.train is not None
        sample = request["sample"]
        spec, draws = self.train, draw(self.seed, request["epoch"], request["position"], self.train)

        def work(reader: Any) -> dict[str, Any]:
            facts = reader.probe(sample)
            plan = resolve(draws, facts, spec, sample)
            stored = self._stored(request, plan, facts)
            if not stored.get("files"):
                out = self.slots[request["slot"]].view(request["offset"], (len(plan.frames), *plan.size, 3))
                reader.read(sample, plan.frames, plan.box, plan.size, out)
            return plan_to_dict(plan) | stored

        fields, missing = on_what_decodes(self.reader, sample, work)
        return fields | {"missing": missing} if missing else fields

    def _stored(self, request: dict[str, Any], plan: Plan | VideoPlan, facts: Facts) -> dict[str, Any]:
        """The bytes of a clip for a decoder on the device, where the request wants them; see encoded.pack."""
        if not request.get("encoded"):
            return {}
        from datasets.dali.encoded import pack

        slot, box = self.slots[request["slot"]], plan.box if isinstance(plan, Plan) else None
        reader: Any = self.reader  # an EncodedReader, maybe behind a cache of facts
        room, without = request["room"], request.get("without", ())
        return pack(reader, plan.sample, plan.frames, box, facts, slot, request["offset"], room, without)

    def _scan(self, request: dict[str, Any]) -> dict[str, Any]:
        from datasets.scan.file import Examiner

        if self._examiner is None:
            self._examiner = Examiner(self._spec, self.records)
        return self._examiner.answer(request)

    def _dump(self, request: dict[str, Any]) -> dict[str, Any]:
        from datasets.dump.video import Dumper

        return Dumper(self.records, self._spec.missing_share).answer(request)

    def _eval(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.eval is not None
        sample = request["sample"]
        fields, missing = on_what_decodes(self.reader, sample, lambda reader: self._eval_with(reader, request))
        return fields | {"missing": missing} if missing else fields

    def _eval_with(self, reader: Any, request: dict[str, Any]) -> dict[str, Any]:
        """Plan and read one video with a reader."""
        assert self.eval is not None
        sample, slot = request["sample"], self.slots[request["slot"]]
        facts = reader.probe(sample)
        plan = resolve_eval(facts, self.eval, sample)
        stored = self._stored(request, plan, facts)
        if stored.get("files"):
            return plan_to_dict(plan) | stored | {"repaired": ""}
        shape = (len(plan.frames), *plan.size, 3)
        slot.grow(int(np.prod(shape)))
        out, repaired = slot.view(0, shape), ""
        try:
            reader.read(sample, plan.frames, None, plan.size, out)
        except EndsEarly:
            raise
        except MediaError as error:
            if not self.repair:
                raise
            plan = dataclasses.replace(plan, frames=read_what_decodes(reader, plan, out, error))
            repaired = error.reason
        return plan_to_dict(plan) | stored | {"repaired": repaired}


def plan_to_dict(plan: Plan | VideoPlan) -> dict[str, Any]:
    """A plan as plain values; floats survive JSON exactly."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


def video_plan(answer: dict[str, Any]) -> VideoPlan:
    """The inverse of `plan_to_dict` for the plan of a video."""
    return VideoPlan(
        sample=answer["sample"],
        frames=np.array(answer["frames"], np.int64),
        size=(answer["size"][0], answer["size"][1]),
        clip_rows=np.array(answer["clip_rows"], np.int64),
        boxes=np.array(answer["boxes"], np.int64),
        flips=np.array(answer["flips"], bool),
    )


def _serve(desk: Desk, queue: socket.socket, out: socket.socket, control: np.ndarray) -> None:
    out.send(b'{"ready": true}\n')
    while True:
        message = queue.recv(MESSAGE_BYTES)
        if not message:  # the parent closed the queue or is gone
            return
        request = json.loads(message)
        control[1] = time.monotonic_ns()
        control[0] = request["id"]
        answer = desk.answer(request)
        control[0] = 0
        out.send(json.dumps(answer).encode() + b"\n")


def main(setup_json: str, row: str) -> None:
    """Run one worker; `row` is its line in the control block."""
    values = json.loads(setup_json)
    setup = Setup(**{**values, "slot_fds": tuple(values["slot_fds"])})
    spec = ReaderSpec.from_json(setup.reader)
    if spec.kind == "dali":  # DALI runs beside the model, never in a reader process
        setup = dataclasses.replace(setup, reader=dataclasses.replace(spec, kind="encoded").to_json())
    end_with_parent(setup.parent, signal.SIGKILL)()
    import cv2

    cv2.setNumThreads(0)  # one worker is one core
    queue = socket.socket(fileno=os.dup(0))
    out = socket.socket(fileno=os.dup(1))
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    os.chdir(setup.folder)
    control = Slot(setup.control_fd).view(int(row) * 16, (2,), np.int64)
    desk = Desk(setup, Records.from_fd(setup.records_fd), [Slot(fd) for fd in setup.slot_fds])
    try:
        _serve(desk, queue, out, control)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    finally:
        desk.close()
        queue.close()
        out.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
