"""Run the reader processes from the parent's side: submit tasks, collect answers, replace workers that hang or die.

All workers take tasks from one shared queue, so a slow video never delays the tasks behind it. A worker whose task
exceeds the deadline is killed and replaced, and the task fails. A worker that dies by itself is replaced. Its task is
retried once, then it fails. `Inline` does the same work in this process (`workers: 0`), without a deadline.

Workers that do not start (no memory, a stalled file system, a damaged installation) do not end a run at once. `trouble`
then holds the reason, no further worker is started, and the remaining workers serve. If none remains, this process
reads the tasks itself, so that a training step can be completed and saved.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from datasets.loading.messages import MESSAGE_BYTES, Answer, Task, packed, unpacked
from datasets.loading.slots import Slot
from datasets.loading.workers import ReadHandler, Setup
from utils.errors import UserError
from utils.signals import on_lasting_thread

if TYPE_CHECKING:
    from datasets.lists.records import Records

_ROOT = Path(__file__).resolve().parents[2]
#: The trainer handles the signals of a job. A worker killed by one would look like a broken video.
_JOB_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
_LOOK_SECONDS = 0.25  # between two checks of the workers
_STALL_SECONDS = 2.0  # all workers idle with tasks pending: longer than any gap between taking and noting a task
_START_SECONDS = 120.0  # for the imports of a worker, which a busy file system delays
_START_FAILURES = 3  # in a row, before the pool stops starting workers
_AHEAD = 4  # tasks in flight per process in `each`

T = TypeVar("T", bound=Task)


class Inline:
    """Do tasks in this process, one at a time and in order."""

    trouble: str | None = None

    def __init__(self, setup: Setup, records: Records, slots: list[Slot]) -> None:
        self._handler = ReadHandler(setup, records, slots)
        self._waiting: collections.deque[tuple[int, Task]] = collections.deque()
        self._current: int | None = None

    def submit(self, number: int, task: Task) -> None:
        """See `Pool`."""
        self._waiting.append((number, task))

    def answers(self) -> list[Answer]:
        """See `Pool`."""
        if not self._waiting:
            return []
        self._current, task = self._waiting.popleft()
        answer = self._handler.answer(self._current, task)
        self._current = None
        return [answer]

    def ready(self) -> list[Answer]:
        """Return nothing: a task is read only when the loader waits for it."""
        return []

    def busy(self) -> list[int]:
        """See `Pool`."""
        return [] if self._current is None else [self._current]

    def close(self) -> None:
        """See `Pool`."""
        self._waiting.clear()
        self._handler.close()


def each(
    setup: Setup, records: Records, tasks: Sequence[T], workers: int, deadline: float
) -> Iterator[tuple[T, Answer]]:
    """Do tasks in reader processes. Yield each with its answer as soon as it is done.

    Raises:
        UserError: a task is invalid in itself, or no process starts.
    """
    if not tasks:
        return

    pool = Pool(setup, records, [], min(workers, len(tasks)), deadline)
    try:
        ahead, under_way = iter(enumerate(tasks, start=1)), {}
        while True:
            # Keep the queue short: tasks may be many, and each one pending is held in memory.
            for number, task in itertools.islice(ahead, _AHEAD * workers - len(under_way)):
                under_way[number] = task
                pool.submit(number, task)
            if not under_way:
                return

            for answer in pool.answers():
                if answer.user:
                    raise UserError(answer.user)
                yield under_way.pop(answer.id), answer
    finally:
        pool.close()


class _Worker:
    """One reader process, its socket for answers and its row of the control block."""

    def __init__(self, row: int, process: subprocess.Popen[bytes], answers: socket.socket, control: np.ndarray) -> None:
        self.row = row
        self.process = process
        self.answers = answers
        self.control = control
        self.ready = False
        self.born = time.monotonic()

    def busy_with(self) -> tuple[int, float]:
        """Return the id of the current task (0 if idle) and the seconds that it has taken."""
        while True:
            current = int(self.control[0])
            seconds = (time.monotonic_ns() - int(self.control[1])) / 1e9
            # The worker writes time and id without a lock. Read again if it changed tasks in between.
            if current == int(self.control[0]):
                return current, seconds

    def end(self) -> None:
        """Kill and reap the process, and close its socket."""
        self.process.kill()
        self.process.wait()
        self.answers.close()


class Pool:
    """A fixed number of reader processes. They end when this process ends, for any reason.

    Args:
        setup: the workers' setup; descriptors, folder and parent are filled in here.
        records: shared with the workers, not copied.
        slots: shared memory that tasks refer to by index.
        workers: number of processes.
        deadline: seconds that one task may take.
        stand_in: read the tasks in this process if no worker starts; else `answers` raises UserError.

    Attributes:
        trouble: why this pool should be replaced soon (its workers do not start), or None.
    """

    def __init__(
        self,
        setup: Setup,
        records: Records,
        slots: list[Slot],
        workers: int,
        deadline: float,
        *,
        stand_in: bool = False,
    ) -> None:
        self.deadline = deadline
        self.restarts = 0
        self.trouble: str | None = None

        self._stand_in = stand_in
        self._inline: Inline | None = None
        self._pending: dict[int, Task] = {}  # submitted, not answered
        self._unsent: collections.deque[int] = collections.deque()  # pending, not yet in the queue
        self._crashed: set[int] = set()  # tasks that ended a worker once
        self._start_failures = 0
        self._quiet_since = time.monotonic()  # last time that a worker was known to have work

        # Two int64 per worker: id of its task, and the time when it took the task.
        self._control = Slot.create("zoetrope-control", workers * 16)
        self._records = records  # they own the descriptor that workers inherit
        self._records_fd = records.share()
        self._slots = slots
        self._setup = dataclasses.replace(
            setup,
            control_fd=self._control.fd,
            records_fd=self._records_fd,
            slot_fds=tuple(slot.fd for slot in slots),
            folder=os.getcwd(),
            parent=os.getpid(),
        )

        # SEQPACKET keeps message boundaries, so several processes can read one queue without a lock.
        self._queue, self._queue_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._queue.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []

        try:
            for row in range(workers):
                self._add(row)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, number: int, task: Task) -> None:
        """Queue one task under a positive number that was not used before."""
        self._pending[number] = task
        self._unsent.append(number)
        self._send()

    def answers(self) -> list[Answer]:
        """Wait for an answer to a submitted task, and return all answers that have arrived."""
        done: list[Answer] = []
        self._quiet_since = time.monotonic()

        while self._pending and not done:
            if not self._workers:
                # Return at once after each task here, so that the loader can use what is ready.
                return [self._answer_here()]

            self._send()
            for key, _ in self._selector.select(_LOOK_SECONDS):
                if isinstance(key.data, _Worker):
                    done += self._receive(key.data)

            for worker in list(self._workers):
                done += self._check(worker)
            # Only a round without any answer can mean that a task was lost.
            if not done:
                done += self._resubmit_lost()
        return done

    def ready(self) -> list[Answer]:
        """Return the answers that have arrived, without waiting."""
        self._send()
        return [answer for worker in list(self._workers) for answer in self._receive(worker)]

    def busy(self) -> list[int]:
        """Return the numbers of the tasks that are being read now. Safe from any thread."""
        here = self._inline.busy() if self._inline else []
        return here + [current for current, _ in (worker.busy_with() for worker in list(self._workers)) if current]

    def close(self) -> None:
        """Stop at once. Workers hold nothing that needs an orderly shutdown."""
        # Kill all before reaping any, so that they exit in parallel.
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.end()

        self._workers.clear()
        self._selector.close()
        self._queue.close()
        self._queue_end.close()
        self._control.close()
        if self._inline is not None:
            self._inline.close()

    def _add(self, row: int) -> None:
        """Start a worker for this row of the control block. Retry until `trouble` is set."""
        while self.trouble is None:
            try:
                self._workers.append(self._start(row))
                return
            except OSError as error:
                self._note_failed_start(error.strerror or str(error))

    def _note_failed_start(self, why: str) -> None:
        self._start_failures += 1
        if self._start_failures >= _START_FAILURES and self.trouble is None:
            self.trouble = f"reader processes that do not start ({self._start_failures} in a row, the last: {why})"

    def _start(self, row: int) -> _Worker:
        control = self._control.view(row * 16, (2,), np.int64)
        control[:] = 0

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Sent before the process exists: the socket buffers it, and the worker reads it first.
        ours.send(packed(dataclasses.replace(self._setup, row=row)))

        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        fds = (self._control.fd, self._records_fd, *(slot.fd for slot in self._slots))

        def start() -> subprocess.Popen[bytes]:
            """Start one reader process, deaf to the signals of the job."""
            signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)  # inherited, so it holds from the first moment
            return subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "datasets.loading.workers"],
                stdin=self._queue_end.fileno(),
                stdout=theirs.fileno(),
                pass_fds=fds,
                cwd=_ROOT,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )

        try:
            with theirs:
                process = on_lasting_thread(start)  # a worker dies with the thread that forks it
        except OSError:
            ours.close()
            raise

        worker = _Worker(row, process, ours, control)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _replace(self, worker: _Worker) -> list[Answer]:
        """End a worker and return the answers that it had sent. Start another one unless `trouble` is set."""
        worker.process.kill()
        worker.process.wait()
        # Read after its end, so that no answer is lost and none can arrive later.
        last = self._receive(worker)
        self._selector.unregister(worker.answers)
        worker.end()
        self._workers.remove(worker)

        self.restarts += 1
        self._add(worker.row)
        return last

    def _send(self) -> None:
        while self._unsent:
            number = self._unsent[0]
            task = self._pending.get(number)
            if task is not None:  # else it failed or was answered before it was sent again
                try:
                    self._queue.send(packed((number, task)))
                except BlockingIOError:
                    return  # the queue is full; the workers have plenty to do
            self._unsent.popleft()

    def _receive(self, worker: _Worker) -> list[Answer]:
        """Return the answers of a worker that have arrived. Leave out ids that are no longer pending."""
        done: list[Answer] = []
        while True:
            try:
                message = worker.answers.recv(MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except (BlockingIOError, ConnectionResetError):
                return done
            if not message:
                return done

            answer: Answer | None = unpacked(message)
            if answer is None:  # the first message: the worker is ready
                worker.ready = True
                self._start_failures = 0
            elif self._pending.pop(answer.id, None) is not None:
                done.append(answer)

    def _check(self, worker: _Worker) -> list[Answer]:
        """Replace a worker that is late or dead, and return the answers that result."""
        code = worker.process.poll()
        if code is not None:
            return self._on_exit(worker, code)

        current, seconds = worker.busy_with()
        if current and seconds > self.deadline:
            done = self._replace(worker)
            if current in self._pending:
                done.append(self._fail(current, f"took longer than {self.deadline:g} s", timeout=True))
            return done

        if not worker.ready and time.monotonic() - worker.born > _START_SECONDS:
            why = f"process {worker.process.pid} was not ready after {_START_SECONDS:g} s"
            self.trouble = self.trouble or f"reader processes that do not start ({why})"
            return self._on_exit(worker, None)
        return []

    def _on_exit(self, worker: _Worker, code: int | None) -> list[Answer]:
        """Replace a worker that ended by itself, or (code None) that never became ready.

        Its task is retried once. If that ends a worker too, the file is at fault.
        """
        # It ended before it was ready and without a task: a failed start, for which no file is to blame.
        if code is not None and not worker.ready and not int(worker.control[0]):
            self._note_failed_start(_end_in_words(code))

        current, _ = worker.busy_with()
        done = self._replace(worker)

        if current in self._pending:
            if current in self._crashed:
                reason = f"reading it ended the reader process twice ({_end_in_words(code)})"
                done.append(self._fail(current, reason, crashed=True))
            else:
                self._crashed.add(current)
                # At the front: a training step may wait for this task.
                self._unsent.appendleft(current)
        return done

    def _fail(self, number: int, reason: str, *, timeout: bool = False, crashed: bool = False) -> Answer:
        """Return the answer of a task that is given up."""
        self._pending.pop(number)
        return Answer(number, reason=reason, timeout=timeout, crashed=crashed)

    def _answer_here(self) -> Answer:
        """Read the oldest task in this process, because no worker is left and none starts."""
        if not self._stand_in:
            raise UserError(
                f"stopped by {self.trouble}; look at free memory, at the limit of processes and at the file system of "
                "the code (`python main.py doctor` does), then run the same command again"
            )

        if self._inline is None:
            self._inline = Inline(self._setup, self._records, self._slots)
        number = min(self._pending)
        self._inline.submit(number, self._pending.pop(number))
        return self._inline.answers()[0]

    def _resubmit_lost(self) -> list[Answer]:
        """Submit lost tasks again: a worker died between taking a task and noting its id, so all workers idle.

        All workers are replaced before those tasks are sent again, so that none of them can still write into a slot.
        """
        now = time.monotonic()
        if self._unsent or any(not worker.ready or worker.busy_with()[0] for worker in self._workers):
            self._quiet_since = now
        elif now - self._quiet_since > _STALL_SECONDS:
            done = [answer for worker in list(self._workers) for answer in self._replace(worker)]
            self._unsent.extend(sorted(self._pending))
            self._quiet_since = now
            return done
        return []


#: The service that reads for a loader: processes, or this process.
Service = Pool | Inline


def _end_in_words(code: int | None) -> str:
    """Return how a process ended: `exit code 3` or `ended by SIGKILL`."""
    if code is None:
        return "it was never ready"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
