"""Separate the two kinds of errors that are not bugs: a mistake of the user, and media that cannot be read.

Also `fail_point`, with which the tests kill, freeze or stop a process at a named moment.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib.util
import os
import signal
import socket
import stat
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

_arrivals: Counter[str] = Counter()  # how often this process has come to each fail point
_ends_at_once = False
_EXIT_FILE = "ZOETROPE_EXIT_FILE"  # environment variable: the launcher reads exit codes and errors next to this file
_FAIL_ACTIONS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr2": signal.SIGUSR2,
}
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# Advice for errors of the file system that name a file.
_OF_THE_FOLDER = {
    errno.EACCES: "look at the permissions",
    errno.EDQUOT: "make room, then run the same command again",
    errno.EEXIST: "something else of this name is in the way: move it away",
    errno.EISDIR: "a folder is where a file should be: move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path",
    errno.ENOSPC: "make room, then run the same command again",
    errno.ENOTDIR: "a file is where a folder should be: move it away",
    errno.EPERM: "look at the permissions",
    errno.EROFS: "choose a folder that can be written",
}


# Packages that the code cannot do without, by their import names; pyproject.toml has their versions.
_PACKAGES = {
    "av", "cv2", "numpy", "psutil", "pydantic", "safetensors", "simplejpeg", "torch", "torchvision", "xxhash", "yaml",
}  # fmt: skip

# Errors of the machine: they need not name a file, and are never a bug.
_OF_THE_MACHINE = {
    errno.EMFILE: "too many files are open: raise `ulimit -n`; `python main.py doctor` names all limits",
    errno.EIO: "the disk or the file server failed: look at the machine's log, then run the same command again",
    errno.ESTALE: "the file server has forgotten this file: run the same command again, or mount the folder again",
    errno.ETIMEDOUT: "a file server or another machine did not answer in time: run the same command again",
}


class UserError(Exception):
    """An error that the user can fix. `main.py` and `launch` print the text and leave with exit code 2.

    The text is one clear sentence (or one line per problem) that names the file, line, key or host and what to do.
    """


class MediaError(Exception):
    """One video or frame that cannot be read. It is counted and reported by name, and never ends the run by itself.

    Args:
        path: the file, as the user knows it.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class RankLostError(RuntimeError):
    """Another rank died or stopped answering. `main.py` prints one line and leaves with exit code 1."""


class AgreedError(UserError):
    """A `UserError` that every rank raises at the same step, so that only rank 0 has to print it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the nearest known word, or ""."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def listed(what: str, names: Iterable[str], *, most: int = 6) -> str:
    """Return `what: a, b, c, ... 12 in all`, or "" for no names."""
    items = list(names)
    more = f", ... {len(items)} in all" if len(items) > most else ""
    return f"{what}: {', '.join(items[:most])}{more}" if items else ""


def counted(number: int, noun: str) -> str:
    """Return "1 video" or "3 videos"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def rank_from_environment() -> int:
    """Return the rank of this process by the variables of torchrun or SLURM; 0 if alone. Needs no torch.

    A variable that is not a number counts as 0: code that reports an error must not fail on it.
    """
    # sbatch sets SLURM_PROCID in the batch script too, which is not a rank.
    default = os.environ.get("SLURM_PROCID", "0") if "SLURM_STEP_ID" in os.environ else "0"
    rank = os.environ.get("RANK", default)
    return int(rank) if rank.isascii() and rank.isdigit() else 0


def leave_exit_code(code: int) -> int:
    """Write this rank's exit code where the launcher asked for it, and return the code to leave with.

    torchrun reports 1 for every failure, and its own table of errors hides the one sentence that the user should read.
    So under a launcher that reads the file, 2 (a user's mistake) and 75 (stopped and saved) leave as 0. A rank that
    lost another one to such a mistake leaves as 0 too.
    """
    path = os.environ.get(_EXIT_FILE)
    if not path:
        return code
    write_exit_code(code)
    return 1 if code == 1 and not _another_rank_left_with_2(path) else 0


