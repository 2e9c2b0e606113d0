"""Read the text of a list into columns, in every layout of list files. The layout is found from the whole file.

Layouts, by their fields from the right (numbers are whole):

    path label                     MMAction2 videos, PySlowFast csv
    path num_frames label          TSN, TSM, PaddleVideo and MMAction2 frames
    path offset num_frames label   MMAction2 rawframes with_offset
    JSON                           MMAction2: dicts with a path, `label`, `total_frames`; a list or its `data_list`
    path label label ...           MMAction2 videos, multi_class       `data.list_layout: path_labels`
    path num_frames label ...      MMAction2 rawframes, multi_class    `data.list_layout: path_frames_labels`

The last two look like other layouts (a label could be a number of frames), so they are read only if the config asks
for them. All numbers at the end of a line then belong to it, and a path that ends in a space and a number needs tabs or
commas.

Fields are separated by tabs, commas or spaces: the first of these that gives most lines a label at their end. A csv may
start with a header whose last column is named `label`. Paths may contain the separator. A list has one layout:

* `offset` if more than half of its lines have exactly four fields, of which the last three are numbers. In a list with
  num_frames, paths with one space and a number at the end, such as `clip 12`, look the same: separate by tabs then.
* `num_frames` if more than half of its lines end in two numbers; else `path label`.
* If no path of the list contains the separator, a line with too many numbers is an error, not a path with spaces.
"""

from __future__ import annotations

import itertools
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.errors import UserError

_BLOCK = 1 << 20  # bytes read at a time
_SHOWN = 5  # bad lines named in one message
_MOST_DIGITS = 20  # enough for 64 bits
_LAYOUTS = {1: "path label", 2: "path num_frames label", 3: "path offset num_frames label"}
#: `data.list_layout` -> layout with several labels.
SEVERAL = {"path_labels": "path label [label ...]", "path_frames_labels": "path num_frames label [label ...]"}
_LABEL_WORDS = {b"label", b"labels", b"class", b"class_id", b"class_index", b"class_idx", b"label_id", b"target"}
_PATH_KEYS = ("filename", "frame_dir", "video_dir", "img_dir", "path")


@dataclass
class Columns:
    """The records of a list, one row each.

    Attributes:
        paths: all paths, one after the other, without separators.
        ends: where each path ends in `paths`, after a leading 0.
        labels: class numbers, not yet checked against num_class.
        frames: number of frames, empty if the list has none.
        starts: first frame, empty if the list has none.
        keys: hash of each record, to count duplicates.
        all_labels, label_ends: every label of every video, and where those of each video end, after a leading 0; empty
            if each video has one label.
    """

    paths: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("q", [0]))
    labels: array[int] = field(default_factory=lambda: array("i"))
    frames: array[int] = field(default_factory=lambda: array("i"))
    starts: array[int] = field(default_factory=lambda: array("i"))
    keys: array[int] = field(default_factory=lambda: array("q"))
    all_labels: array[int] = field(default_factory=lambda: array("i"))
    label_ends: array[int] = field(default_factory=lambda: array("q"))

    def add(self, paths: list[bytes], numbers: Sequence[Sequence[int]]) -> None:
        """Append rows; `numbers` are columns: (starts, frames, labels), (frames, labels) or (labels,)."""
        self.labels.extend(numbers[-1])
        if len(numbers) > 1:
            self.frames.extend(numbers[-2])
        if len(numbers) > 2:
            self.starts.extend(numbers[-3])
            self.keys.extend(map(hash, zip(paths, numbers[-3], strict=True)))
        else:
            self.keys.extend(map(hash, paths))

        ends = np.cumsum(np.fromiter(map(len, paths), np.int64, len(paths))) + self.ends[-1]
        self.ends.frombytes(ends.tobytes())
        self.paths += b"".join(paths)

    def add_labels(self, labels: Sequence[Sequence[int]]) -> None:
        """Append all labels of each of the rows that were added last."""
        if not self.label_ends:
            self.label_ends.append(0)
        for row_labels in labels:
            self.all_labels.extend(row_labels)
            self.label_ends.append(len(self.all_labels))

    def duplicates(self) -> int:
        """Return how many records repeat an earlier one. Call it once, since it sorts the keys in place."""
        # 64-bit hashes of different paths do not collide in lists of this size. Sorting in place saves memory.
        keys = np.frombuffer(self.keys, np.int64)
        keys.sort()
        return int(np.count_nonzero(keys[1:] == keys[:-1]))


