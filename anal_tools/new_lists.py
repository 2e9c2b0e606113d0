"""Find the values that `new --lists DIR --root DIR` fills in: the keys that lists and a folder of videos decide."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from datasets.lists import first_look
from datasets.lists.records import Records
from utils import config
from utils.config import yaml_lines
from utils.config.paths import CLASS_FILE
from utils.config.verb import as_yaml
from utils.errors import UserError


def values_of(lists: Path, root: Path) -> dict[str, str]:
    """Return dotted key -> value as YAML text: paths, class names, number of classes, reader, folds.

    Args:
        lists: a folder with train.txt and val.txt, or foldNN_train.txt and foldNN_val.txt.
        root: folder that the paths in the lists start from.

    Raises:
        UserError: there are no such lists, or none of their videos is below the root.
    """
    first = next(iter(sorted(lists.glob("fold*_train.txt"))), None)
    train = lists / "train.txt" if (lists / "train.txt").is_file() else first
    if train is None:
        raise UserError(f"--lists {lists}: holds no train.txt and no foldNN_train.txt; `main.py lists` writes them")
    val = train.with_name(train.name.replace("train.txt", "val.txt"))

    records = [Records.load(file, root, num_class=None) for file in (train, val)]
    # The first video that exists shows the reader, and that the root is right
    path = next(
        (one.full_path(i) for one in records for i in range(len(one)) if os.path.exists(one.full_path(i))), None
    )
    if path is None:
        raise UserError(f"--root {root}: holds none of the videos of {train}, for example {records[0].full_path(0)}")

    names = lists / CLASS_FILE
    # A class without videos counts if classInd.txt names it
    highest = 1 + max(int(one.labels.max()) for one in records)
    lines = (
        sum(bool(line.strip()) for line in names.read_text("utf-8", "replace").splitlines()) if names.is_file() else 0
    )
    values = {
        "model.num_class": str(max(highest, lines)),
        "data.reader": "video" if first_look.is_video(path) else "frames",
    }

    paths = {"train_root": root, "train_source": train, "val_root": root, "val_source": val}
    paths |= {"data.class_names": names} if names.is_file() else {}
    values |= {key: json.dumps(os.path.abspath(path), ensure_ascii=False) for key, path in paths.items()}
    # The source's values describe other videos
    values["data.metadata"] = "null"
    values["data.folds"] = "lists" if train == first else "null"
    return values | ({} if names.is_file() else {"data.class_names": "null"})


def fill(file: Path, values: Mapping[str, str]) -> None:
    """Replace values in a config file; keep comments and the order of the lines if the form of the file allows it.

    Raises:
        UserError: the values do not fit the rest of the config.
    """
    overrides = [f"{key}={value}" for key, value in values.items()]
    expected = config.load(file, overrides)

    before = file.read_text(encoding="utf-8")
    defaults = {"null"}
    # Line by line, which keeps the comments
    text = before.split("\n")
    lines = yaml_lines.read(file).lines
    for key, value in values.items():
        keys = ("common", *key.split("."))
        if keys in lines:
            # Key, value (quoted, or up to a comment), comment
            text[lines[keys] - 1] = re.sub(
                rf"^(\s*{keys[-1]}:\s*)(\"[^\"]*\"|'[^']*'|[^#]*?)(\s+#.*)?$",
                lambda match, value=value: f"{match[1]}{value}{match[3] or ''}",
                text[lines[keys] - 1],
            )
        elif keys[:-1] in lines and value not in defaults:
            # The section exists without the key: add it as the first one
            indent = " " * 4 * (len(keys) - 1)
            text[lines[keys[:-1]] - 1] += f"\n{indent}{keys[-1]}: {value}"

    # Check what the file means now; if it is wrong, write the resolved config, which has no comments
    file.write_text("\n".join(text), encoding="utf-8")
    try:
        if config.to_dict(config.load(file)) == config.to_dict(expected):
            return
    except UserError:
        pass  # a file with several keys in a line
    file.write_text(before, encoding="utf-8")
    body = as_yaml(config.load(file, overrides)).replace("  # --set", "  # --lists, --root")
    file.write_text(f"{before.splitlines()[0]}\n{body}\n", encoding="utf-8")