def write_exit_code(code: int) -> None:
    """Write this rank's exit code where the launcher asked for it, if it did."""
    path = os.environ.get(_EXIT_FILE)
    if path:
        Path(f"{path}.{rank_from_environment()}").write_text(f"{code}\n")


def end_at_once() -> None:
    """Let `finish` skip the interpreter's teardown: other ranks still use the process group."""
    global _ends_at_once
    _ends_at_once = True


def leave_process(run: Callable[[], int]) -> NoReturn:
    """Run the program and end this process with its exit code; see `finish`."""
    sys.exit(finish(run))


def finish(run: Callable[[], int]) -> int:
    """Run the program and return its exit code; after `end_at_once`, end the process with that code instead.

    The error's text and the exit code are written before the process ends, even if other ranks wait for something.
    """
    try:
        code = run()
    except BaseException:
        if not _ends_at_once:
            raise  # the interpreter prints the trace
        traceback.print_exc()
        write_exit_code(1)
        code = 1

    # `os._exit` runs no destructors, which could wait for ever, and flushes nothing.
    if _ends_at_once:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _another_rank_left_with_2(path: str) -> bool:
    """Wait up to a second for another rank's code 2: a rank closes its connections just before it writes its code."""
    for _ in range(10):  # times 0.1 s
        codes = [file.read_text() for file in Path(path).parent.glob(f"{Path(path).name}.*[0-9]")]
        if "2\n" in codes:
            return True
        time.sleep(0.1)
    return False


def run_cli(action: Callable[[], int]) -> int:
    """Run `action`. Print an error that the user can fix as one message on stderr and return its exit code.

    Args:
        action: returns an exit code.

    Returns:
        The action's code; 2 for a `UserError` and for files that cannot be read or written; 1 for a lost rank, and if
        our output is no longer read; 130 for Ctrl-C.
    """
    try:
        return action()
    except UserError as error:
        report_error(error)
        return 2
    except RankLostError as error:
        report_error(error)
        end_at_once()  # threads of a process group wait for a lost rank until another timeout has passed
        return 1
    except KeyboardInterrupt:
        report_error(UserError("interrupted"))
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        # If one of our own dependencies is missing, the installation is incomplete; any other missing module is a bug.
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        report_error(UserError(f"{package} is not installed for {sys.executable}: {_how_to_install()}"))
        return 2
    except BrokenPipeError:  # as in `main.py list | head`; Python flushes once more at exit, so give it a sink
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # The file system's errors are the user's if they name a file or come from the machine.
        of_the_machine = error.errno in _OF_THE_MACHINE or error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = (_OF_THE_FOLDER | _OF_THE_MACHINE).get(error.errno or 0)
        if advice is None or not (error.filename or of_the_machine):  # not a file that the user named: a bug
            raise

        file = error.filename2 or error.filename  # of a rename: the target, which is the name that the user knows
        name = f"{os.fsdecode(file)}: " if file else ""
        report_error(UserError(f"{name}{error.strerror}; {advice}"))
        return 2


def _how_to_install() -> str:
    root = Path(__file__).resolve().parents[1]
    python = root / ".venv/bin/python"

    if python.exists() and Path(sys.prefix).resolve() != python.parents[1].resolve():
        return f"this repository has an environment of its own: use {python} instead of python"
    return f"run `make install` in {root} once, then use {python} instead of python"


def report_error(error: Exception) -> None:
    """Print an error once, where the user reads it.

    Rank 0 or a single process prints it. An error that all ranks agree on has been printed by rank 0. Another rank
    writes its own error next to the launcher's exit file. The launcher prints it unless rank 0 has printed the same.
    Without a launcher that rank prints it itself.
    """
    if isinstance(error, AgreedError) and rank_from_environment() != 0:
        return

    path, rank = os.environ.get(_EXIT_FILE), rank_from_environment()
    text = str(error).encode("utf-8", "backslashreplace").decode()  # names need not be UTF-8
    if path:
        Path(f"{path}.{rank}.error").write_text(text, encoding="utf-8")

    if rank == 0:
        print(f"error: {text}", file=sys.stderr, flush=True)
    elif not path:
        print(f"error: rank {rank} on {socket.gethostname()}: {text}", file=sys.stderr, flush=True)