def read_list(list_file: str, root: str, layout: str = "auto") -> Columns:
    """Read a list of samples.

    Args:
        list_file: path of the list.
        root: folder below which all paths must stay, absolute.
        layout: "auto", or a key of `SEVERAL`. A JSON list shows by itself which labels it means.

    Raises:
        UserError: the list is missing, empty or unreadable, a line does not fit the layout of the others, or a path
            leads out of `root`. The message has the file, the line and what was expected.
    """
    try:
        if is_json(list_file):
            columns = _read_json(list_file, root)
            # The config asks for several labels, even if every video here has one.
            if layout != "auto" and not columns.label_ends:
                columns.add_labels([[label] for label in columns.labels])
            return columns
        return _read_text(list_file, root) if layout == "auto" else _read_labels(list_file, root, layout)
    except FileNotFoundError:
        raise UserError(f"{list_file}: there is no such list file; check its path") from None
    except OSError as error:
        raise UserError(f"{list_file}: the list cannot be read: {error.strerror}") from error


def place_of(list_file: str, record: int) -> str:
    """Return the place of a record for messages: `file:line`, or `file: entry n` of a JSON list."""
    if is_json(list_file):
        return f"{list_file}: entry {record + 1}"
    # Records do not keep their line: reading the list again costs only after an error.
    separator = _survey_all(list_file)[0]
    for seen, (number, _) in enumerate(_records(list_file, separator)):
        if seen == record:
            return f"{list_file}:{number}"
    raise IndexError(record)


# ----------------------------------------------------------------------------------------------------------------- text


def blocks(list_file: str) -> Iterator[tuple[int, list[bytes]]]:
    """Yield lines in blocks, each with the number of its first line; with blank lines, without a byte order mark."""
    number, rest = 1, b""
    with open(list_file, "rb") as f:
        while block := f.read(_BLOCK):
            if number == 1 and not rest:
                block = block.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in block:
                raise UserError(f"{list_file}: this is not a text file in UTF-8; expected lines of `{_LAYOUTS[2]}`")

            lines = (rest + block).split(b"\n")
            rest = lines.pop()  # a line that the next block completes
            yield number, lines
            number += len(lines)
    if rest:
        yield number, [rest]


def record_blocks(list_file: str, separator: bytes | None) -> Iterator[list[tuple[int, bytes]]]:
    """Yield (line number, line) of the records, neither blank nor header, in blocks with at least one."""
    is_first = True
    for start, lines in blocks(list_file):
        rows = [(number, line) for number, line in enumerate(lines, start) if line and not line.isspace()]

        if is_first and rows:
            is_first = False
            if is_header(rows[0][1], separator):
                del rows[0]
        if rows:
            yield rows


def _records(list_file: str, separator: bytes | None) -> Iterator[tuple[int, bytes]]:
    """Return (line number, line) of every record."""
    return itertools.chain.from_iterable(record_blocks(list_file, separator))


def record_lines(list_file: str) -> Iterator[tuple[int, bytes]]:
    """Return (line number, line) of every record of a list whose lines have one label each."""
    return _records(list_file, _layout_of(list_file)[0])


def is_header(line: bytes, separator: bytes | None) -> bool:
    """Return True if the last field is a word for `label`."""
    fields = line.strip().split(separator)
    return len(fields) > 1 and fields[-1].strip(b' "\t').lower() in _LABEL_WORDS


def is_number(text: bytes) -> bool:
    """Return True if a field is a whole number, perhaps negative."""
    if text.isdigit():
        return True
    text = text.strip()
    return text.isdigit() or (text[:1] == b"-" and text[1:].isdigit())


def bounded(text: bytes) -> int:
    """Return a whole number. More than 20 digits give 2**63, since Python refuses to read thousands of digits."""
    return int(text) if len(text) <= _MOST_DIGITS else 2**63


def _shape(line: bytes, separator: bytes | None) -> tuple[int, int]:
    """Return the number of fields (at most 5), and how many of the last three are numbers. One field is the path."""
    parts = line.rsplit(separator, 4)

    numbers = 0
    # From the right, without the first field: that is part of the path.
    for part in parts[:0:-1]:
        if numbers == 3 or not is_number(part):
            break
        numbers += 1

    return len(parts), numbers


