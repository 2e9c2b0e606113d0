"""`python main.py new PATH --from EXP`: make a new folder, anywhere, with another's config and working scripts."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils import config
from utils.errors import UserError, did_you_mean
from utils.options import Parser

ROOT = Path(__file__).resolve().parents[1]
STARTER = Path("launch/exp.sh")


def main(argv: Sequence[str]) -> int:
    """Make the folder and print what to do next."""
    parser = Parser(prog="main.py new", description="Create a new experiment folder from an existing one.")
    parser.add_argument("path", type=Path, help="the new folder, which may be anywhere")
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="EXP", help="experiment to copy")
    parser.add_argument(
        "--lists", type=Path, metavar="DIR", help="fill in these lists: train.txt, val.txt, classInd.txt"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of the videos of --lists")
    args = parser.parse_args(argv)

    if (args.lists is None) != (args.root is None):
        raise UserError("new: give --lists and --root together: the list files, and the folder of their paths")

    values = {}
    if args.lists:
        from anal_tools import new_lists  # imports numpy, which the launcher does without

        values = new_lists.values_of(args.lists, args.root)

    folder = make(args.path, args.source, values)
    print(f"wrote {folder}: edit config.yaml, then run {shlex.quote(str(folder / 'train.sh'))} local 2")
    return 0


def make(path: Path, source: Path, values: Mapping[str, str] | None = None) -> Path:
    """Write `config.yaml`, `train.sh` and `eval.sh` into a new or empty folder.

    Args:
        path: the folder to make.
        source: experiment folder or YAML file; its config must be valid.
        values: dotted key -> YAML text that replaces a value of the source.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: the source is not valid, the folder is not empty, or it cannot be written.
    """
    if not source.exists():
        raise UserError(
            f"--from {source}: there is no such experiment folder{_nearest(source)}; `main.py list` shows all"
        )
    before = config.load(source)
    file = config.config_file(source).resolve()
    folder = Path(os.path.abspath(path))

    try:
        # An empty folder may have been made for this purpose
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; name another one")
        folder.mkdir(parents=True, exist_ok=True)
        text = f"# Made from {printable(file)}\n{file.read_text(encoding='utf-8-sig')}"
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        # Values of --lists replace those of the source
        if values:
            from anal_tools import new_lists

            new_lists.fill(folder / "config.yaml", values)
        write_scripts(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error

    after = config.load(folder)
    # Relative paths start from the folder of the config, so a copy may mean other files
    for key in ("train_source", "train_root", "val_source", "val_root"):
        if not values and getattr(before, key) != getattr(after, key):
            print(f"note: {key} was next to the old config; write its full path, {getattr(before, key)}")
    return folder


def _nearest(source: Path) -> str:
    """Propose the shipped experiment whose path is most like a mistyped one."""
    known = [str(file.parent.relative_to(ROOT)) for file in (ROOT / "exps").glob("*/*/*/config.yaml")]
    return did_you_mean(f"exps/{str(source).removeprefix('exps/')}", known)


def printable(text: object) -> str:
    """Return a text that stays on one line of a file, whatever characters a path holds."""
    return "".join(sign if sign.isprintable() else " " for sign in str(text))


def write_scripts(folder: Path) -> None:
    """Write `train.sh` and `eval.sh` into an experiment folder."""
    for verb in ("train", "eval"):
        file = folder / f"{verb}.sh"
        file.write_text(script(verb, folder), encoding="utf-8")
        file.chmod(0o755)  # the scripts are called by path


def script(verb: str, folder: Path) -> str:
    """Return the two lines of `train.sh` or `eval.sh`.

    Inside the repository the path to `launch/exp.sh` is relative, so that a clone can be anywhere. A folder elsewhere
    gets the absolute path of this repository.
    """
    # The folder of the script itself, even through a link
    here = '"$(dirname -- "$(readlink -f -- "$0")")"'
    inside = folder.resolve().is_relative_to(ROOT)
    if inside:
        up = Path(os.path.relpath(ROOT, folder.resolve())) / STARTER
        starter = f"{here}/{shlex.quote(str(up))}"
    else:
        starter = shlex.quote(str(ROOT / STARTER))
    return f'#!/bin/sh\nexec {starter} {verb} {here} "$@"\n'
