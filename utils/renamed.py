"""List the old names that configs, checkpoints, results and logs may still contain, with their new names.

No other file of the repository may use the old names; tests/house/test_names.py checks that. They are still read
wherever an earlier version wrote them, and each is reported once per process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from utils import files
from utils.errors import rank_from_environment

#: Config keys: dotted old key -> dotted new key.
CONFIG_KEYS = {"data.facts": "data.metadata"}

#: Config values: dotted new key -> {old value: new value}.
CONFIG_VALUES = {
    "data.sampling": {
        "mm0": "mmaction2_0x",
        "mm1": "mmaction2_1x",
        "pysf": "pyslowfast",
        "seed004": "one_per_segment",
    }
}

#: Files: old name -> new name. A folder that has the old file keeps it, because configs refer to it.
FILES = {"facts.bin": "metadata.bin"}

#: Keys of checkpoints: old -> new.
CHECKPOINT_KEYS = {"best_prec1": "best_metric"}

#: Meters in the `window` of a checkpoint: old -> new.
METERS = {"prec1": "top1", "prec5": "top5"}

#: Curves: old -> new. The curve of one head of a probe ends in `/headNN`.
CURVES = {"acc1_train": "top1_train", "acc5_train": "top5_train", "acc1_val": "top1_val", "acc5_val": "top5_val"}

#: Titles in log.txt: users parse its progress and validation lines, so these keep the old names.
LOG_TITLES = {"top1": "Prec@1", "top5": "Prec@5"}

#: Values of the protocol of a result: key -> {old value: new value}; "preset" is the sampling preset.
PROTOCOL_VALUES = {
    "preset": CONFIG_VALUES["data.sampling"],
    "crops": {"centre_psf": "centre_pyslowfast", "three_psf": "three_pyslowfast", "three_mm": "three_mmaction2"},
    "family": {"psf": "pyslowfast", "mm": "mmaction2"},
    "rounding": {"psf": "pyslowfast", "mm": "mmaction2"},
}

#: Folders of a sweep: old -> new. A sweep that has the old folder keeps it.
FOLDERS = {"cells": "trials"}

#: Keys of a row in a list of attempts or jobs: old -> new.
ROW_KEYS = {"cell": "trial", "words": "argv"}

#: Forms of `dump --as`: old -> new. The folder of a dump holds the old name.
FORMS = {"shards": "packs"}

#: Kinds of a file in the journal of a scan: old -> new.
KINDS = {"shard": "pack"}

_reported: set[str] = set()


def report(where: str, old: str, new: str) -> None:
    """Print once per process that an old name was read. Only rank 0 prints."""
    text = f"{where}: {old} is called {new} now"
    if text not in _reported and rank_from_environment() == 0:
        _reported.add(text)
        print(text, file=sys.stderr, flush=True)


def of_value(key: str, value: object) -> object:
    """Return the new name of a value of a config key."""
    new = CONFIG_VALUES.get(key, {}).get(value) if isinstance(value, str) else None
    if new is None:
        return value
    report(key, str(value), new)
    return new


def of_key(key: str) -> str:
    """Return the new name of a dotted config key."""
    new = CONFIG_KEYS.get(key)
    if new is None:
        return key
    report("config", key, new)
    return new


def config(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested dicts of a config that an earlier version wrote, with the new names. Do not change the input."""
    renamed: dict[str, object] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            renamed[name] = config(value, f"{key}.")
        else:
            # A key never moves to another section
            new = of_key(key)
            renamed[new.removeprefix(prefix)] = of_value(new, value)
    return renamed


def curve(tag: str) -> str:
    """Return the new name of a curve."""
    name, slash, head = tag.partition("/")
    return f"{CURVES.get(name, name)}{slash}{head}"


def checkpoint(state: Mapping[str, object]) -> dict[str, object]:
    """Return the contents of a checkpoint with the new names."""
    renamed = dict(state)
    for old, new in CHECKPOINT_KEYS.items():
        if old in renamed:
            report("checkpoint", old, new)
            renamed[new] = renamed.pop(old)
    window, kept = renamed.get("window"), renamed.get("config")
    if isinstance(window, Mapping):
        renamed["window"] = {METERS.get(name, curve(name)): values for name, values in window.items()}
    if isinstance(kept, Mapping):
        renamed["config"] = config(kept)
    return renamed


def protocol(values: files.Row) -> files.Row:
    """Return the protocol of a result, a dict of plain values, with the new names."""
    renamed = dict(values)
    for key, value in values.items():
        if key == "sampling" and isinstance(value, dict):
            renamed[key] = protocol(value)
        elif isinstance(value, str):
            renamed[key] = PROTOCOL_VALUES.get(key, {}).get(value, value)
    return renamed


def summary(values: Mapping[str, object]) -> dict[str, object]:
    """Return the summary of a result with the new names in its config and its protocol."""
    change = {"config": config, "protocol": protocol}
    return {
        key: change[key](value) if key in change and isinstance(value, dict) else value for key, value in values.items()
    }


def row(values: files.Row) -> files.Row:
    """Return a row of a JSON-lines file with the new names."""
    return {ROW_KEYS.get(key, key): value for key, value in values.items()}


def form(name: str) -> str:
    """Return the new name of a form of `dump --as`."""
    if name in FORMS:
        report("dump --as", name, FORMS[name])
    return FORMS.get(name, name)


def scanned(entry: files.Row) -> files.Row:
    """Return an entry in the journal of a scan with the new names."""
    is_old = isinstance(entry, dict) and entry.get("kind") in KINDS  # the file may hold anything
    return entry | {"kind": KINDS[entry["kind"]]} if is_old else entry
