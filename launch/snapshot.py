"""The code that a job runs: a copy made when it was submitted, so that later edits do not reach a requeued job."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

from utils import run_dir
from utils.faults import UserError

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("data", "pretrained")  # large, and not code
BIGGEST = 20_000_000  # bytes of a file that git does not track
_WITHOUT_GIT = ("main.py", "anal_tools", "datasets", "launch", "methods", "networks", "utils", "pyproject.toml")


def take(target_folder: Path, root: Path = ROOT) -> Path:
    """Copy the working tree (what git tracks and what it does not ignore) into a new folder.

    Args:
        target_folder: `<exp>/jobs/code`; the copy is `<UTC time>-<revision>` in it. Beside the copied files it holds
            `REVISION` and `uncommitted.diff`.
        root: the folder that holds main.py.

    Returns:
        The new folder.

    Raises:
        UserError: it cannot be written.
    """
    revision = run_dir.revision(root)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
    name = f"{stamp}-{revision.split('+')[0]}"
    try:
        target_folder.mkdir(parents=True, exist_ok=True)
        target = _new_folder(target_folder, name)
        for file in files(root):
            _copy(root, target, file)
        for folder in LINKED:
            if (root / folder).is_dir():
                (target / folder).symlink_to((root / folder).resolve(), target_is_directory=True)
        (target / run_dir.REVISION_FILE).write_text(revision + "\n", encoding="utf-8")
        (target / "uncommitted.diff").write_bytes(run_dir.git(root, "diff", "--binary", "HEAD") or b"")
    except OSError as error:
        raise UserError(f"{target_folder}: the code cannot be copied there ({error.strerror or error})") from error
    return target


def files(root: Path = ROOT) -> list[str]:
    """Relative paths of what belongs to the working tree; big files that git does not track are named and left out."""
    if run_dir.revision(root) == "unknown":
        return _walk(root)
    tracked = _names(run_dir.git(root, "ls-files", "-c", "-z"))
    others = _names(run_dir.git(root, "ls-files", "-o", "--exclude-standard", "-z"))
    found = [name for name in tracked if os.path.lexists(root / name)]
    for name in others:
        size = os.lstat(root / name).st_size if os.path.lexists(root / name) else 0
        if size > BIGGEST:
            print(f"note: {name} ({size >> 20} MB, not in git) is not copied for the job", file=sys.stderr)
        elif not name.endswith("/"):  # a repository inside ours
            found.append(name)
    return sorted(name for name in set(found) if name.split("/")[0] not in LINKED and "/jobs/" not in f"/{name}")


def _walk(root: Path) -> list[str]:
    """The code of a copy that is not a git repository."""
    found = []
    for top in _WITHOUT_GIT:
        if (root / top).is_file():
            found.append(top)
        for folder, folders, names in os.walk(root / top):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            found += [os.path.relpath(os.path.join(folder, name), root) for name in names]
    return sorted(found)


def _copy(root: Path, target: Path, name: str) -> None:
    source, copy = root / name, target / name
    if source.is_dir() and not source.is_symlink():  # a submodule
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink() and not source.resolve().is_relative_to(root.resolve()):
        copy.symlink_to(source.resolve())
        return
    with contextlib.suppress(FileNotFoundError):  # removed while we copy
        shutil.copy2(source, copy, follow_symlinks=False)


def _new_folder(parent: Path, name: str) -> Path:
    number = 1
    while True:
        target = parent / (name if number == 1 else f"{name}-{number}")
        try:
            target.mkdir()
        except FileExistsError:
            number += 1
        else:
            return target


def _names(answer: bytes | None) -> list[str]:
    return [os.fsdecode(name) for name in (answer or b"").split(b"\0") if name]
