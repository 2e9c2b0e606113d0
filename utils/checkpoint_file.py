"""Write and read one checkpoint file: no kill and no full disk harms the previous one, and every byte is checked.

The file is torch's zip format with tensors and plain Python types, readable with ``torch.load(weights_only=True)``.
utils/checkpoint.py decides from which file a run resumes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import checkpoint_names, files, renamed, weights_file
from utils.checkpoint_names import BEST, LATEST, PREVIOUS
from utils.errors import UserError, fail_point, kind_of_file

CheckpointContent = dict[str, Any]  # the content of a checkpoint; utils/engine/state.py lists it
_STALE_SECONDS = 3600.0  # the age at which a temporary file of another host counts as abandoned
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CheckpointError(UserError):
    """A checkpoint could not be written; the earlier ones are untouched."""


class CorruptCheckpoint(UserError):  # noqa: N818 (the name of the state of the file, not of an act)
    """A file that is not a complete checkpoint.

    Args:
        path: the file.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: not a whole checkpoint ({reason})")
        self.path = path
        self.reason = reason


def save(
    folder: Path,
    name: str,
    state: CheckpointContent,
    *,
    check: Callable[[Path], object] | None = None,
    keep_as: int | None = None,
) -> Path:
    """Write `state` to `folder`/`name` so that a kill at any moment leaves a good checkpoint in the folder.

    Temporary file in the same folder, flush, fsync, read back and verify, rename, fsync of the folder. For `LATEST` the
    old latest becomes `PREVIOUS`. It gets a second name by a hard link first, so there is no moment without a latest.
    It replaces the older one only after the new file is in place.

    Args:
        folder: an existing folder.
        name: LATEST or BEST.
        state: tensors and plain Python types only, of any nesting.
        check: called with the finished temporary file, right before the first rename; raises if another process has
            taken the folder.
        keep_as: the token under which the file gets a second name that no other start replaces.

    Raises:
        CheckpointError: no space or no permission; the temporary file is gone and the old checkpoint is unchanged.
        TypeError: `state` holds a type that ``weights_only=True`` would refuse to read.
    """
    _sweep(folder)
    target, previous = folder / name, folder / PREVIOUS
    names = [target, previous]
    if keep_as is not None:
        names.append(folder / checkpoint_names.kept_name(name, keep_as))
    tmp, spare, *links = [checkpoint_names.temporary_name(path) for path in names]

    try:
        # Write and verify a temporary file. Until the first rename the folder's checkpoints are untouched.
        _refuse_odd_files(*names)
        _require_space(folder, name, state)
        fail_point("checkpoint.begin")
        _write(tmp, state)
        _verify_written(tmp)

        # Prepare all second names, so that only renames remain.
        rotate = name == LATEST and _is_zip(target)  # a cut-off file must not push out a good previous one
        if rotate:
            checkpoint_names.second_name(target, spare)
        for link in links:
            checkpoint_names.second_name(tmp, link)
        fail_point("checkpoint.linked")

        # The last moment at which another process may have taken the folder.
        if check is not None:
            check(tmp)
        fail_point("checkpoint.checked")

        # The order matters: at each moment the newest verified file has a name that `find` considers.
        for link in links:
            os.replace(link, names[-1])
        os.replace(tmp, target)
        fail_point("checkpoint.replace")
        if rotate:
            os.replace(spare, previous)
        fail_point("checkpoint.done")
        files.sync_folder(folder)
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise CheckpointError(_failed_text(folder, name, state, cause)) from error
    finally:
        for path in (tmp, spare, *links):  # renaming one of two names of the same file leaves both: remove what is left
            with contextlib.suppress(OSError):
                path.unlink()
    return target


def peek(path: Path) -> tuple[int, int] | None:
    """Read (token, step) of a checkpoint without its tensors, to find out which of two is newer.

    Returns:
        None for a file that is not a checkpoint of a run, or whose table of contents is damaged. A checkpoint from
        before tokens existed has token 0.
    """
    try:
        state = weights_file.glance(path)
    except UserError:
        return None
    token, step = (state.get("token", 0), state.get("step")) if isinstance(state, dict) else (None, None)
    return (token, step) if type(token) is int and type(step) is int else None


