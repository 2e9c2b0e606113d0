"""Copy the code for a job when it is submitted, so that later edits do not affect a requeued job."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

from utils import run_dir
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("data", "pretrained")  # large, and not code
BIGGEST = 20_000_000  # bytes; a larger file that git does not track is not copied
_WITHOUT_GIT = ("main.py", "anal_tools", "datasets", "launch", "methods", "networks", "utils", "pyproject.toml")


def take(target_folder: Path, root: Path = ROOT) -> Path:
    """Copy the working tree (the files that git tracks or does not ignore) into a new folder.

    Args:
        target_folder: `<exp>/jobs/code`; the copy is `<UTC time>-<revision>` in it. Besides the copied files, it
            holds `REVISION` and `uncommitted.diff`.
        root: the folder that holds main.py.

    Returns:
        The new folder.

    Raises:
        UserError: the copy cannot be written.
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
                # A relative link would not resolve from the copy.
                (target / folder).symlink_to((root / folder).resolve(), target_is_directory=True)

        (target / run_dir.REVISION_FILE).write_text(revision + "\n", encoding="utf-8")
        (target / "uncommitted.diff").write_bytes(run_dir.git(root, "diff", "--binary", "HEAD") or b"")
    except OSError as error:
        raise UserError(f"{target_folder}: the code cannot be copied there ({error.strerror or error})") from error
    return target


def files(root: Path = ROOT) -> list[str]:
    """Return the relative paths of the working tree's files; name and omit big files that git does not track."""
    if run_dir.revision(root) == "unknown":
        return _walk(root)

    tracked = _names(run_dir.git(root, "ls-files", "-c", "-z"))
    others = _names(run_dir.git(root, "ls-files", "-o", "--exclude-standard", "-z"))
    listed = [name for name in tracked if os.path.lexists(root / name)]  # git also lists deleted files

    for name in others:
        size = os.lstat(root / name).st_size if os.path.lexists(root / name) else 0
        if size > BIGGEST:
            print(f"note: {name} ({size >> 20} MB, not in git) is not copied for the job", file=sys.stderr)
        elif not name.endswith("/"):  # a repository inside this one
            listed.append(name)

    # data/ and pretrained/ are linked; jobs/ holds earlier copies of the code.
    return sorted(name for name in set(listed) if name.split("/")[0] not in LINKED and "/jobs/" not in f"/{name}")


def _walk(root: Path) -> list[str]:
    """Return the code files of a copy that is not a git repository."""
    code_files = []
    for top in _WITHOUT_GIT:
        if (root / top).is_file():
            code_files.append(top)
        for folder, folders, names in os.walk(root / top):
            folders[:] = sorted(name for name in folders if name != "__pycache__")  # in place: os.walk skips the others
            code_files += [os.path.relpath(os.path.join(folder, name), root) for name in names]

    return sorted(code_files)


def _copy(root: Path, target: Path, name: str) -> None:
    source, copy = root / name, target / name
    if source.is_dir() and not source.is_symlink():  # a submodule
        return

    copy.parent.mkdir(parents=True, exist_ok=True)
    # A link that leaves the tree must work from the copy too.
    if source.is_symlink() and not source.resolve().is_relative_to(root.resolve()):
        copy.symlink_to(source.resolve())
        return

    with contextlib.suppress(FileNotFoundError):  # removed during the copy
        shutil.copy2(source, copy, follow_symlinks=False)


def _new_folder(parent: Path, name: str) -> Path:
    number = 1
    while True:
        target = parent / (name if number == 1 else f"{name}-{number}")
        # `mkdir` decides, not a check before it: two submissions may run in the same second.
        try:
            target.mkdir()
        except FileExistsError:
            number += 1
        else:
            return target


def _names(answer: bytes | None) -> list[str]:
    return [os.fsdecode(name) for name in (answer or b"").split(b"\0") if name]
