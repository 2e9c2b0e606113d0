"""The two kinds of trouble that are not bugs: a mistake of the user, and a piece of media that cannot be read.

Also `fail_point`, with which the tests kill a process at a named moment.
"""

from __future__ import annotations

import difflib
import os
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

_arrivals: Counter[str] = Counter()


class UserError(Exception):
    """Something the user can mend. `main.py` and `launch` print the text and leave with exit code 2.

    The text is one clear sentence (or one line per problem) that names the file, line, key or host and says what to do.
    """


class MediaError(Exception):
    """One video or frame that cannot be read. It is counted and named, never fatal by itself.

    Args:
        path: the file, as the user knows it.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class LostRank(RuntimeError):
    """Another rank died or stopped answering. `main.py` prints the one line and leaves with exit code 1."""


class AgreedError(UserError):
    """A `UserError` that every rank raises at the same step, so that only rank 0 has to print it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def rank_from_environment() -> int:
    """The rank of this process as torchrun or SLURM tell it; 0 when alone. Needs no torch."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    return int(os.environ.get("SLURM_PROCID", "0")) if "SLURM_STEP_ID" in os.environ else 0


def leave_exit_code(code: int) -> int:
    """Write this rank's exit code where the launcher asked for it, and return the code to leave with.

    torchrun reports 1 for every failure, and prints its own table over the one sentence that the user should read:
    so under a launcher that reads the file, 2 (a user's mistake) and 75 (stopped, saved) leave as 0.
    """
    path = os.environ.get("ZOETROPE_EXIT_FILE")
    if not path:
        return code
    Path(f"{path}.{rank_from_environment()}").write_text(f"{code}\n")
    return code if code == 1 else 0


def check_repository(root: Path) -> None:
    """`datasets` and `utils` are common names: refuse to run with somebody else's.

    Raises:
        UserError: another package of that name was imported first.
    """
    import datasets

    found = Path(datasets.__file__ or "/").resolve()
    if root.resolve() not in found.parents:
        raise UserError(
            f"another package called datasets was imported, from {found}; set PYTHONPATH={root.resolve()} "
            "and run python without -P"
        )


def fail_point(name: str) -> None:
    """Kill this process with SIGKILL here if the environment asks for it; a dictionary look-up otherwise.

    ``ZOETROPE_FAILPOINT=name:rank:count`` kills the process of rank `rank` when it comes to the point `name` for the
    `count`-th time, counted from 1. The points:

    * ``checkpoint.tmp``: the temporary file is half written (its bytes are there, nothing is synced or verified)
    * ``checkpoint.linked``: the new file is verified, and the old latest has its second name
    * ``checkpoint.replace``: the new file has its final name, the old latest is not yet the previous one
    * ``checkpoint.done``: everything is in place, the folder is not yet synced
    * ``run_dir.claimed``: a dead lock may be replaced by this process, and is not yet
    * ``run_dir.locked``: the lock is taken, the heartbeat not yet started
    * ``log.line``: half a record is in log.txt
    """
    wanted = os.environ.get("ZOETROPE_FAILPOINT")
    if not wanted:
        return
    point, rank, count = wanted.split(":")
    if point != name or int(rank) != rank_from_environment():
        return
    _arrivals[name] += 1
    if _arrivals[name] == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
