"""Two users of one group, played by root in child processes of this one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GROUP = 61000


@dataclass(frozen=True)
class User:
    """Who a child process is.

    Args:
        uid: also the number of the user's own group.
        groups: further ones.
    """

    uid: int
    groups: tuple[int, ...] = (GROUP,)

    def become(self, umask: int = 0o022) -> None:
        """Change this process for good."""
        os.setgroups(self.groups)
        os.setgid(self.uid)
        os.setuid(self.uid)
        os.umask(umask)


ANNE, BERT = User(61001), User(61002)
CARL = User(61003, ())  # of another group


def why_not() -> str:
    """Return why users cannot be played here; empty if they can."""
    if os.getuid() != 0:
        return "only root can play two users"
    root = Path(__file__).resolve().parents[1]
    blocked = [folder for folder in (root, *root.parents) if not folder.stat().st_mode & 0o001]
    return f"other users cannot reach {blocked[0]}" if blocked else ""


def start(output: Path, action: Callable[[], int], **environment: str) -> int:
    """Fork a child that runs `action`, writes to `output` and leaves with what it returns; returns its pid."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with output.open("ab", buffering=0) as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # pytest's were here
        os.environ.update(environment)
        code = action()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(output: Path, action: Callable[[], int], **environment: str) -> int:
    """Run `action` in a child to its end; returns the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(start(output, action, **environment), 0)[1])
