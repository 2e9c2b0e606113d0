"""The process in which one target parses its inputs; `runner.py` starts and watches it."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz import runner

#: Audit events of things that no parser may do.
WATCHED = (
    "compile", "exec", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.startfile",
    "pty.spawn", "subprocess.Popen", "pickle.find_class", "marshal.load", "marshal.loads", "code.__new__",
    "ctypes.dlopen", "webbrowser.open", "ftplib.connect", "http.client.connect", "urllib.Request",
    "shutil.rmtree", "os.remove", "os.rename", "os.chmod", "os.symlink", "os.link",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RESET_PEAK = "5"  # see clear_refs in proc(5)


class Sentry:
    """An audit hook that notes forbidden events while it is on.

    Args:
        folder: the one place where files may be written.
        expected: events that the target's own `run` causes.
    """

    def __init__(self, folder: Path, expected: frozenset[str]) -> None:
        self.folder = os.path.realpath(folder)
        self.expected = expected
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event in self.expected:
            return
        if event == "open":
            self._opened(*arguments)
        elif (event in WATCHED or event.startswith("socket.")) and not self._is_harmless(event, arguments):
            self.seen.append(f"{event} {arguments!r:.300}")

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if not isinstance(flags, int) or not flags & _WRITING or isinstance(path, int):
            return
        full = os.path.realpath(os.fsdecode(path))
        if full != os.devnull and not (full + "/").startswith(self.folder + "/"):
            self.seen.append(f"open for writing {full!r:.300}")

    def _is_harmless(self, event: str, arguments: tuple[Any, ...]) -> bool:
        """Return True for a late import, for text that is parsed but not run, and for changes in our own folder."""
        if event in ("os.remove", "os.rename", "os.chmod", "os.symlink", "os.link", "shutil.rmtree"):
            named = [word for word in arguments if isinstance(word, (str, bytes, os.PathLike))]
            numbers = [word for word in arguments if isinstance(word, int) and word >= 0]
            # shutil.rmtree names the files in a folder by the folder's descriptor.
            base = os.readlink(f"/proc/self/fd/{numbers[-1]}") if event == "os.remove" and numbers else os.getcwd()
            # os.link and os.symlink may name a source elsewhere, never a target.
            place = os.path.join(base, os.fsdecode(named[-1])) if named else "/"
            return (os.path.realpath(os.path.dirname(place)) + "/").startswith(self.folder + "/")
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith("<frozen importlib") or (
                event == "compile" and code.co_name in ("parse", "literal_eval") and code.co_filename == _AST_FILE
            ):
                return True
            frame = frame.f_back
        return False


_FAR = 1e18
_AST_FILE = str(importlib.import_module("ast").__file__)


class Tracer:
    """Notes which lines of some files run."""

    def __init__(self, modules: list[str]) -> None:
        self.lines: dict[str, set[int]] = {str(runner.ROOT / name): set() for name in modules}
        self._left: dict[Any, set[int]] = {}  # code object -> its lines that have not run yet

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        lines = self.lines.get(code.co_filename)
        if lines is None:
            return None
        left = self._left.get(code)
        if left is None:
            left = self._left[code] = {line for *_, line in code.co_lines() if line is not None}
        if not left:
            return None  # nothing new in there: run it at full speed

        def line(frame: FrameType, event: str, _: Any) -> Any:
            if event == "line":
                lines.add(frame.f_lineno)
                left.discard(frame.f_lineno)
            return line

        lines.add(frame.f_lineno)
        left.discard(frame.f_lineno)
        return line

    def run(self, function: Callable[..., str], *args: Any) -> str:
        """Call a function and note its lines."""
        sys.settrace(self._call)
        try:
            return function(*args)
        finally:
            sys.settrace(None)


def main(plan: dict[str, Any]) -> int:
    """Parse the seeds, then mutants `first` to `last`; exit code 3 after a failure, which is in failure.json."""
    work = Path(plan["work"])
    folder = work / "folder"
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    target = importlib.import_module(f"tests.fuzz.{plan['name']}")
    if plan["name"] != target.NAME:
        raise ValueError(f"the file {plan['name']}.py says NAME = {target.NAME!r}")
    board = runner.Board(work / "board")
    sentry = Sentry(folder, frozenset(getattr(target, "EXPECTED_EVENTS", ())))
    tracer = Tracer(target.MODULES)
    seeds: list[bytes] = target.seeds()
    statistics = {"corpus_bytes": sum(map(len, seeds)), "peak_bytes": 0, "slowest_seconds": 0.0}

    def fail(kind: str, index: int, text: str) -> int:
        (work / "failure.json").write_text(json.dumps({"kind": kind, "index": index, "text": text[-4000:]}))
        finish()
        return 3

    def finish() -> None:
        covered = {os.path.relpath(name, runner.ROOT): sorted(lines) for name, lines in tracer.lines.items()}
        file = work / f"worker-{plan['first']}.json"
        file.write_text(json.dumps(statistics | {"covered": covered}))

    # The seeds first: they must be valid, they import what is imported late, and their memory is the baseline.
    for number, data in enumerate(seeds):
        try:
            answer = tracer.run(target.run, data, folder)
        except Exception:  # noqa: BLE001  reported as the failure that it is
            return fail("seed", -1, f"seed {number}: {_trace()}")
        if answer != "ok":
            return fail("seed", -1, f"seed {number} must be valid, and run() answers {answer!r}")
    gc.collect()
    baseline = _status("VmRSS")
    _reset_peak()
    board.write(baseline=baseline, began=_FAR)

    until = None if plan["seconds"] is None else time.monotonic() + plan["seconds"]
    for index in range(plan["first"], plan["last"]):
        if until is not None and time.monotonic() > until:
            break
        data = runner.mutant(target, plan["seed"], index, seeds)
        (work / "input").write_bytes(data)
        (work / "input.json").write_text(json.dumps({"index": index}))
        began = time.monotonic()
        board.write(index=index, began=began)
        traced = plan["trace_every"] and index % plan["trace_every"] == 0
        sentry.on = True
        try:
            answer = tracer.run(target.run, data, folder) if traced else target.run(data, folder)
        except BaseException:  # noqa: BLE001  whatever a parser lets out is a failure, SystemExit too
            sentry.on = False
            return fail("trace", index, _trace())
        sentry.on = False
        board.write(began=_FAR)
        statistics["slowest_seconds"] = max(statistics["slowest_seconds"], time.monotonic() - began)
        peak = _status("VmHWM") - baseline
        statistics["peak_bytes"] = max(statistics["peak_bytes"], peak)
        if peak > plan["memory_bytes"]:
            return fail("memory", index, f"{peak >> 20} MiB beyond the valid inputs")
        if sentry.seen:
            return fail("executed", index, "; ".join(sentry.seen[:5]))
        state = board.read()
        board.write(**{answer: state[answer] + 1, "bytes_seen": state["bytes_seen"] + len(data)})
    finish()
    return 0


def _trace() -> str:
    """Return the trace of the current exception, with long lines cut."""
    return "\n".join(line[:500] for line in traceback.format_exc().splitlines())


def _status(name: str) -> int:
    """Return a size of this process in bytes: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(name.encode()):
                return int(line.split()[1]) << 10
    return 0


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # the peak then is that of the imports; the parent watches what is resident
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)


if __name__ == "__main__":
    code = main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)  # no thread or atexit of a library keeps a finished worker
