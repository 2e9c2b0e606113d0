"""Damaged list files of every layout: each is refused in one sentence, or gives records that stay below the root."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from datasets.lists.class_names import read_class_names
from datasets.lists.formats import place_of
from datasets.lists.records import Records
from tests.fuzz import mutators
from utils.errors import UserError

NAME = "list_files"
MODULES = [
    "datasets/lists/class_names.py",
    "datasets/lists/formats.py",
    "datasets/lists/records.py",
]
_CLASSES = 12
_SHOWN = 5

# The first line of an input: which layout is asked for, and the name of the file.
_BOTH = [{"filename": f"v/{n}.mp4", "label": n % _CLASSES, "total_frames": 100 + n, "offset": n} for n in range(20)]
_SEVERAL = [{"frame_dir": f"v {n}", "label": [n % _CLASSES, 0]} for n in range(20)]
_TEXTS: list[tuple[str, str]] = [
    ("auto list.txt", "".join(f"v/{n:03d}.mp4 {n % _CLASSES}\n" for n in range(40))),
    ("auto list.txt", "".join(f"v/{n:03d} {n + 9} {n % _CLASSES}\n" for n in range(40))),
    ("auto list.txt", "".join(f"v/{n:03d} {n} {n + 9} {n % _CLASSES}\n" for n in range(40))),
    ("auto list.txt", "".join(f"a clip of {n}.avi\t{n + 9}\t{n % _CLASSES}\n" for n in range(40))),
    ("auto list.csv", "path,label\n" + "".join(f'"v ""{n}"", x",{n % _CLASSES}\r\n' for n in range(40))),
    ("auto list.txt", "\ufeff\n" + "".join(f"/data/v/{n}.mp4 {n % _CLASSES}\n\n" for n in range(10))),
    ("auto list.json", json.dumps(_BOTH)),
    ("auto list.txt", json.dumps({"metainfo": {}, "data_list": _BOTH[:3]})),
    ("path_labels list.json", json.dumps(_SEVERAL)),
    ("path_labels list.txt", "".join(f"v/{n}.mp4 {n % _CLASSES} 3\n" for n in range(40))),
    ("path_frames_labels list.csv", "".join(f"v {n},{n + 9},{n % _CLASSES},1,2\n" for n in range(40))),
    ("classes names.txt", "".join(f"{n + 1} Class{n}\n" for n in range(_CLASSES))),
    ("classes names.txt", "".join(f"a class {n}\n" for n in range(_CLASSES))),
]
_WORDS = [
    b"..", b"../..", b"/", b"/etc/passwd", b"\0", b"\xff\xfe", b"-1", b"nan", b"label", b'"', b",", b"\t", b" ", b"",
    b"\r", b"\xc2\xb2", b"[{", b"x" * 5000, b"99999999999", b"/data/../x", b"\xe2\x80\xae",
]  # fmt: skip
_JSON_VALUES = [None, True, -1, 2**31, 2**70, 1.5, "", "../x", "a\nb", "\ud800", [], {}, [[1]], "9" * 9, [0] * 3000]


def seeds() -> list[bytes]:
    """One list per layout."""
    return [f"{first}\n{text}".encode() for first, text in _TEXTS]


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Exchange fields of lines or values of entries, or damage the text."""
    first, _, body = data.partition(b"\n")
    how = rng.randrange(10)
    if b"json" in first or body[:1] in b"[{":
        body = _entries(rng, body) if how < 6 else mutators.some(rng, body, mutators.TEXT, 2)
    elif how < 6:
        body = _fields(rng, body)
    else:
        body = mutators.some(rng, body, mutators.TEXT if how < 9 else mutators.BYTES)
    return first + b"\n" + body


def _fields(rng: random.Random, body: bytes) -> bytes:
    rows = body.split(b"\n")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(rows))
        separator = b"\t" if b"\t" in rows[at] else b"," if b"," in rows[at] else b" "
        fields = rows[at].split(separator)
        word = rng.choice((rng.choice(_WORDS), rng.choice(mutators.TEXT_NUMBERS).encode()))
        place = rng.randrange(len(fields))
        match rng.randrange(4):
            case 0:
                fields.insert(place, word)
            case 1:
                del fields[place]
            case _:
                fields[place] = word
        rows[at] = separator.join(fields)
    return b"\n".join(rows)


def _entries(rng: random.Random, body: bytes) -> bytes:
    tree = json.loads(body)
    entries = tree["data_list"] if isinstance(tree, dict) else tree
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(entries))
        if not isinstance(entries[at], dict) or not entries[at]:
            continue
        key = rng.choice(list(entries[at]))
        match rng.randrange(5):
            case 0:
                entries[at] = rng.choice(_JSON_VALUES)
            case 1:
                del entries[at][key]
            case _:
                entries[at][key] = rng.choice(_JSON_VALUES)
    return json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def run(data: bytes, folder: Path) -> str:
    """Load the list, and look at every record as readers do."""
    first, _, body = data.partition(b"\n")
    layout, _, name = first.decode().partition(" ")
    file = folder / name
    file.write_bytes(body)
    try:
        if layout == "classes":
            read_class_names(file, _CLASSES)
            return "ok"
        records = Records.load(file, "/data", num_class=_CLASSES, layout=layout)
    except UserError as error:
        _named(error, file)
        return "stage0" if _is_no_list(body, name) else "refused"
    _examine(records, file)
    return "ok"


def _is_no_list(body: bytes, name: str) -> bool:
    """Whether it is no text, or no JSON where JSON is expected: what the first look at the file refuses."""
    if name.endswith(".json"):
        try:
            json.loads(body.decode("utf-8-sig", "surrogateescape"))
        except (ValueError, RecursionError):
            return True
        return False
    return b"\0" in body or not body.strip()


def _named(error: UserError, file: Path) -> None:
    """Every line of the message names the file and is short enough to be read."""
    for line in str(error).splitlines():
        if str(file) not in line or len(line) > 6000:
            raise AssertionError(f"unclear message: {line[:300]!r}")


def _examine(records: Records, file: Path) -> None:
    for i in range(len(records)):
        full = os.path.normpath(records.full_path(i))
        if not (full + "/").startswith("/data/"):
            raise AssertionError(f"record {i} leaves the root: {full!r}")
        if not all(0 <= label < _CLASSES for label in records.labels_of(i)):
            raise AssertionError(f"record {i} has the labels {records.labels_of(i)}")
    for i in range(0, len(records), max(1, len(records) // _SHOWN)):
        if not place_of(str(file), i).startswith(str(file)):
            raise AssertionError(f"record {i} stands nowhere")
        records.multi_hot(i)
    if sum(map(len, records.members())) < len(records) or int(records.frames.min()) < -1:
        raise AssertionError("columns do not agree")
    copy = Records.from_fd(records.share())
    if [copy.path(i) for i in range(len(copy))] != [records.path(i) for i in range(len(records))]:
        raise AssertionError("the shared copy differs")
    _ = copy.targets
