"""Text lists with several labels per video, as MMAction2's multi_class lists have them.

    path label label ...                `data.list_layout: path_labels`
    path num_frames label label ...     `data.list_layout: path_frames_labels`

They look like other layouts (a label could be a number of frames), so they are read only where the config asks for
them. Fields are separated by tabs, else by commas, else by blanks: the first of these that the list contains. All
numbers at the end of a line belong to it, so paths that end in a blank and a number need tabs or commas.
"""

from __future__ import annotations

from datasets.lists.formats import (
    Columns,
    blocks,
    bounded,
    check_paths,
    is_json,
    is_number,
    read_list,
    record_blocks,
    unquoted,
)
from utils.faults import UserError

LAYOUTS = {"path_labels": "path label [label ...]", "path_frames_labels": "path num_frames label [label ...]"}
_SHOWN = 5  # bad lines named in one message


def read(list_file: str, root: str, layout: str) -> Columns:
    """Read a list of samples in a layout that allows several labels.

    Args:
        list_file: its path; a JSON list says itself which labels are meant and is read as ever.
        root: folder below which all paths must stay, absolute.
        layout: a key of `LAYOUTS`.

    Raises:
        UserError: missing or empty list; lines that do not fit the layout; a path outside `root`.
    """
    try:
        if is_json(list_file):
            columns = read_list(list_file, root)
            if not columns.label_ends:
                columns.add_labels([[label] for label in columns.labels])
            return columns
        return _read_text(list_file, root, layout)
    except FileNotFoundError:
        raise UserError(f"{list_file}: there is no such list file; check its path") from None
    except OSError as error:
        raise UserError(f"{list_file}: the list cannot be read: {error.strerror}") from error


def _separator(list_file: str) -> bytes | None:
    found = {mark for _, lines in blocks(list_file) for mark in (b"\t", b",") for line in lines if mark in line}
    return b"\t" if b"\t" in found else b"," if found else None


def _fields(line: bytes, separator: bytes | None) -> tuple[bytes, list[int]]:
    """The path of a line and the numbers behind it; empty fields at the end (of a spreadsheet) do not count."""
    text = line.strip() if separator is None else line.strip().rstrip(separator + b" ")
    parts = text.split(separator)
    count = 0
    while count < len(parts) - 1 and is_number(parts[-1 - count]):
        count += 1
    path = text.rsplit(separator, count)[0] if count else text
    return unquoted(path) if separator else path, [bounded(part) for part in parts[len(parts) - count :]]


def _read_text(list_file: str, root: str, layout: str) -> Columns:
    separator, first = _separator(list_file), 2 if layout == "path_frames_labels" else 1
    columns, said, bad = Columns(), [], 0
    for records in record_blocks(list_file, separator):
        paths: list[bytes] = []
        numbers: list[list[int]] = []
        for number, line in records:
            path, row = _fields(line, separator)
            if len(row) < first:
                bad += 1
                text = line.strip().decode("utf-8", "replace")[:80]
                said.append(f"{list_file}:{number}: expected `{LAYOUTS[layout]}`, found {text!r}")
                del said[_SHOWN:]
                continue
            if max(map(abs, row)) >= 2**31:
                raise UserError(f"{list_file}:{number}: a number exceeds 32 bits; expected `{LAYOUTS[layout]}`")
            if first == 2 and row[0] < 0:
                raise UserError(f"{list_file}:{number}: num_frames is {row[0]}; it cannot be negative")
            paths.append(path)
            numbers.append(row)
        if paths and not bad:
            _add(columns, paths, numbers, first)
            check_paths(list_file, paths, root, len(columns.labels) - len(paths))

    if bad:
        more = [f"{list_file}: {bad - len(said)} more lines do not fit"] if bad > len(said) else []
        raise UserError("\n".join([*said, *more]))
    if not columns.labels:
        raise UserError(f"{list_file}: the list is empty; expected lines of `{LAYOUTS[layout]}`")
    return columns


def _add(columns: Columns, paths: list[bytes], numbers: list[list[int]], first: int) -> None:
    labels = [row[first - 1 :] for row in numbers]
    frames = [[row[0] for row in numbers]] if first == 2 else []
    columns.add(paths, [*frames, [own[0] for own in labels]])
    columns.add_labels(labels)
