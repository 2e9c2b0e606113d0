"""`python main.py config EXP`: print the resolved config, and check the files that it names before a run does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets.lists import first_look
from datasets.lists.class_names import read_class_names
from datasets.lists.records import Records, records_of
from utils.config import Config, check_files, class_names_file, verb
from utils.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Print a config and check its files; see `utils.config.verb.main`."""
    return verb.main(argv, check=problems)


def problems(cfg: Config) -> list[str]:
    """Return everything that would stop a training run: missing files, broken lists, labels, roots, readers.

    A later check skips what an earlier one has found missing.
    """
    messages: list[str] = []
    lists: dict[str, Records] = {}

    with _noted(messages):
        check_files(cfg)

    for split in ("train", "val"):
        if Path(getattr(cfg, f"{split}_source")).is_file():
            with _noted(messages):
                lists[split] = records_of(cfg, split)

    names = class_names_file(cfg)
    if names is not None and names.is_file():
        with _noted(messages):
            read_class_names(names, cfg.model.num_class)
    # The first videos of each list
    for split, records in lists.items():
        if Path(records.root).is_dir():
            with _noted(messages):
                first_look.check_files(cfg, split, records)

    return messages


@contextlib.contextmanager
def _noted(messages: list[str]) -> Iterator[None]:
    """Append the lines of a `UserError` to a list, and continue."""
    try:
        yield
    except UserError as error:
        messages += str(error).splitlines()