def load(path: Path) -> CheckpointContent:
    """Read one checkpoint and check every byte of it; tensors on the CPU.

    Raises:
        UserError: there is no such file.
        CorruptCheckpoint: it is damaged, not a checkpoint, or reading it would need to run code.
    """
    try:
        state = weights_file.read_archive(path)
    except weights_file.Forbidden as error:
        raise CorruptCheckpoint(path, "it holds more than tensors and plain values, which is never run") from error
    except weights_file.DamagedWeights as error:
        raise CorruptCheckpoint(path, error.reason) from error
    except UserError as error:
        raise UserError(f"{path}: no such checkpoint") from error

    if not isinstance(state, dict):
        raise CorruptCheckpoint(path, f"it holds a {type(state).__name__}, not a dict")
    return renamed.checkpoint(state)


def _write(tmp: Path, state: CheckpointContent) -> None:
    with open(tmp, "wb") as file:
        torch.save(state, file)
        fail_point("checkpoint.tmp")
        file.flush()
        os.fsync(file.fileno())


def _verify_written(tmp: Path) -> None:
    try:
        weights_file.check_written(tmp)
    except weights_file.DamagedWeights as error:
        raise OSError(errno.EIO, f"what was written reads back differently ({error.reason})") from error
    except weights_file.Forbidden as error:
        raise TypeError(f"a checkpoint may hold tensors and plain Python types only: {_short(error)}") from error


def _sweep(folder: Path) -> None:
    """Remove temporary files of killed processes: on this host by pid, otherwise by age."""
    for path, host, pid in checkpoint_names.temporary_files(folder):
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > _STALE_SECONDS
            if old or (host == socket.gethostname() and not (pid.isdigit() and _runs(int(pid)))):
                path.unlink()


def _runs(pid: int) -> bool:
    # Signal 0 only asks whether the process exists.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # it exists, but belongs to another user
    return True


def _is_zip(path: Path) -> bool:
    return os.path.isfile(path) and zipfile.is_zipfile(path)


def _refuse_odd_files(*paths: Path) -> None:
    """Raise an OSError for a pipe or a socket: a rename would replace it silently, and opening it may block."""
    for path in paths:
        kind = kind_of_file(path)
        if kind is not None:
            raise OSError(errno.EEXIST, f"{path.name} is {kind}, not a file: move it away")


def _require_space(folder: Path, name: str, state: CheckpointContent) -> None:
    # Some network file systems report 0 bytes in all: then their free space means nothing.
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < _bytes_of(state, set()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _bytes_of(value: object, seen: set[int]) -> int:
    """Return the bytes of all tensors, counting shared storage once."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, Mapping):
        return sum(_bytes_of(item, seen) for item in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return sum(_bytes_of(item, seen) for item in value)
    return 0


def _os_error(error: BaseException) -> OSError | None:
    """Return the file system's error behind `error`: torch hides it behind RuntimeError ("unexpected pos ...")."""
    link: BaseException | None = error

    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__

    # The writer was closed in the middle of a record and left no OSError: in practice the disk was full.
    if isinstance(error, RuntimeError) and ("unexpected pos" in str(error) or "PytorchStreamWriter" in str(error)):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def _failed_text(folder: Path, name: str, state: CheckpointContent, cause: OSError) -> str:
    any_saved = any(os.path.lexists(folder / known) for known in (LATEST, PREVIOUS, BEST))
    kept = "earlier checkpoints are unchanged" if any_saved else "none was saved before it"

    if cause.errno not in _NO_SPACE:
        return f"{folder / name}: the checkpoint could not be written ({cause.strerror or cause}); {kept}"

    need, free = _bytes_of(state, set()) / 2**20, shutil.disk_usage(folder).free / 2**20
    room = f"{free:.1f} MiB are free"
    if cause.errno == errno.EFBIG:
        room = "a limit on the size of files, ulimit -f, is in force"

    return (
        f"{folder / name}: no space left for the checkpoint, which needs {need:.1f} MiB ({room}); {kept}. "
        f"Make room and start the run again: it {'resumes from there' if any_saved else 'starts from the beginning'}"
    )


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
