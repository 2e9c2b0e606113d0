"""Where `predict` may write: it replaces no file of the user's, and finds what is in the way before it scores."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datasets.loading.bad_media import printable
from utils.faults import UserError

if TYPE_CHECKING:
    from anal_tools.predict_sources import Source

INFER = "infer.json"
WRITTEN = "written.jsonl"  # in --out: names of the subtitles and videos that are ours to replace, a JSON text each
LONGEST = 1e6  # seconds of a window; more frames than any number can count are no window


def check_seconds(**options: float | None) -> None:
    """The lengths of windows.

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
    """A folder that is there or can be made; nothing is made here.

    Raises:
        UserError: a file is in the way, or nothing may be written there.
    """
    place = next(path for path in (out, *out.parents) if os.path.lexists(path) or path == path.parent)
    if not place.is_dir():
        raise UserError(f"predict: --out {out}: {place} is not a folder; give another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"predict: --out {out}: nothing may be written in {place}; give another --out")


def file_names(sources: Sequence[Source]) -> list[str]:
    """A name for the files of each source: its own without ending, numbered where two are alike, each once."""
    stems = [_stem(source.path).encode("utf-8", "replace").decode() for source in sources]
    own, taken, last = set(stems), set(), dict.fromkeys(stems, 1)
    names = []
    for stem in stems:
        name = stem
        while name in taken or (name != stem and name in own):  # `a-2` may be the name of another source
            last[stem] += 1
            name = f"{stem}-{last[stem]}"
        taken.add(name)
        names.append(name)
    return names


def _stem(path: str) -> str:
    """Name of the file behind a path, without ending; of a loop of links the name of the link."""
    try:
        return Path(path).resolve().stem
    except (OSError, RuntimeError):  # RuntimeError up to Python 3.12
        return Path(path).stem


def check_targets(out: Path, names: Iterable[str], endings: Sequence[str], sources: Iterable[str | Path]) -> None:
    """Whether all files may be written: none is a source of this run, none is anything but an earlier run's.

    Args:
        out: the folder.
        names: of `file_names`.
        endings: of the files that each name gets.
        sources: what is read in this run, lists included.

    Raises:
        UserError: a file is in the way.
    """
    read = {_identity(path) for path in sources} - {None}
    known = written(out)
    for file in (INFER, *(f"{name}{ending}" for name in names for ending in endings)):
        target = out / file
        if any(_identity(path) in read for path in (target, target.with_name(f"{file}.tmp"))):
            raise UserError(f"predict: {printable(str(target))} is itself a source; give another --out")
        if target.is_dir() if file == INFER else os.path.lexists(target) and file not in known:
            raise UserError(
                f"predict: {printable(str(target))} is there, and no earlier run wrote it; "
                "move it away or give another --out"
            )


def written(out: Path) -> set[str]:
    """Names of the files in a folder that earlier runs wrote."""
    try:
        lines = (out / WRITTEN).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    found = set()
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that was cut off
            name = json.loads(line)
            found |= {name} if isinstance(name, str) else set()
    return found


def note(out: Path, file: str) -> None:
    """Remember that a file is ours, so that a later run may replace it."""
    with (out / WRITTEN).open("a", encoding="ascii") as lines:
        lines.write(json.dumps(file) + "\n")


def _identity(path: str | Path) -> tuple[int, int] | None:
    """The file behind a name, however it is spelled; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
