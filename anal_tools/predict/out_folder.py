"""Decide where `predict` may write: it replaces no file of the user, and checks that before it scores."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datasets.loading.bad_media import printable
from utils import files
from utils.errors import UserError

if TYPE_CHECKING:
    from anal_tools.predict.sources import InputVideo

INFER = "infer.json"
WRITTEN = "written.jsonl"  # in --out: names of the subtitles and videos that we may replace, a JSON text each
LONGEST = 1e6  # seconds of a window; longer than any video, and its number of frames is still finite


def check_seconds(**options: float | None) -> None:
    """Check the lengths of windows.

    Raises:
        UserError: one is not a number of seconds.
    """
    for name, value in options.items():
        if value is not None and not (math.isfinite(value) and 0 < value <= LONGEST):
            raise UserError(
                f"predict: --window and --stride are seconds greater than 0 and at most {LONGEST:g}, "
                f"not {value:g} (--{name})"
            )


def check_folder(out: Path) -> None:
    """Check that a folder exists or can be made, without making it.

    Raises:
        UserError: a file is in the way, or the place is not writable.
    """
    # the nearest ancestor that exists
    place = next(path for path in (out, *out.parents) if os.path.lexists(path) or path == path.parent)

    if not place.is_dir():
        raise UserError(f"predict: --out {out}: {place} is not a folder; give another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"predict: --out {out}: {place} is not writable; give another --out")


def file_names(sources: Sequence[InputVideo]) -> list[str]:
    """Return a unique name for the files of each source: its file name without ending, numbered where two are alike."""
    # a name must be printable, so bytes that are not UTF-8 become "?"
    stems = [_stem(source.path).encode("utf-8", "replace").decode() for source in sources]
    all_stems, taken, last = set(stems), set(), dict.fromkeys(stems, 1)

    names = []
    for stem in stems:
        name = stem
        while name in taken or (name != stem and name in all_stems):  # `a-2` may be the name of another source
            last[stem] += 1
            name = f"{stem}-{last[stem]}"
        taken.add(name)
        names.append(name)
    return names


def _stem(path: str) -> str:
    """Return the name of the file behind a path, without ending; of a loop of links the name of the link."""
    try:
        return Path(path).resolve().stem
    except (OSError, RuntimeError):  # RuntimeError up to Python 3.12
        return Path(path).stem


def check_targets(out: Path, names: Iterable[str], endings: Sequence[str], sources: Iterable[str | Path]) -> None:
    """Check that all files may be written: each is missing or from an earlier run, and none is a source of this run.

    Args:
        out: the folder.
        names: from `file_names`.
        endings: endings of the files for each name.
        sources: files that this run reads, lists included.

    Raises:
        UserError: a file is in the way.
    """
    # by identity, since links and other spellings name the same file
    read = {_identity(path) for path in sources} - {None}
    known = written(out)
    for file in (INFER, *(f"{name}{ending}" for name in names for ending in endings)):
        target = out / file
        # the `.tmp` file is written first and would destroy a source of that name
        if any(_identity(path) in read for path in (target, target.with_name(f"{file}.tmp"))):
            raise UserError(f"predict: {printable(str(target))} is itself a source; give another --out")
        # infer.json is ours by its name
        if target.is_dir() if file == INFER else os.path.lexists(target) and file not in known:
            raise UserError(
                f"predict: {printable(str(target))} exists and was not written by an earlier run; "
                "move it away or give another --out"
            )


def written(out: Path) -> set[str]:
    """Return the names of the files in a folder that earlier runs wrote."""
    return {name for name in files.read_lines(out / WRITTEN) if isinstance(name, str)}


def note(out: Path, file: str) -> None:
    """Remember that we wrote a file, so that a later run may replace it."""
    files.append_row(out / WRITTEN, file)


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Return device and inode of the file behind a name, however it is spelled; None if there is no file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
