"""Write the results of a scan: lists without bad files, scan.json, a page, and a few lines for the terminal."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from datasets.lists.class_names import read_class_names
from datasets.lists.records import Records
from datasets.loading.bad_media import printable
from datasets.scan.journal import ScanEntry
from utils import files
from utils.errors import UserError

SUMMARY, PAGE = "scan.json", "index.html"
_NAMED = 10  # bad files named in the terminal
_BINS = 12  # of a histogram


def clean_name(list_file: str | os.PathLike[str]) -> str:
    """Return the name of the list without bad files that a scan writes."""
    return f"{Path(list_file).stem}.clean.txt"


def write(
    out: Path,
    lists: Sequence[Records],
    entries: Sequence[list[ScanEntry]],
    groups: Sequence[ScanEntry],
    *,
    level: str,
    classes: Path | None,
    seconds: float,
) -> files.Row:
    """Write all results below `out`, each file under a different name first.

    Args:
        out: folder of the scan.
        lists: the lists that were scanned.
        entries: for each list, the result of each record.
        groups: the result of `same_content`.
        level: how much was decoded.
        classes: file of class names; None looks for classInd.txt next to each list.
        seconds: how long the scan took.

    Returns:
        The content of scan.json.
    """
    from datasets.scan import page as scan_page

    summary: files.Row = {"format": "zoetrope.scan/1", "decode": level, "seconds": round(seconds, 1)}
    summary["lists"] = [_of_list(records, rows, classes, level) for records, rows in zip(lists, entries, strict=True)]
    summary["same"] = [_of_group(group, lists) for group in groups]

    for records, rows in zip(lists, entries, strict=True):
        files.write(out / clean_name(records.list_file), _clean(records, rows))
    files.write(out / SUMMARY, json.dumps(summary, indent=1).encode("ascii"))
    files.write(out / PAGE, scan_page.render(summary).encode("utf-8"))

    return summary


def _clean(records: Records, entries: list[ScanEntry]) -> bytes:
    """Return the list without bad files, in its order, with the real number of frames."""
    good = [i for i, entry in enumerate(entries) if not entry["bad"]]
    paths = [os.fsencode(records.path(i)) for i in good]
    # A space or a comma in a path is only unambiguous between tabs.
    separator = b"\t" if any(mark in path for path in paths for mark in (b" ", b",", b"\t")) else b" "
    offsets = bool(np.any(records.starts > 0))

    lines = []
    for i, path in zip(good, paths, strict=True):
        start, listed_frames, frames = int(records.starts[i]), int(records.frames[i]), int(entries[i]["frames"])
        if offsets and 0 < listed_frames < frames:
            frames = listed_frames  # a part of a folder ends where its list ends it
        numbers = [*([start] if offsets else []), frames, *records.labels_of(i).tolist()]
        lines.append(separator.join([path, *(b"%d" % number for number in numbers)]) + b"\n")

    return b"".join(lines)


def _of_list(records: Records, entries: list[ScanEntry], classes: Path | None, level: str) -> files.Row:
    """Return the entry of one list in scan.json."""
    # Bad files have no frames or rates, so they count only as bad.
    good = [entry for entry in entries if not entry["bad"]]
    frames = np.array([entry["frames"] for entry in good], np.int64)
    rates = np.array([entry["fps"] for entry in good])
    videos = [entry for entry in good if entry["kind"] == "video"]

    return {
        "list": str(records.list_file),
        "root": records.root,
        "sha256": records.list_hash,
        "videos": len(entries),
        "good": len(good),
        "repeated": records.duplicates,
        "decode": level,
        "clean": clean_name(records.list_file),
        "several_labels": records.multi_label,
        "reasons": _counted(_kind_of_reason(entry["bad"]) for entry in entries if entry["bad"]),
        **_remarks(records, entries),
        "kinds": _counted(entry["kind"] for entry in good),
        "codecs": _counted(entry.get("codec", "") for entry in videos),
        "formats": _counted(entry.get("format", "") for entry in videos),
        "sizes": _counted(f"{entry['width']}x{entry['height']}" for entry in good),
        "rotated": sum(bool(entry.get("turns")) for entry in good),
        "variable_rate": sum(entry.get("vfr") is True for entry in good),
        "with_audio": sum(bool(entry.get("audio")) for entry in good),
        "frames": _spread(frames),
        "fps": _spread(rates),
        "seconds": _spread(frames / rates),
        "classes": _classes(records, entries, classes),
    }


def _remarks(records: Records, entries: list[ScanEntry]) -> dict[str, list[files.Row]]:
    """Return the remarks on single files: bad, shorter, with a wrong frame count, notes."""
    bad, notes, shorter, wrong_counts = [], [], [], []
    parts = bool(np.any(records.starts > 0))  # in a list with offsets, a record may end before its video does

    for i, entry in enumerate(entries):
        notes += [_named(records, i, note) for note in entry["notes"]]
        if entry["bad"]:
            bad.append(_named(records, i, entry["bad"]))
            continue

        frames, missing, listed_frames = entry["frames"], entry.get("shorter"), int(records.frames[i])
        if missing:
            text = f"its last {missing} of {frames + missing} frames do not decode"
            shorter.append(_named(records, i, text))

        # The list may not promise more frames than there are. Fewer are wrong, too, unless they end a part.
        if listed_frames > frames or (0 <= listed_frames < frames and not parts):
            wrong_counts.append(_named(records, i, f"the list has {listed_frames} frames, but there are {frames}"))

    return {"bad": bad, "notes": notes, "shorter": shorter, "wrong_counts": wrong_counts}


def _named(records: Records, i: int, what: str) -> files.Row:
    return {"path": printable(records.path(i)), "label": int(records.labels[i]), "what": printable(what)}


def _kind_of_reason(reason: str) -> str:
    """Return a reason without its numbers and names, so that equal reasons can be counted."""
    words = reason.split(" (")[0].split(": ")[-1]
    return "".join("#" if letter.isdigit() else letter for letter in words)


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _spread(values: np.ndarray) -> files.Row:
    """Return least, median, most, and a histogram up to the 99th percentile, whose last bin takes the rest."""
    if not len(values):
        return {"least": 0, "median": 0, "most": 0, "bins": [], "step": 0, "from": 0}

    # Without the percentile, one video of ten hours would put all others into the first bin.
    low, high = float(values.min()), float(np.percentile(values, 99))
    step = max((high - low) / _BINS, 1e-9)
    places = np.minimum(((values - low) / step).astype(int), _BINS - 1)
    # Equal values have no width to divide: they are one bin.
    bins = np.bincount(places, minlength=_BINS).tolist() if high > low else [len(values)]

    rounded = {"least": low, "median": float(np.median(values)), "most": float(values.max()), "step": step, "from": low}
    return {name: round(value, 3) for name, value in rounded.items()} | {"bins": bins}


def _classes(records: Records, entries: list[ScanEntry], classes: Path | None) -> list[files.Row]:
    """Return videos and bad videos of each label, from 0 to the highest of the list or of the class names."""
    names = class_names(records, classes)
    count = len(names)
    videos, bad = np.zeros(count, int), np.zeros(count, int)

    for i, entry in enumerate(entries):
        videos[records.labels_of(i)] += 1
        bad[records.labels_of(i)] += bool(entry["bad"])

    return [
        {"label": label, "name": printable(names[label]), "videos": int(videos[label]), "bad": int(bad[label])}
        for label in range(len(videos))
    ]


def class_names(records: Records, classes: Path | None) -> list[str]:
    """Return the names of the labels of a list, at least up to its highest; numbers if there are no names.

    Args:
        records: the list.
        classes: file of class names; None looks for classInd.txt next to the list, and takes it if it fits.

    Raises:
        UserError: `classes` cannot be read, is not text, or is not a list of class names.
    """
    count = int(max(records.labels_of(i).max() for i in range(len(records)))) + 1
    names: list[str] = []

    beside = Path(records.list_file).parent / "classInd.txt"
    file = classes or (beside if beside.is_file() else None)
    if file is not None:
        try:
            names = _names_in(file, count)
        except UserError:
            if classes is not None:  # a file that was found, not named, may belong to another list
                raise

    return names + [str(label) for label in range(len(names), count)]


def _names_in(file: Path, count: int) -> list[str]:
    """Return all class names of a file: `count` of them, or as many as it has lines."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"--classes: {file}: {error.strerror}") from error

    if b"\0" in data:
        raise UserError(f"--classes: {file} is not a text file; give one with a class name per line")

    try:
        return read_class_names(file, count)
    except UserError:
        return read_class_names(file, sum(bool(line.strip()) for line in data.splitlines()))


