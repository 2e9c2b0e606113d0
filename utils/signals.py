"""Turn signals into flags that ask a run to stop, and end processes whose parent has died.

A handler only sets a flag; the ranks agree on the flag at a step boundary. This is a file separate from `errors`,
because what a handler may do must be short enough to check (docs/decisions.md).

How a process ends with its parent:

- A process that we start and that must not outlive us (a reader, torchrun) asks the kernel for a signal at our death:
  `end_with_parent`. Linux sends it when the *thread* that forked ends, so such a process must start from a thread that
  lives as long as this process. `on_lasting_thread` does that.
- torchrun or slurmstepd starts a rank, from threads that we do not know. `follow_launcher` polls the process ids
  instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import ClassVar, TypeVar

from utils import processes

ASKS_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
LAUNCHER = "ZOETROPE_LAUNCHER"  # "<process id> <start in clock ticks>" of the launcher that started torchrun

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_LOOK_SECONDS = 0.25
_ORPHAN_SECONDS = 6.0  # for an orphaned rank to finish its step and save; the rank is gone within 10 s

Result = TypeVar("Result")


class StopFlag:
    """The reason why this process should stop, if any: the name of a signal, or an error of the process.

    A handler never saves anything itself: it may run in the middle of an optimiser step (Lightning #21406 is that bug).
    A second Ctrl-C ends the process at once, as the default handler would.

    Args:
        announce: text for stderr at the first Ctrl-C, written even while a long operator delays Python's handler.
    """

    #: True once a flag has taken over the signals in this process: its start is then over.
    was_used: ClassVar[bool] = False

    def __init__(self, announce: str | None = None) -> None:
        self.name: str | None = None
        self.trouble: str | None = None
        self.announce = announce
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._wakeup: tuple[int, int] | None = None  # our pipe's write end, and the descriptor that was set before

    def __enter__(self) -> StopFlag:
        """Take over the signals. Call this in the main thread, after worker processes have started.

        A closed terminal (SIGHUP) stops a run, unless it was started to continue without one (`nohup`).
        """
        StopFlag.was_used = True
        if self.announce is not None:
            self._listen(self.announce)

        for number in ASKS_TO_STOP:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._wakeup is not None:
            write_end, before = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(write_end)  # the thread reads the end of the pipe and closes the other end

    def ask(self, reason: str | None) -> None:
        """Stop because of an error of this process, as if a signal had come. None leaves the flag unchanged.

        Args:
            reason: completes the sentence "stopped by ...".
        """
        if reason is not None and self.name is None:
            self.name = self.trouble = reason

    def _notice(self, number: int, frame: FrameType | None) -> None:
        # The second Ctrl-C: let the default handler end the process.
        if number == signal.SIGINT and self.name == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.name = signal.Signals(number).name

    def _listen(self, text: str) -> None:
        """Write `text` from a thread, because Python runs a handler only between two operators."""
        read_end, write_end = os.pipe()

        os.set_blocking(write_end, False)  # Python requires it: the handler in C must never wait
        before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self._wakeup = write_end, before

        def write() -> None:
            with open(read_end, "rb", buffering=0) as pipe:
                while numbers := pipe.read(64):
                    if signal.SIGINT in numbers:
                        with contextlib.suppress(OSError):
                            os.write(2, f"{text}\n".encode())
                        break
                while pipe.read(64):  # keep reading: the kernel drops the bytes of later signals if the pipe is full
                    pass

        threading.Thread(target=write, name="stop announcement", daemon=True).start()

    @property
    def received(self) -> bool:
        """True once this process has received a signal, or `ask` was called with a reason."""
        return self.name is not None


def stop_announcement() -> str | None:
    """Return the line for a Ctrl-C at a terminal; None under a launcher or on another rank, which print theirs."""
    if "ZOETROPE_EXIT_FILE" in os.environ or os.environ.get("RANK", "0") != "0" or "SLURM_PROCID" in os.environ:
        return None
    return "stopping: this run saves its state and leaves; press Ctrl-C again to end it immediately"


# ---------------------------------------------------------------- with the parent


def end_with_parent(parent: int, number: signal.Signals) -> Callable[[], None]:
    """Return a function that ties the calling process to its parent; call it in the child, before or after exec.

    Args:
        parent: process id of the parent. If it has died by the time of the call, the process ends at once.
        number: the signal to receive when the thread that forked this process ends.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

    def tie() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it died before the request reached the kernel
            os._exit(1)

    return tie


_lasting: dict[int, ThreadPoolExecutor] = {}


def on_lasting_thread(action: Callable[[], Result]) -> Result:
    """Run `action` on a thread that lives until this process exits, and return its result.

    Children that `action` starts then outlive the calling thread and still die with the process.
    """
    if os.getpid() not in _lasting:  # a forked child has the object, but not the thread
        _lasting.clear()
        _lasting[os.getpid()] = ThreadPoolExecutor(1, "process starter")
    return _lasting[os.getpid()].submit(action).result()


def launcher_variable() -> dict[str, str]:
    """Return the environment that lets ranks follow this process."""
    return {LAUNCHER: f"{os.getpid()} {processes.start_ticks(os.getpid())}"}


_following = threading.Lock()


def follow_launcher(env: Mapping[str, str] | None = None) -> None:
    """End this rank within 10 s of the death of its starter: torchrun, our launcher or the SLURM step.

    The rank then sends itself SIGTERM, so that it can finish its step and save, and SIGKILL 6 seconds later. A process
    that no launcher started is not affected. Call this early; further calls have no effect.
    """
    env = os.environ if env is None else env
    parent, is_torchrun = os.getppid(), "TORCHELASTIC_RUN_ID" in env
    is_task = "SLURM_STEP_ID" in env and processes.command(parent) in ("slurmstepd", "slurmd")
    # The lock is taken once and never released: one thread per process is enough.
    if not (is_torchrun or is_task) or not _following.acquire(blocking=False):
        return

    pid, ticks = (int(word) for word in env.get(LAUNCHER, "0 0").split())

    def is_orphan() -> bool:
        # A pid can be reused, its start time cannot.
        return os.getppid() != parent or (ticks > 0 and processes.start_ticks(pid) != ticks)

    # The parent may have died before we asked for its id. Then `parent` is the process that adopted us.
    grandparent_is_other = ticks > 0 and is_torchrun and processes.parent(parent) != pid
    if grandparent_is_other or processes.command(parent) == "slurmd" or _is_plain_init(parent) or is_orphan():
        os._exit(1)

    def follow() -> None:
        while not is_orphan():
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ORPHAN_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, name="follow launcher", daemon=True).start()


def _is_plain_init(parent: int) -> bool:
    """Return True if process 1 is our parent and no launcher; in a container torchrun itself may be process 1."""
    if parent != 1:
        return False
    command = " ".join(processes.argv_of(1))
    return not any(launcher in command for launcher in ("python", "torch", "slurmstepd"))
