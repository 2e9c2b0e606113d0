"""`python main.py list [DIR...]`: print all experiments as a table: model, data, cost, and published accuracies.

Parameters and GMACs come from the model that the config builds, on torch's meta device: shapes only, no weights, no
arithmetic. Accuracies are those of `common.published`; none of them was measured here.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anal_tools import history
from anal_tools.text import columns
from utils import config
from utils.errors import UserError
from utils.options import Parser

if TYPE_CHECKING:
    from utils.config import Config

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "exps"
DOCS = Path("docs/models.md")
MARKS = ("<!-- python main.py list --docs -->", "<!-- end of list -->")  # the table is written between these lines
COLUMNS = {  # heading: True for a column of numbers
    "experiment": False,
    "method": False,
    "data": False,
    "frames": True,
    "pixels": True,
    "start": False,
    "GPUs": True,
    "M params": True,
    "GMACs/view": True,
    "top-1 / top-5": True,
    "published by": False,
    "protocol": False,
}
_TOO_WIDE = {"protocol"}  # for a terminal
# Folders of an experiment that may hold copies of configs: code of a job, an earlier run.
_NOT_HERE = {"jobs", "old"}


def main(argv: Sequence[str]) -> int:
    """Print the table, or write it into docs/models.md; return 2 and print the reason if a config could not be used."""
    parser = Parser(
        prog="main.py list",
        description="All experiments with their cost and published accuracy (others', not reproduced here).",
    )
    parser.add_argument("folder", nargs="*", type=Path, help="look below these folders (default: exps/)")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    parser.add_argument("--docs", action="store_true", help=f"write the table of exps/ into {DOCS}")
    args = parser.parse_args(argv)

    if args.docs and args.folder:
        raise UserError(f"--docs writes the table of exps/ into {DOCS}; give no folder with it")

    rows, problems = collect(args.folder)
    if args.docs:
        (ROOT / DOCS).write_text(
            with_table((ROOT / DOCS).read_text(encoding="utf-8"), markdown(rows)), encoding="utf-8"
        )
        print(f"wrote {DOCS}")
    elif rows:
        print(markdown(rows) if args.markdown else text(rows))
    else:
        print("no experiments")

    for problem in problems:
        print(problem, file=sys.stderr)
    return 2 if problems else 0


def collect(folders: Sequence[Path]) -> tuple[list[dict[str, str]], list[str]]:
    """Return a row for each experiment below the folders, and the errors of those that cannot be shown.

    Raises:
        UserError: there is no such folder.
    """
    rows, problems = [], []
    exps = find(folders)
    for number, (exp, name) in enumerate(exps, start=1):
        if sys.stderr.isatty():  # building and counting takes a quarter of a second for each different model
            print(f"\r{number} of {len(exps)}", end="\r" if number == len(exps) else "", file=sys.stderr, flush=True)
        try:
            columns = dict(zip(history.HEADINGS, history.in_words(history.read(exp)), strict=True))
            rows.append(row(name, config.load(exp)) | columns)
        except UserError as error:
            problems.append(str(error))
    return rows, problems


def find(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return (folder, name to show) of each folder with a config.yaml below `folders` (default: exps/)."""
    names: dict[Path, str] = {}
    for place in folders or [EXPERIMENTS]:
        if not place.is_dir():
            raise UserError(f"{place}: there is no such folder")
        for file in sorted(place.rglob("config.yaml")):
            exp = file.parent
            if not _NOT_HERE & set(exp.relative_to(place).parts):
                # Resolved, so that overlapping folders show an experiment once
                names.setdefault(exp.resolve(), str(exp if folders else exp.relative_to(EXPERIMENTS)))
    return [(exp, names[exp]) for exp in sorted(names)]


def row(name: str, cfg: Config) -> dict[str, str]:
    """Return one experiment as texts, in the order of `COLUMNS`.

    Raises:
        UserError: the model cannot be built with these options.
    """
    parameters, macs = cost(cfg)
    published = cfg.published
    accuracy = [f"{value:.2f}" for value in (published.top1, published.top5) if value is not None]

    values = [
        name,
        f"{cfg.model.type} {cfg.model.backbone}",
        data_set(cfg),
        frames(cfg),
        str(cfg.augmentation.input_size),
        start(cfg.model.pretrained),
        str(published.gpus or ""),
        f"{parameters / 1e6:.2f}",
        f"{macs / 1e9:.2f}",
        " / ".join(accuracy),
        published.source or "",
        published.protocol or "",
    ]
    return dict(zip(COLUMNS, values, strict=True))


def data_set(cfg: Config) -> str:
    """Return the folder that the training list belongs to: `kinetics400` for data/kinetics400/lists/train.txt."""
    folder = Path(cfg.train_source).parent
    return folder.parent.name if folder.name == "lists" else folder.name


def frames(cfg: Config) -> str:
    """Return the frames of a clip: `8` from as many segments, `4x16` for four at an interval of 16."""
    segments, length, interval = cfg.model.num_segments, cfg.data.clip_len, cfg.data.frame_interval
    if length == 1:
        return str(segments)
    return f"{length}x{interval}" + (f" x {segments}" if segments > 1 else "")


def start(pretrained: bool | str) -> str:
    """Return the origin of the initial weights in a word or two."""
    if isinstance(pretrained, bool):
        return "ImageNet" if pretrained else "random"
    path = Path(pretrained)
    # Weights of another experiment: the name of its family
    if path.is_relative_to(EXPERIMENTS):
        return path.relative_to(EXPERIMENTS).parts[0].removesuffix("_exps")
    return path.stem.removesuffix(".pth").removesuffix("_pretrained")


def cost(cfg: Config) -> tuple[int, int]:
    """Return parameters, and multiply-accumulates of one view (T frames of input_size) in evaluation, with BN."""
    from utils.engine.network import model_arguments

    # As a sorted tuple, because the cache needs hashable arguments
    arguments = model_arguments(cfg, pretrained=False)
    return _cost(tuple(sorted(arguments.items())), cfg.augmentation.input_size)


@functools.cache
def _cost(arguments: tuple[tuple[str, Any], ...], size: int) -> tuple[int, int]:
    import torch

    import methods
    from methods import macs

    options = dict(arguments)
    with torch.device("meta"):
        model = methods.build(**options)
    # (B, C, T, H, W)
    return macs.count_parameters(model), macs.count_macs(model, (1, 3, options["num_segments"], size, size))


def text(rows: Sequence[dict[str, str]]) -> str:
    """Return the table for a terminal: aligned columns, numbers flush right, without the protocols."""
    shown = [name for name in COLUMNS if name not in _TOO_WIDE]
    shown += [name for name in history.HEADINGS if any(row.get(name) for row in rows)]  # of runs in these folders
    # Headings of `history` are words: not in COLUMNS
    words = [number for number, name in enumerate(shown) if not COLUMNS.get(name)]
    return "\n".join(columns([shown, *([row.get(name, "") for name in shown] for row in rows)], left=words))


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return the table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |"]
    lines.append("|" + "|".join("---:" if number else "---" for number in COLUMNS.values()) + "|")
    lines += ["| " + " | ".join(values[name].replace("|", "\\|") for name in COLUMNS) + " |" for values in rows]
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    """Return a page with the text between the two `MARKS` replaced.

    Raises:
        UserError: the page lacks them.
    """
    first, mark, rest = page.partition(MARKS[0])
    _, ended, last = rest.partition(MARKS[1])
    if not mark or not ended:
        raise UserError(f"{DOCS}: the lines {MARKS[0]} and {MARKS[1]}, which enclose the table, are missing")
    return f"{first}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{last}"