def _survey(list_file: str, separator: bytes | None) -> Counter[tuple[int, int]]:
    """Count the lines of each shape."""
    shapes: Counter[tuple[int, int]] = Counter()
    for _, lines in blocks(list_file):
        # The common shapes take no call per line, since lists may have millions of lines.
        for line in lines:
            parts = line.rsplit(separator, 4)
            count = len(parts)
            if count == 3 and parts[2].isdigit() and parts[1].isdigit():
                shapes[3, 2] += 1
            elif count == 2 and parts[1].isdigit():
                shapes[2, 1] += 1
            elif line and not line.isspace():
                shapes[_shape(line, separator)] += 1

    # The header is not a record. It is the first line that is not blank, if it is there.
    for _, lines in blocks(list_file):
        for line in lines:
            if line and not line.isspace():
                if is_header(line, separator):
                    shapes[_shape(line, separator)] -= 1
                return +shapes
    return shapes


def _survey_all(list_file: str) -> tuple[bytes | None, Counter[tuple[int, int]]]:
    """Return the separator that gives most lines a label, and the shapes of the lines under it."""
    separators: set[bytes] = set()
    with open(list_file, "rb") as f:
        # A search in whole blocks is much faster than one in each line.
        while block := f.read(_BLOCK):
            separators |= {separator for separator in (b"\t", b",") if separator in block}

    best: tuple[bytes | None, Counter[tuple[int, int]]] | None = None
    most = -1
    for separator in [*sorted(separators), None]:  # tab, comma, spaces
        shapes = _survey(list_file, separator)
        labelled = sum(count for (_, numbers), count in shapes.items() if numbers)
        if labelled > most:
            best, most = (separator, shapes), labelled
    assert best is not None
    return best


def _numbers_per_line(shapes: Counter[tuple[int, int]]) -> int:
    """Return the layout of the whole list: 1, 2 or 3 numbers per line."""
    total = shapes.total()
    if shapes[4, 3] * 2 > total:
        return 3
    if sum(count for (_, numbers), count in shapes.items() if numbers >= 2) * 2 > total:
        return 2
    return 1


def _fits(shape: tuple[int, int], layout: int, blanks_in_paths: bool) -> bool:
    fields, numbers = shape
    if numbers < layout or (layout == 3 and fields != 4):
        return False
    # Without spaces in paths, one more number than the layout has is an error, not a part of the path.
    return blanks_in_paths or numbers == layout or fields != numbers + 1


def _read_text(list_file: str, root: str) -> Columns:
    # First the layout, then all lines in blocks: a list of millions of lines is never in memory as text.
    separator, layout = _layout_of(list_file)
    columns = Columns()
    for records in record_blocks(list_file, separator):
        rows = [line.rsplit(separator, layout) for _, line in records]
        paths = [unquoted(row[0]) if separator else row[0].strip() for row in rows]

        # Convert whole columns at once, and look for the bad number only after an error.
        try:
            columns.add(paths, [[int(row[k]) for row in rows] for k in range(1, layout + 1)])
        except (OverflowError, ValueError):
            wrong = next((k for k, row in enumerate(rows) if _exceeds(row[1:])), 0)
            where = f"{list_file}:{records[wrong][0]}"
            raise UserError(f"{where}: a number exceeds 32 bits; expected `{_LAYOUTS[layout]}`") from None
        check_paths(list_file, paths, root, len(columns.labels) - len(paths))

    for name, column in (("num_frames", columns.frames), ("offset", columns.starts)):
        if column and min(column) < 0:
            record = next(i for i, value in enumerate(column) if value < 0)
            raise UserError(f"{place_of(list_file, record)}: {name} is {column[record]}; it cannot be negative")

    return columns


def _layout_of(list_file: str) -> tuple[bytes | None, int]:
    """Return the separator and the layout (numbers per line) of a list. Raise UserError if lines do not fit it."""
    separator, shapes = _survey_all(list_file)
    if not shapes:
        raise UserError(f"{list_file}: the list is empty; expected lines of `{_LAYOUTS[2]}`")

    layout = _numbers_per_line(shapes)
    # Only lines that fit the layout show whether a path contains the separator.
    blanks_in_paths = any(fields > numbers + 1 for fields, numbers in shapes if numbers >= layout)
    bad = sum(count for shape, count in shapes.items() if not _fits(shape, layout, blanks_in_paths))
    if bad:
        _refuse(list_file, separator, layout, blanks_in_paths, bad)

    return separator, layout


