"""Record which starts of a run may still write into its folder: ``jobs/writer-TOKEN.json``. Needs no torch.

Every start takes the next token by an exclusive create, and removes its file when it ends. A start that was killed or
is frozen leaves its file. A process that wakes up and finds a higher token has lost the folder. A start that finds a
lower token knows that another process may still wake up. docs/cluster.md has the whole protocol.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from utils import files, run_lock
from utils.errors import UserError

_FILE = re.compile(r"writer-(\d{1,9})\.json")
FORGOTTEN_SECONDS = 7 * 24 * 3600.0  # after this silence, a start on another machine counts as ended


class StartToken:
    """The token of this start.

    Args:
        folder: ``jobs/`` of the experiment.
        token: its number.
        me: this process.
    """

    def __init__(self, folder: Path, token: int, me: run_lock.Holder) -> None:
        self.folder, self.token, self.me = folder, token, me

    @classmethod
    def enter(cls, folder: Path, me: run_lock.Holder, *, above: int) -> StartToken:
        """Take the next token. The caller holds the run's lock.

        Args:
            folder: ``jobs/`` of the experiment; it exists.
            me: this process.
            above: the highest token in the checkpoints of the folder.

        Raises:
            OSError: the folder cannot be written.
        """
        files.remove_old(folder.glob("writer-*.json.*.tmp"))

        token = max([above, *_tokens(folder)]) + 1
        while True:
            with run_lock.record_of(folder / f"writer-{token}.json", me) as (record, _):
                if run_lock.create(record, folder / f"writer-{token}.json"):
                    return cls(folder, token, me)
            token += 1  # the owner of this name died before it could lock, or the name is taken by something else

    @property
    def path(self) -> Path:
        """The file that allows this start to write."""
        return self.folder / f"writer-{self.token}.json"

    def keep(self) -> bool:
        """Return True if no later start has come; write the file again if it was removed.

        Raises:
            OSError: the folder cannot be read or written.
        """
        if any(token > self.token for token in _tokens(self.folder)):
            return False
        if not os.path.lexists(self.path):
            # Without the file, the next start would think that this one has ended, and could reuse its token.
            with run_lock.record_of(self.path, self.me) as (record, _):
                run_lock.create(record, self.path)

        return True

    def has_predecessor(self) -> bool:
        """Return True if an earlier start may still wake up; remove the files of starts that certainly cannot."""
        left = False
        for token in _tokens(self.folder):
            if token >= self.token:
                continue

            path = self.folder / f"writer-{token}.json"
            if self._is_gone(path):
                # The file is only a note: a start that cannot remove it will try again.
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
        except (OSError, UserError):  # unreadable, or not a file: assume the dangerous case
            return False
        return run_lock.is_certainly_dead(holder, self.me) or silent > FORGOTTEN_SECONDS

    def beat(self) -> None:
        """Touch the file as a heartbeat."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def leave(self) -> None:
        """Remove the file: this start will never write again."""
        with contextlib.suppress(OSError):
            self.path.unlink()


def _tokens(folder: Path) -> list[int]:
    """Return the tokens in a ``jobs/`` folder, in no particular order."""
    try:
        matches = [_FILE.fullmatch(name) for name in os.listdir(folder)]
    except FileNotFoundError:
        return []
    return [int(match[1]) for match in matches if match]
