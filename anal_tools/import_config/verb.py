"""Implement `python main.py import FILE [--out EXP]`: convert a config of MMAction2 (.py) or PySlowFast (.yaml).

A table lists the keys that were kept exactly, those with a different meaning here, and those that were not kept, with
the reason. --out writes it into the folder as `import.txt`. Nothing in the file is executed.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from anal_tools import text
from anal_tools.import_config import mmaction, pyslowfast
from anal_tools.import_config.draft import Draft, table
from anal_tools.new import printable, write_scripts
from utils import config
from utils.errors import UserError
from utils.options import Parser

TABLE = "import.txt"


def main(argv: Sequence[str]) -> int:
    """Parse the command line, convert the config, and print or write the result."""
    parser = Parser(
        prog="main.py import",
        description="Convert a config of MMAction2 or PySlowFast, without running any code in it.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a .py config of MMAction2, a .yaml of PySlowFast")
    parser.add_argument("--out", type=Path, metavar="EXP", help="folder to create; without it nothing is written")
    parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs in the original run, if not in the file")
    args = parser.parse_args(argv)

    if args.gpus is not None and not 0 < args.gpus <= 100_000:
        raise UserError(f"--gpus {args.gpus}: give the number of GPUs in the original run, at least 1")

    draft = convert(args.file, args.gpus)
    lines = [f"{printable(args.file)}:", *(text.one_line(line) for line in table(draft.rows))]
    if args.out is None:
        print(config_text(args.file, draft))
        print("\n".join(lines))
        print("\nnothing was written; --out EXP creates the folder")
        return 0

    folder = write(args.out, args.file, draft, lines)
    print("\n".join(lines))
    print(f"\nwrote {folder}: check its paths, then run {shlex.quote(str(folder / 'train.sh'))} local {_gpus(draft)}")
    return 0


def convert(file: Path, gpus: int | None = None) -> Draft:
    """Return the experiment that a foreign config becomes; its config has passed our own checks.

    Raises:
        UserError: it cannot be converted; the text names file, line or key, and the reason.
    """
    if not file.is_file():
        raise UserError(f"{file}: there is no such file")

    kinds = {".py": mmaction.convert, ".yaml": pyslowfast.convert, ".yml": pyslowfast.convert}
    kind = kinds.get(file.suffix.lower())
    if kind is None:
        raise UserError(f"{file}: neither a .py config of MMAction2 nor a .yaml of PySlowFast")

    draft = kind(file, gpus)
    # Load the result, so that the user never gets a config that our own checks refuse
    with tempfile.TemporaryDirectory() as folder:
        tried = Path(folder) / "config.yaml"
        tried.write_text(config_text(file, draft), encoding="utf-8")
        try:
            config.load(tried)
        except UserError as error:
            raise UserError(f"{file}: gives a config that is refused here: {_without(str(error), folder)}") from error
    return draft


def _without(message: str, folder: str) -> str:
    return message.replace(f"{folder}{os.sep}", "")


def config_text(file: Path, draft: Draft) -> str:
    """Return the text of `config.yaml`."""
    head = [f"Imported from {printable(file.name)} by `python main.py import`; {TABLE} lists changed meanings."]
    head += [f"Their test: eval.sh PARTITION N {draft.test}"] if draft.test else []
    return draft.yaml(head)


def write(out: Path, file: Path, draft: Draft, lines: Sequence[str]) -> Path:
    """Write the experiment folder: config, scripts and the table.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    folder = Path(os.path.abspath(out))
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; name another one")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config_text(file, draft), encoding="utf-8")
        text.write_lines(folder / TABLE, lines)
        write_scripts(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder


def _gpus(draft: Draft) -> str:
    return str(draft.values.get("shards", 1))