def _exceeds(fields: list[bytes]) -> bool:
    """Return True if one of these whole numbers does not fit into 32 bits."""
    digits = [field.strip().lstrip(b"+-") for field in fields]
    return any(text.isdigit() and bounded(text) >= 2**31 for text in digits)


def unquoted(text: bytes) -> bytes:
    """Return a csv field without its quotes."""
    text = text.strip()
    if len(text) > 1 and text[:1] == text[-1:] == b'"':
        return text[1:-1].replace(b'""', b'"')  # a quote inside a field is doubled
    return text


def _refuse(list_file: str, separator: bytes | None, layout: int, blanks: bool, bad: int) -> None:
    """Raise UserError that names the first bad lines."""
    messages = []
    for number, line in _records(list_file, separator):
        if not _fits(_shape(line, separator), layout, blanks):
            text = line.strip().decode("utf-8", "replace")
            messages.append(f"{list_file}:{number}: expected `{_LAYOUTS[layout]}`, found {text[:80]!r}")
            if len(messages) == _SHOWN:
                break

    if bad > len(messages):
        messages.append(f"{list_file}: {bad - len(messages)} more lines do not fit")

    messages[-1] += "; a list has one layout: correct these lines, or separate all fields by tabs"
    raise UserError("\n".join(messages))


def check_paths(list_file: str, paths: list[bytes], root: str, before: int) -> None:
    """Refuse empty paths, and paths that leave the root. `before` is the number of earlier records."""
    joined = b"\n" + b"\n".join(paths) + b"\n"
    if b".." not in joined and b"\n/" not in joined and b"\n\n" not in joined:
        return  # the usual case, at the speed of a search: no path could leave the root

    base = os.fsencode(root).rstrip(b"/") + b"/"
    for i, path in enumerate(paths):
        if path and ((path.startswith(base) or path[:1] != b"/") and b".." not in path):
            continue
        # `normpath` follows no links: a link may lead out of the root, a path may not.
        full = os.path.normpath(os.path.join(base, path))
        if not path or not (full + b"/").startswith(base):
            where = place_of(list_file, before + i)
            if not path:
                raise UserError(f"{where}: the path is empty")
            raise UserError(f"{where}: {os.fsdecode(path)!r:.200} leads out of the root {root}; give a path below it")


# ------------------------------------------------------------------------------------------------------- several labels


def _separator(list_file: str) -> bytes | None:
    # The text alone decides here: the layout is known, so no survey is needed.
    marks = {mark for _, lines in blocks(list_file) for mark in (b"\t", b",") for line in lines if mark in line}
    return b"\t" if b"\t" in marks else b"," if marks else None


def _fields(line: bytes, separator: bytes | None) -> tuple[bytes, list[int]]:
    """Return the path of a line and the numbers after it, without the empty fields that spreadsheets add."""
    text = line.strip() if separator is None else line.strip().rstrip(separator + b" ")
    parts = text.split(separator)

    count = 0
    while count < len(parts) - 1 and is_number(parts[-1 - count]):
        count += 1

    path = text.rsplit(separator, count)[0] if count else text
    return unquoted(path) if separator else path, [bounded(part) for part in parts[len(parts) - count :]]


def _read_labels(list_file: str, root: str, layout: str) -> Columns:
    separator, first = _separator(list_file), 2 if layout == "path_frames_labels" else 1
    columns, messages, bad = Columns(), [], 0

    # After the first bad line the rest is only searched for more of them.
    for records in record_blocks(list_file, separator):
        paths: list[bytes] = []
        numbers: list[list[int]] = []
        for number, line in records:
            path, row = _fields(line, separator)
            if len(row) < first:
                # Keep counting, but name only the first few lines.
                bad += 1
                text = line.strip().decode("utf-8", "replace")[:80]
                messages.append(f"{list_file}:{number}: expected `{SEVERAL[layout]}`, found {text!r}")
                del messages[_SHOWN:]
                continue
            if max(map(abs, row)) >= 2**31:
                raise UserError(f"{list_file}:{number}: a number exceeds 32 bits; expected `{SEVERAL[layout]}`")
            if first == 2 and row[0] < 0:
                raise UserError(f"{list_file}:{number}: num_frames is {row[0]}; it cannot be negative")
            paths.append(path)
            numbers.append(row)

        if paths and not bad:
            _add_labelled(columns, paths, numbers, first)
            check_paths(list_file, paths, root, len(columns.labels) - len(paths))

    if bad:
        more = [f"{list_file}: {bad - len(messages)} more lines do not fit"] if bad > len(messages) else []
        raise UserError("\n".join([*messages, *more]))
    if not columns.labels:
        raise UserError(f"{list_file}: the list is empty; expected lines of `{SEVERAL[layout]}`")

    return columns


