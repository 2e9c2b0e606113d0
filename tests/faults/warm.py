"""Run verbs of main.py in forked children of a process that has imported everything: a start costs milliseconds.

The parent must not have computed with torch: its threads would not exist in the child. Children use one thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import io
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

SECONDS = 180.0  # of one command
_MODULES = (
    *("main", "anal_tools.evaluate", "anal_tools.evaluate.result_parts", "torch.utils.tensorboard"),
    *(
        "datasets.dump.verb",
        "datasets.dump.write",
        "datasets.loading.eval",
        "datasets.loading.loader",
        "datasets.loading.workers",
    ),
    *("datasets.scan.page", "datasets.scan.verb", "methods", "methods.interop", "methods.tsm", "methods.tsn"),
    *("utils.checkpoint", "utils.view_batches", "utils.engine.setup"),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of one command.

    Attributes:
        code: its exit code; negative for a signal, as subprocess has it.
        out, err: its output.
        seconds: wall-clock time.
    """

    code: int
    out: str
    err: str
    seconds: float

    @property
    def has_trace(self) -> bool:
        """True if an exception came through, in whatever thread."""
        return "Traceback (most recent call last)" in self.out + self.err

    @property
    def errors(self) -> list[str]:
        """The lines on stderr."""
        return self.err.split("\n")[:-1]


def warm() -> None:
    """Import what the verbs use, so that children need not."""
    for name in _MODULES:
        with contextlib.suppress(ImportError):  # an optional library
            importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def forked(action: Callable[[], int], folder: Path, *, seconds: float = SECONDS) -> Outcome:
    """Call a function in a child process and return how it ended.

    Args:
        action: returns an exit code.
        folder: where the output of the child is kept meanwhile.
        seconds: after which the child is killed.
    """
    gc.collect()
    out, err = folder / "out.txt", folder / "err.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a watching thread of the parent does not matter
        child = os.fork()
    if child == 0:
        _be_child(action, out, err)
    status = None
    while time.monotonic() - began < seconds:
        pid, ended = os.waitpid(child, os.WNOHANG)
        if pid:
            status = ended
            break
        time.sleep(0.005)
    if status is None:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    output, errors = (path.read_text("utf-8", "replace") for path in (out, err))
    return Outcome(code, output, errors, time.monotonic() - began)


def _be_child(action: Callable[[], int], out: Path, err: Path) -> None:
    code = 70
    try:
        for number, path in ((1, out), (2, err)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
        code = action()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001  the end of a process: as the interpreter would
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def verb(argv: Sequence[str], folder: Path, prepare: Callable[[], object] | None = None) -> Outcome:
    """Run `main.py ARGV` in a child; `prepare` is called in the child before."""

    def action() -> int:
        import main

        if prepare is not None:
            prepare()
        return main.main(list(argv))

    return forked(action, folder)
