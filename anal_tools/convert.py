"""`python main.py convert SRC --config EXP --out FILE`: weights that others have published as a checkpoint of ours.

`eval`, `predict` and `model.pretrained` take the file, and take foreign files directly too: converting shows once what
fits and keeps the result. Without --config and --out it only says what the file is and which model it implies.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from anal_tools import text
from utils.faults import UserError


def main(argv: list[str]) -> int:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="main.py convert",
        description="Make a checkpoint of ours from published weights; without --config only say what they are.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help=".pth .pth.tar .pyth .pkl .pdparams .safetensors")
    parser.add_argument("--config", type=Path, metavar="EXP", help="experiment folder or config of the model to fill")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the checkpoint goes; must not exist")
    parser.add_argument("--family", default="auto", help="whose names the file has (default: told by the names)")
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="OPTION",
        help="keep the config's value of this option although the family's published weights have another",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    args = parser.parse_args(argv)
    if (args.config is None) != (args.out is None):
        raise UserError("convert: give both --config EXP and --out FILE, or neither to see what the file is")
    if args.config is None:
        print(describe(args.source, args.family))
        return 0
    print(convert(args.source, args.config, args.out, family=args.family, accept=args.accept, overrides=args.set))
    return 0


def describe(source: Path, family: str) -> str:
    """What a weights file is, and the lines of a config that it implies."""
    from methods import interop

    name, options = interop.what_is(source, family=family)
    top = ("type", "backbone", "num_class")
    lines = [f"{source}: names of {name}", "common:", "    model:"]
    lines += [f"        {key}: {options[key]}" for key in top if key in options]
    kwargs = ", ".join(f"{key}: {value}" for key, value in options.items() if key not in top)
    lines += [f"        kwargs: {{{kwargs}}}"] if kwargs else []
    unknown = [key for key in top if key not in options]
    lines += [f"no tensor tells: {', '.join([*unknown, 'the number of frames and their sampling'])}"]
    return "\n".join(lines)


def convert(
    source: Path, exp: Path, out: Path, *, family: str, accept: list[str], overrides: list[str] | None = None
) -> str:
    """Fill the model of a config with published weights and write a checkpoint.

    A file with another number of classes gives everything but the classifier, which keeps its random values.

    Returns:
        The report to print.

    Raises:
        UserError: the file cannot be read, or leaves anything but the classifier unfilled; `out` exists.
    """
    import torch

    import methods
    from datasets.lists.class_names import read_class_names
    from methods import interop
    from utils import checkpoint, config, files, run_dir
    from utils.engine.network import model_arguments

    if out.exists():
        raise UserError(f"{out} exists; remove it or give another --out")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: there is no such folder for --out")
    cfg = config.load(exp, overrides or [])
    torch.manual_seed(cfg.seed)  # for a classifier that is new
    arguments = model_arguments(cfg, pretrained=False)
    model = methods.build(**arguments)
    report = interop.load_weights(model, source, family=family, classifier=None, accept=accept)
    state = {
        "model": model.state_dict(),
        "config": config.to_dict(cfg),
        "classes": read_class_names(config.class_names_file(cfg), cfg.model.num_class),
        "step": 0,
        "converted": {"file": source.name, "sha256": files.sha256(source), "family": report.family},
        "code": run_dir.revision(),
        "versions": checkpoint.versions(),
    }
    checkpoint.save(out.parent, out.name, state)
    lines = [f"{source}: names of {report.family}", report.table(), "", options_table(report.implied, arguments)]
    if report.fresh:
        lines.append(f"\nthe classifier is new: {cfg.model.num_class} classes; train before you evaluate")
    return "\n".join([*lines, f"\nwrote {out}"])


def options_table(implied: Mapping[str, object], arguments: Mapping[str, object]) -> str:
    """Which options of the model the file shows, and what the config says."""
    rows = [("option", "the file", "the config")]
    rows += [(name, str(value), str(arguments.get(name, "default"))) for name, value in implied.items()]
    return "\n".join(text.columns(rows, left=range(3)))