def _add_labelled(columns: Columns, paths: list[bytes], numbers: list[list[int]], first: int) -> None:
    # The first label represents a video if one class is needed, for example in a sampler.
    labels = [row[first - 1 :] for row in numbers]
    frames = [[row[0] for row in numbers]] if first == 2 else []
    columns.add(paths, [*frames, [row_labels[0] for row_labels in labels]])
    columns.add_labels(labels)


# ----------------------------------------------------------------------------------------------------------------- JSON


def is_json(list_file: str) -> bool:
    """Return True if a file is named `.json`, or starts like a list or dict of JSON."""
    with open(list_file, "rb") as f:
        start = f.read(64).removeprefix(b"\xef\xbb\xbf").split()
    opening = b"".join(start)[:2]
    return list_file.endswith(".json") or opening in (b"[{", b'{"')


def _read_json(list_file: str, root: str) -> Columns:
    with open(list_file, encoding="utf-8-sig", errors="surrogateescape") as f:
        try:
            entries = json.load(f)
        except json.JSONDecodeError as error:
            raise UserError(f"{list_file}:{error.lineno}: not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{list_file}: JSON with a number of thousands of digits, or nested too deeply") from None

    if isinstance(entries, dict):
        # MMAction2 1.x puts the list into a dict, next to `metainfo`.
        entries = entries.get("data_list")
    if not isinstance(entries, list):
        raise UserError(f"{list_file}: expected a list of dicts, or a dict with `data_list`")
    if not entries:
        raise UserError(f"{list_file}: the list is empty")

    rows = [_entry(f"{list_file}: entry {i}", entry) for i, entry in enumerate(entries, 1)]
    paths = [_encoded(f"{list_file}: entry {i}", row[0]) for i, row in enumerate(rows, 1)]
    columns = Columns()
    starts, frames, labels = [row[1] for row in rows], [row[2] for row in rows], [row[3] for row in rows]
    columns.add(paths, [starts, frames, [row_labels[0] for row_labels in labels]])

    # A list of length 1 is a single label; a longer one makes the whole list multi-label.
    if any(len(row_labels) > 1 for row_labels in labels):
        columns.add_labels(labels)
    check_paths(list_file, paths, root, 0)
    return columns


def fits_a_line(path: bytes) -> bool:
    """Return True if a list of lines can hold this path. A line feed or NUL would end it."""
    return b"\n" not in path and b"\0" not in path


def _encoded(where: str, path: str) -> bytes:
    """Return the path as the file system has it; bytes that are not UTF-8 were read as U+DC80..U+DCFF."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        raise UserError(f"{where}: {path!r:.200} holds half of a surrogate pair, which is not a file name") from None
    if not fits_a_line(name):
        raise UserError(f"{where}: {path!r:.200} holds a line feed or NUL, which lists cannot hold; rename the file")
    return name


def _entry(where: str, entry: object) -> tuple[str, int, int, list[int]]:
    """Return (path, offset, frames, labels) of one dict of a JSON list."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a dict with a path and `label`")
    path = next((entry[key] for key in _PATH_KEYS if key in entry), None)
    if not isinstance(path, str):
        raise UserError(f"{where}: no path; expected one of the keys {', '.join(_PATH_KEYS)}")

    label = entry.get("label")
    labels: list[Any] = label if isinstance(label, list) and label else [label]
    values = [entry.get("offset", 0), entry.get("total_frames", -1), *labels]
    for key, value in zip(("offset", "total_frames", *["label"] * len(labels)), values, strict=True):
        low = 0 if key == "offset" else -1  # total_frames -1 means unknown; labels are checked with those of all lists
        # bool is an int in Python, but not a number in a list.
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**31:
            raise UserError(f"{where}: `{key}` must be one whole number, found {value!r:.80}")

    return path, values[0], values[1], labels
