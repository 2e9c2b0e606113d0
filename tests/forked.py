"""Python processes for the tests, forked from one that has imported PyTorch: a start takes milliseconds, not a second.

`run` and `Process` are called as `subprocess.run` and `subprocess.Popen` are, with a command of this interpreter:

    forked.run([sys.executable, "main.py", "eval", exp], cwd=ROOT, env=env, text=True)

The command is a process of its own, with its own id, environment, folder, streams and end. It differs from one that
`subprocess` starts in three things: libraries are imported already (no module of this repository is), its parent is
the server, and hashes of texts are the same in all of them. A test of a start itself, of what is imported, or of what
happens when the parent ends therefore takes `subprocess`, and so does one test for every verb.

Each process of pytest has its own server, from its first use until it ends. The server imports and never computes:
PyTorch's threads would not exist in the processes that are forked from it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import io
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
_LIBRARIES = (
    *("numpy", "torch", "torch.distributed", "torch.utils.tensorboard", "torch.utils.checkpoint", "yaml", "pydantic"),
    *("torch._dynamo", "torch.utils.flop_counter"),  # by which an evaluation counts
    *("av", "cv2", "simplejpeg", "safetensors.torch", "psutil", "xxhash", "multiprocessing.spawn", "matplotlib"),
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_READ_AT_THE_START = ("PYTHON", "LD_", "LC_", "LANG", "TORCH_", "KMP_", "GOMP_", "MALLOC_")  # of interpreter, libraries
_MESSAGE = 1 << 20
_REQUEST_BYTES = 150_000  # what one message of a socket surely holds


# --------------------------------------------------------------------------------------------------- in the tests
class Process:
    """A started command; the interface is that part of `subprocess.Popen` which the tests use.

    Args:
        args: this interpreter, then a file, `-m` module or `-c` code, then arguments.
        cwd: its folder; None: that of this process.
        env: its environment; None: that of this process.
        stdin, stdout, stderr: as for `subprocess`.
        text: streams of texts.
        start_new_session: give it a session and a process group of its own.

    Raises:
        ValueError: the command is none of these, or the environment has something that only a new interpreter reads.
    """

    def __init__(
        self,
        args: Sequence[str | os.PathLike[str]],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        self.args = [os.fspath(word) for word in args]
        env = dict(os.environ if env is None else env)
        _check(self.args, env)
        sys.audit("zoetrope.spawn", self.args[0], self.args)  # for the guard of tests/tiers.py
        self.returncode: int | None = None
        self.stdin: Any = None
        self.stdout: Any = None
        self.stderr: Any = None
        self._text = text
        with contextlib.ExitStack() as ours:
            given = [self._stream(ours, number, value) for number, value in enumerate((stdin, stdout, stderr))]
            given[2] = given[1] if stderr == subprocess.STDOUT else given[2]
            end, end_writer = os.pipe()
            ours.callback(os.close, end_writer)
            request = {"args": self.args[1:], "cwd": str(cwd or Path.cwd()), "env": env, "session": start_new_session}
            try:
                _server().send(request, [*given, end_writer])
            except BrokenPipeError:  # a test has killed the server
                stop()
                _server().send(request, [*given, end_writer])
        self._end: int | None = end
        self.pid = int.from_bytes(os.read(end, 8), "little")
        if not self.pid:
            raise RuntimeError(f"the server of forked processes has ended and did not start {self.args}")

    def _stream(self, ours: contextlib.ExitStack, number: int, value: int | IO[Any] | None) -> int:
        """Return the descriptor of a stream for the command; keep the other end of a pipe."""
        if value == subprocess.PIPE:
            reading, writing = os.pipe()
            theirs, kept = (reading, writing) if number == 0 else (writing, reading)
            ours.callback(os.close, theirs)
            raw = io.FileIO(kept, "r" if number else "w")
            binary: Any = io.BufferedReader(raw) if number else raw
            stream = io.TextIOWrapper(binary, "utf-8", write_through=True) if self._text else binary
            setattr(self, ("stdin", "stdout", "stderr")[number], stream)
            return theirs
        if value == subprocess.DEVNULL:
            nothing = os.open(os.devnull, os.O_RDWR)
            ours.callback(os.close, nothing)
            return nothing
        if value is None or value == subprocess.STDOUT:
            return number
        return value if isinstance(value, int) else value.fileno()

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not within `timeout` seconds.
        """
        if self._end is not None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            code = os.read(self._end, 8)
            os.close(self._end)
            self._end = None
            # Nothing: the server was killed, and has taken its processes along.
            self.returncode = int.from_bytes(code, "little", signed=True) if code else -signal.SIGKILL
        assert self.returncode is not None
        return self.returncode

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:  # noqa: A002
        """Write to its stdin, read its output to the end, wait; return stdout and stderr (None where no pipe).

        Raises:
            subprocess.TimeoutExpired: it has not ended within `timeout` seconds; it still runs.
        """
        output: dict[str, Any] = {"stdout": None, "stderr": None}

        def read(name: str) -> None:
            with contextlib.suppress(ValueError):  # closed by the test
                output[name] = getattr(self, name).read()

        readers = [threading.Thread(target=read, args=(name,), daemon=True) for name in output if getattr(self, name)]
        for reader in readers:
            reader.start()
        if self.stdin:
            with contextlib.suppress(BrokenPipeError):
                if input is not None:
                    self.stdin.write(input)
                self.stdin.close()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        for stream in (self.stdout, self.stderr):
            if stream and not any(reader.is_alive() for reader in readers):
                stream.close()
        return output["stdout"], output["stderr"]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()
        self.wait()