def kind_of_file(path: str | os.PathLike[str]) -> str | None:
    """Return the kind of a file that is not a regular one, without opening it: opening a pipe may block for ever.

    Returns:
        Such as "a named pipe"; None for a regular file, a link to one, or a missing file.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None

    if stat.S_ISREG(mode):
        return None
    return _KINDS.get(stat.S_IFMT(mode), "something else")


def refuse_odd_file(path: str | os.PathLike[str]) -> None:
    """Raise a UserError if a pipe, a folder or a device has the file's name; a missing file is fine."""
    kind = kind_of_file(path)
    if kind is not None:
        raise UserError(f"{os.fspath(path)}: {kind} is where a file should be: move it away")


def check_repository(root: Path) -> None:
    """Refuse to run with someone else's `datasets`: it is a common name for a package.

    Raises:
        UserError: another package of that name comes first on the path.
    """
    spec = importlib.util.find_spec("datasets")
    location = Path(spec.origin if spec and spec.origin else "/").resolve()

    if root.resolve() not in location.parents:
        raise UserError(
            f"another package called datasets is found first, at {location}; set PYTHONPATH={root.resolve()} "
            "and run python without -P"
        )


def fail_point(name: str) -> None:
    """Send this process a signal if the environment asks for one here. Otherwise it costs a dictionary look-up.

    ``ZOETROPE_FAILPOINT=name:rank:count[:action]`` acts in the process of rank `rank` when it reaches the point `name`
    for the `count`-th time, counted from 1. The actions:

    * ``kill``, the default: SIGKILL
    * ``stop``: SIGSTOP; the process continues only after a SIGCONT
    * ``term``, ``int``, ``usr2``: SIGTERM, SIGINT, SIGUSR2; the process handles the signal at this very point
    * ``reader``: SIGKILL to the process that it started last, a reader of clips; no effect if it has started none

    If ``ZOETROPE_FAILPOINT_LOG`` names a file, the request is appended to it just before the action.

    The points:

    * ``checkpoint.begin``: a checkpoint is about to be written; its file does not exist yet
    * ``checkpoint.tmp``: the temporary file is half written (its bytes exist, but are not synced or verified)
    * ``checkpoint.linked``: the new file is verified, and the old latest has its second name
    * ``checkpoint.checked``: the folder is still this process's, and no name has changed yet
    * ``checkpoint.replace``: the new file has its final name, the old latest is not yet the previous one
    * ``checkpoint.done``: all names are in place, the folder is not yet synced
    * ``run_dir.claimed``: this process is about to replace a dead lock
    * ``run_dir.locked``: the lock is taken, the heartbeat not yet started
    * ``run_dir.entered``: the token of this start is taken, temporary files of earlier starts still exist
    * ``log.line``: half a record is in log.txt
    * ``start.joined``: the ranks have met, the folder is not yet locked
    * ``start.built``: model, optimiser and state exist, no step has begun
    * ``phase.NAME``: the phase NAME of `utils.watchdog` begins (data, forward/backward, optimiser step, validation,
      precise batch norm, writing FILE, start)
    * ``progress.NAME``: a part of that phase is done: a video of a validation, a batch of precise batch norm
    """
    setting = os.environ.get("ZOETROPE_FAILPOINT")
    if not setting:
        return

    point, rank, count, *action = setting.split(":")
    if point != name or int(rank) != rank_from_environment():
        return

    _arrivals[name] += 1
    if _arrivals[name] == int(count):
        _fail(setting, action[0] if action else "kill")


def _fail(setting: str, action: str) -> None:
    target = os.getpid()
    if action == "reader":
        # Imported here: it is needed by tests only, and this module is imported everywhere.
        from utils import processes

        children = processes.children(target)
        if not children:
            return
        target = children[-1]

    # The log proves to a test that the point was reached, even if the signal kills the process.
    if log := os.environ.get("ZOETROPE_FAILPOINT_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            file.write(setting + "\n")
    os.kill(target, signal.SIGKILL if action == "reader" else _FAIL_ACTIONS[action])