def _of_group(group: ScanEntry, lists: Sequence[Records]) -> files.Row:
    members = [
        {
            "list": str(lists[number].list_file),
            "path": printable(lists[number].path(i)),
            "label": int(lists[number].labels[i]),
        }
        for number, i in group["members"]
    ]

    across = len({number for number, _ in group["members"]}) > 1
    return {
        "how": group["how"],
        "across": across,
        "labels_differ": len({member["label"] for member in members}) > 1,
        "members": members,
    }


def in_words(summary: files.Row, out: Path) -> list[str]:
    """Return the result as lines for the terminal."""
    lines = []
    for part in summary["lists"]:
        empty = [row["name"] for row in part["classes"] if not row["videos"] - row["bad"]]
        kinds = ", ".join(f"{count} {kind}s" for kind, count in part["kinds"].items()) or "nothing to read"
        lines.append(f"{part['list']}: {part['good']} of {part['videos']} can be read ({kinds})")
        lines += [f"  bad: {bad['path']}: {bad['what']}" for bad in part["bad"][:_NAMED]]

        if len(part["bad"]) > _NAMED:
            lines.append(f"  and {len(part['bad']) - _NAMED} more, all in {out / SUMMARY}")
        if part["shorter"]:
            first = part["shorter"][0]
            lines.append(f"  {len(part['shorter'])} shorter than their packets promise, such as {first['path']}")

        if part["wrong_counts"]:
            lines.append(
                f"  {len(part['wrong_counts'])} frame counts of the list are wrong; {part['clean']} has the real ones"
            )
        if part["several_labels"]:
            lines.append(f"  {part['clean']} has several labels per video: data.list_layout: path_frames_labels")
        if part["variable_rate"] or part["rotated"]:
            lines.append(
                f"  {part['variable_rate']} with a variable frame rate, {part['rotated']} rotated by their header"
            )

        if empty:
            shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
            lines.append(f"  {len(empty)} of {len(part['classes'])} classes have no readable video: {shown}")

    # Copies across lists spoil an accuracy, so they are named. Those within one list are only counted.
    across = [group for group in summary["same"] if group["across"]]
    if summary["same"]:
        lines.append(f"{len(summary['same'])} groups of files hold the same video, {len(across)} of them across lists")
        for group in across[:_NAMED]:
            lines.append("  " + " = ".join(f"{Path(m['list']).name}: {m['path']}" for m in group["members"][:4]))

    names = ", ".join(part["clean"] for part in summary["lists"])
    lines.append(f"{out}: {PAGE} to look at, {SUMMARY}, {names}")
    return lines
