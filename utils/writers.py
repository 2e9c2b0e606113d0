"""Which starts of a run may still write into its folder: one file each, ``jobs/writer-TOKEN.json``. Needs no torch.

Every start takes the next token by an exclusive create, and removes its file when it ends. One that was killed, or is
frozen, leaves the file. So a higher token tells a process that wakes up that it has lost the folder, and a lower one
tells a start that somebody may still wake up. docs/cluster.md has the whole protocol.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from utils import files, run_lock
from utils.faults import UserError

_FILE = re.compile(r"writer-(\d{1,9})\.json")
FORGOTTEN_SECONDS = 7 * 24 * 3600.0  # a start on another machine without a sign of life for so long is given up


class Writer:
    """The token of this start.

    Args:
        folder: ``jobs/`` of the experiment.
        token: its number.
        me: the process.
    """

    def __init__(self, folder: Path, token: int, me: run_lock.Holder) -> None:
        self.folder, self.token, self.me = folder, token, me

    @classmethod
    def enter(cls, folder: Path, me: run_lock.Holder, *, above: int) -> Writer:
        """Take the next token. The caller holds the run's lock.

        Args:
            folder: ``jobs/`` of the experiment; it exists.
            me: the process.
            above: the highest token that the checkpoints of the folder name.

        Raises:
            OSError: the folder cannot be written.
        """
        files.remove_old(folder.glob("writer-*.json.*.tmp"))
        token = max([above, *_tokens(folder)]) + 1
        while True:
            with run_lock.record_of(folder / f"writer-{token}.json", me) as (record, _):
                if run_lock.create(record, folder / f"writer-{token}.json"):
                    return cls(folder, token, me)
            token += 1  # its owner died before it could lock, or something else has the name

    @property
    def path(self) -> Path:
        """The file that says that this start may write."""
        return self.folder / f"writer-{self.token}.json"

    def keep(self) -> bool:
        """Report whether no later start has come; put the file back if somebody removed it.

        Raises:
            OSError: the folder cannot be read or written.
        """
        if any(token > self.token for token in _tokens(self.folder)):
            return False
        if not os.path.lexists(self.path):
            with run_lock.record_of(self.path, self.me) as (record, _):
                run_lock.create(record, self.path)
        return True

    def has_predecessor(self) -> bool:
        """Report whether an earlier start may still wake up, and forget those that certainly cannot."""
        left = False
        for token in _tokens(self.folder):
            if token >= self.token:
                continue
            path = self.folder / f"writer-{token}.json"
            if self._is_gone(path):
                with contextlib.suppress(OSError):
                    path.unlink()
            else:
                left = True
        return left

    def _is_gone(self, path: Path) -> bool:
        try:
            holder, silent = run_lock.read(path), time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return True
        except (OSError, UserError):  # something that is not a file has the name
            return False
        return run_lock.is_certainly_dead(holder, self.me) or silent > FORGOTTEN_SECONDS

    def beat(self) -> None:
        """Give a sign of life."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def leave(self) -> None:
        """Say that this start will never write again."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def _tokens(folder: Path) -> list[int]:
    """Tokens in a ``jobs/`` folder, in no order."""
    try:
        found = [_FILE.fullmatch(name) for name in os.listdir(folder)]
    except FileNotFoundError:
        return []
    return [int(match[1]) for match in found if match]
