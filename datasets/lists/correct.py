"""`python main.py lists LIST --drop TABLE --relabel TABLE --out NEW`: write a list without its wrong labels.

A table is a csv with a header, as `report` and `analyze` write it (label_suspects.csv): `path` as the list has it, the
present `label`, the `suggested` one. Delete the rows whose label is right. Change `suggested` if neither is right.
`entry` counts the records of the same path, from 1, for lists that name a video several times.

The new list has the lines of the old one, byte for byte, except for the corrections. The old list does not change.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.lists import formats
from datasets.loading.bad_media import printable
from utils import files
from utils.errors import UserError
from utils.options import Parser

COLUMNS = ("path", "entry", "label", "suggested", "label_name", "suggested_name", "score", "label_score")
_MOST = 2**31  # labels are 32-bit numbers

Key = tuple[bytes, int]  # path, and which of the records with this path, from 1


@dataclass(frozen=True)
class Correction:
    """The correction of one record.

    Attributes:
        where: `file:line` of the table.
        label: the label that the list must have now.
        new: the label that the record gets; None drops it.
    """

    where: str
    label: int
    new: int | None


def main(argv: Sequence[str]) -> int:
    """Correct a list. Return 0."""
    parser = Parser(prog="main.py lists", description="Write a list without its wrong labels.")
    parser.add_argument("list", type=Path, help="the list file")
    parser.add_argument("--drop", type=Path, metavar="TABLE", help="csv of the videos to leave out")
    parser.add_argument("--relabel", type=Path, metavar="TABLE", help="csv of the videos to relabel as suggested")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the new list")
    parser.add_argument("--force", action="store_true", help="overwrite a different file")
    args = parser.parse_args(argv)

    # Read both tables; a video may not be in both.
    by_key: dict[Key, Correction] = {}
    for file, drop in ((args.drop, True), (args.relabel, False)):
        for key, one in (read_table(file, drop=drop) if file else {}).items():
            if key in by_key:
                raise UserError(f"{one.where}: {_shown(key)} is in {by_key[key].where} too; leave it in one of them")
            by_key[key] = one

    # Nothing is written before all corrections fit.
    data, done = corrected(os.fspath(args.list), by_key)
    # The tables may cover several lists, but a list without any correction is a mistake.
    absent = [key for key in by_key if key not in done]

    if not done:
        rows = f"none of the {len(by_key)} videos of the table is in it" if by_key else "the table has no rows"
        raise UserError(f"{args.list}: {rows}; name the list that was evaluated")

    if args.out.exists() and not args.force and args.out.read_bytes() != data:
        raise UserError(f"--out: {args.out} would change; choose another file, or replace it with --force")

    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        files.write(args.out, data)
    except OSError as error:
        raise UserError(f"--out: {error.filename}: {error.strerror}") from error

    dropped = sum(by_key[key].new is None for key in done)
    print(f"{args.out}: {dropped} videos left out, {len(done) - dropped} with a new label")
    if absent:
        more = ", ..." if len(absent) > 3 else ""
        print(f"{len(absent)} videos of the tables are not in {args.list}: {', '.join(map(_shown, absent[:3]))}{more}")
    return 0


def _shown(key: Key) -> str:
    path, entry = key
    return printable(os.fsdecode(path)) + (f" (entry {entry})" if entry > 1 else "")


def read_table(file: Path, *, drop: bool) -> dict[Key, Correction]:
    """Read a table of corrections.

    Args:
        file: csv with a header.
        drop: leave the videos out, and ignore `suggested`.

    Raises:
        UserError: the table has an error; the message has the file and the line.
    """
    needed = ["path", "label"] + ([] if drop else ["suggested"])
    table: dict[Key, Correction] = {}

    try:
        # Spreadsheets write a byte order mark; paths may hold any bytes.
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            rows = csv.DictReader(stream)
            lacking = [name for name in needed if name not in (rows.fieldnames or ())]
            if lacking:
                raise UserError(
                    f"{file}: no column {', '.join(lacking)} in its first line; it has {', '.join(COLUMNS)}"
                )

            for row in rows:
                where = f"{file}:{rows.line_num}"
                entry, label = _number(row, "entry", where, default=1), _number(row, "label", where)
                key = (os.fsencode(row["path"] or ""), entry)
                if key in table:
                    raise UserError(f"{where}: {_shown(key)} is also in {table[key].where}; delete one of the lines")
                table[key] = Correction(where, label, None if drop else _number(row, "suggested", where))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise UserError(f"{file}: this is not a csv file ({error})") from error

    return table


def _number(row: Mapping[str, str | None], name: str, where: str, default: int | None = None) -> int:
    text = (row.get(name) or "").strip()
    # A table without the column `entry` means the first record of a path.
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 11 and int(text) < _MOST):
        raise UserError(f"{where}: {name} is {text!r:.40}; give a whole number, 0 or more")
    return int(text)


def corrected(list_file: str, corrections: Mapping[Key, Correction]) -> tuple[bytes, set[Key]]:
    """Return the new list, and the corrections that were applied.

    Raises:
        UserError: the list cannot be read, or its label is not the one that the table expects.
    """
    columns = formats.read_list(list_file, os.sep)  # paths are not opened, so any root will do
    paths = [bytes(columns.paths[start:end]) for start, end in itertools.pairwise(columns.ends)]
    seen: Counter[bytes] = Counter()
    per_record: list[Correction | None] = []
    done: set[Key] = set()

    for path, label in zip(paths, columns.labels, strict=True):
        seen[path] += 1
        key = (path, seen[path])
        per_record.append(corrections.get(key))
        if key in corrections:
            _check(corrections[key], label, f"{list_file}: {_shown(key)}")
            done.add(key)

    return (_json if formats.is_json(list_file) else _text)(list_file, per_record), done


def _text(list_file: str, per_record: Sequence[Correction | None]) -> bytes:
    """Return the lines of a list with their corrections; blank lines and a header stay."""
    places = {number: one for (number, _), one in zip(formats.record_lines(list_file), per_record, strict=True)}

    lines = []
    for start, block in formats.blocks(list_file):
        for number, line in enumerate(block, start):
            one = places.get(number)
            if one is None:
                lines.append(line + b"\n")
            elif one.new is not None:
                # The label is the number at the end of the line. Keep the bytes around it, such as a carriage return.
                kept = line.rstrip()
                before = kept[: len(kept) - len(re.findall(rb"\d+$", kept)[0])]
                lines.append(before + str(one.new).encode() + line[len(kept) :] + b"\n")

    return b"".join(lines)


def _json(list_file: str, per_record: Sequence[Correction | None]) -> bytes:
    """Return a JSON list with its corrections, in the form that it had."""
    with open(list_file, encoding="utf-8-sig", errors="surrogateescape") as stream:
        whole = json.load(stream)

    kept = []
    for entry, one in zip(whole if isinstance(whole, list) else whole["data_list"], per_record, strict=True):
        if one is None:
            kept.append(entry)
        elif isinstance(entry["label"], list) and len(entry["label"]) > 1:
            raise UserError(f"{one.where}: this video has several labels in {list_file}; correct it by hand")
        elif one.new is not None:
            kept.append(entry | {"label": [one.new] if isinstance(entry["label"], list) else one.new})

    return json.dumps(kept if isinstance(whole, list) else whole | {"data_list": kept}, indent=1).encode("ascii")


def _check(one: Correction, label: int, where: str) -> None:
    if one.label != label:
        raise UserError(
            f"{one.where}: the label is {one.label} here and {label} in {where}; this is a different list, or it was "
            "corrected before"
        )