def run(
    args: Sequence[str | os.PathLike[str]],
    *,
    timeout: float | None = None,
    capture_output: bool = False,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end; `options` are those of `Process`.

    Raises:
        subprocess.CalledProcessError: `check`, and it failed.
        subprocess.TimeoutExpired: it ran for more than `timeout` seconds, and was killed.
    """
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Process(args, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.wait(), out, err)
    if check:
        done.check_returncode()
    return done


def stop() -> None:
    """End the server of this process, if there is one, and all that still runs below it."""
    if _server.cache_info().currsize:
        _server().close()
        _server.cache_clear()


def _check(args: list[str], env: Mapping[str, str]) -> None:
    """Raise ValueError for what a forked process cannot be."""
    if args[0] != sys.executable or len(args) < 2 or (args[1].startswith("-") and args[1] not in ("-c", "-m", "-u")):
        raise ValueError(f"only a file, -m or -c of this interpreter can be forked, not {args[:2]}; take subprocess")
    here = {**os.environ, **_ONE_THREAD}
    for name in sorted(env.keys() | here.keys()):
        differs = name.startswith(_READ_AT_THE_START) and env.get(name) != here.get(name) and name != "PYTHONPATH"
        if differs or (name in _ONE_THREAD and env.get(name) not in (None, "1")):
            raise ValueError(f"{name} is read when an interpreter or a library starts; take subprocess")


class _Server:
    """The server of this process, seen from the tests."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": str(ROOT)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def send(self, request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        data = json.dumps(request).encode()
        if len(data) > _REQUEST_BYTES:
            raise ValueError(f"{len(data)} bytes of arguments and environment; take subprocess")
        with self._lock:
            socket.send_fds(self._socket, [data], descriptors)

    def close(self) -> None:
        self._socket.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@functools.cache
def _server() -> _Server:
    return _Server()


# -------------------------------------------------------------------------------------------------- in the server
def _serve(link: socket.socket) -> list[str]:
    """Fork a process for each request. Return in these processes alone, with their arguments."""
    running: dict[int, tuple[int, int]] = {}  # descriptor of a process: its id, and where its end is written
    while True:
        for ready in select.select([link, *running], [], [])[0]:
            if isinstance(ready, int):
                pid, end_writer = running.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    os.write(end_writer, code.to_bytes(8, "little", signed=True))
                os.close(end_writer)
                os.close(ready)
                continue
            data, descriptors, _, _ = socket.recv_fds(link, _MESSAGE, 4)
            if not data:  # the process of pytest has ended
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                return _become(json.loads(data), descriptors)
            os.write(descriptors[3], pid.to_bytes(8, "little"))
            running[os.pidfd_open(pid)] = (pid, descriptors[3])
            for descriptor in descriptors[:3]:
                os.close(descriptor)


def _become(request: dict[str, Any], descriptors: list[int]) -> list[str]:
    """Turn a forked process into the one of a request; return its arguments."""
    if request["session"]:
        os.setsid()
    # A shell ignores SIGINT for what it starts in the background, and pytest may be that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    reading, *writing = (io.FileIO(number, mode, closefd=False) for number, mode in enumerate("rww"))
    out, err = map(io.BufferedWriter, writing)
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(reading), "utf-8")
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(out, "utf-8", line_buffering=os.isatty(1))
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(err, "utf-8", "backslashreplace", line_buffering=True)
    os.chdir(request["cwd"])
    # where a spawned child begins
    multiprocessing.process.ORIGINAL_DIR = request["cwd"]  # pyright: ignore[reportAttributeAccessIssue]
    os.environ.clear()
    os.environ.update(request["env"])
    return request["args"]


class _Text(importlib.abc.InspectLoader):
    """The code of `-c`."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_source(self, fullname: str) -> str:
        return self._text


def _behave_as(args: list[str], libraries: list[str]) -> None:
    """Do what the interpreter does with its arguments."""
    args = args[1:] if args[0] == "-u" else args
    how, *words = args
    added = os.environ.get("PYTHONPATH", "")
    sys.path[:] = [*filter(None, added.split(os.pathsep)), *libraries]
    if how == "-c":
        text, *words = words
        sys.argv[:] = ["-c", *words]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__dict__["__builtins__"] = __builtins__
        _Text(text).exec_module(main)
    elif how == "-m":
        name, *words = words
        sys.argv[:] = [name, *words]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [how, *words]
        sys.path.insert(0, str(Path(how).resolve().parent))
        runpy.run_path(how, run_name="__main__")


def _main() -> None:
    import gc

    ours = sys.path[0]
    for name in _LIBRARIES:
        with contextlib.suppress(ImportError):  # an optional one
            importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads after the imports would not exist in a forked process"
    known = [path for path in sys.path if path not in ("", ours, str(ROOT))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # pages of what is imported stay shared
    args = _serve(socket.socket(fileno=int(sys.argv[1])))
    _behave_as(args, known)


if __name__ == "__main__":
    _main()
