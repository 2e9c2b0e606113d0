"""`python main.py convert SRC --config EXP --out FILE`: make one of our checkpoints from published weights.

`eval`, `predict` and `model.pretrained` take the file, and they take foreign files directly, too. Converting reports
once what fits and keeps the result. Without --config and --out it only reports what the file is and which model it
implies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from anal_tools import text
from utils.errors import UserError
from utils.options import Parser

if TYPE_CHECKING:
    from torch import nn


def main(argv: list[str]) -> int:
    """Parse the command line and convert the weights."""
    parser = Parser(
        prog="main.py convert",
        description="Convert published weights into a checkpoint. Without --config, only describe them.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="weights file of any kind, or a Hugging Face folder")
    parser.add_argument("--probe", type=Path, metavar="FILE", help="V-JEPA 2: the probe for the encoder in SRC")
    parser.add_argument("--config", type=Path, metavar="EXP", help="experiment folder or config of the model to fill")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file of the checkpoint; must not exist yet")
    parser.add_argument("--family", default="auto", help="project whose names the file uses (default: detected)")
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="OPTION",
        help="keep the config's value of this option, even if the family's published weights have a different one",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")

    args = parser.parse_args(argv)
    if (args.config is None) != (args.out is None):
        raise UserError("convert: give both --config EXP and --out FILE, or neither to see what the file is")

    if args.config is None:
        print(describe(args.source, args.family))
        return 0
    print(convert(args.source, args.config, args.out,
                  family=args.family, accept=args.accept, overrides=args.set, probe=args.probe))  # fmt: skip
    return 0


def describe(source: Path, family: str) -> str:
    """Return which weights a file holds, and the lines of a config that it implies."""
    from methods import interop

    name, options = interop.what_is(source, family=family)
    top = ("type", "backbone", "num_class")
    lines = [f"{source}: names of {name}", "common:", "    model:"]
    lines += [f"        {key}: {options[key]}" for key in top if key in options]
    kwargs = ", ".join(f"{key}: {value}" for key, value in options.items() if key not in top)
    lines += [f"        kwargs: {{{kwargs}}}"] if kwargs else []

    # Shapes of tensors show neither frames nor sampling
    unknown = [key for key in top if key not in options]
    lines += [f"not shown by any tensor: {', '.join([*unknown, 'the number of frames and their sampling'])}"]
    return "\n".join(lines)


def convert(
    source: Path,
    exp: Path,
    out: Path,
    *,
    family: str,
    accept: list[str],
    overrides: list[str] | None = None,
    probe: Path | None = None,
) -> str:
    """Fill the model of a config with published weights and write a checkpoint.

    A file with a different number of classes fills everything except the classifier, which keeps its random values.

    Returns:
        The report to print.

    Raises:
        UserError: the file cannot be read, or leaves more than the classifier unfilled; `out` exists.
    """
    import torch

    import methods
    from datasets.lists.class_names import read_class_names
    from methods import interop
    from methods.interop import hf, provenance
    from utils import checkpoint, config, run_dir
    from utils.engine.network import model_arguments

    # Before anything is read or built
    if out.exists():
        raise UserError(f"{out} exists; remove it or give another --out")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: there is no such folder for --out")

    # Build the model of the config
    cfg = config.load(exp, overrides or [])
    torch.manual_seed(cfg.seed)  # for a new classifier
    arguments = model_arguments(cfg, pretrained=False)
    model = methods.build(**arguments)

    # fill it; a probe of V-JEPA 2 adds the classifier to the encoder
    opened = interop.open_weights(source, family)
    tensors = opened.tensors | (interop.open_weights(probe, family).tensors if probe else {})
    report = interop.load_tensors(
        model, tensors, source, family=opened.family, classifier=None, accept=accept, needs=opened.needs
    )

    # A Hugging Face folder names its classes: put the classifier's rows into the order of our list
    names = read_class_names(config.class_names_file(cfg), cfg.model.num_class)
    labels = opened.folder.labels if opened.folder and not report.fresh else None
    moved = reorder(model, labels, names, source) if labels else ""

    state = {
        "model": model.state_dict(),
        "config": config.to_dict(cfg),
        "classes": names,
        "step": 0,
        "converted": {"file": source.name, "sha256": hf.digest(source), "family": report.family},
        "initial": provenance.of(source, report.family, opened),
        "code": run_dir.revision(),
        "versions": checkpoint.versions(),
    }
    checkpoint.save(out.parent, out.name, state)

    lines = [f"{source}: names of {report.family}", report.table(), "", options_table(report.implied, arguments)]
    if moved:
        lines.append(f"\n{moved}")
    if report.fresh:
        lines.append(f"\nthe classifier is new: {cfg.model.num_class} classes; train before you evaluate")
    return "\n".join([*lines, f"\nwrote {out}"])


def reorder(model: nn.Module, labels: list[str], names: list[str], source: Path) -> str:
    """Put the rows of a classifier into the order of a list's class names; return a line about it, "" if nothing moved.

    Raises:
        UserError: classes that both have are in a different order, and the names do not match one to one.
    """
    from methods.interop import provenance

    rows = provenance.reordered(labels, names)
    if rows is None:
        return provenance.check_labels(labels, names, source)
    if rows == sorted(rows):
        return ""

    classifier = model.get_submodule("classifier")
    for tensor in classifier.state_dict().values():
        tensor.copy_(tensor[rows].clone())  # in place: state_dict() shares memory with the parameters
    return f"the classifier's {len(rows)} rows are now in the order of the list's class names"


def options_table(implied: Mapping[str, object], arguments: Mapping[str, object]) -> str:
    """Return a table of the options of the model that the file shows, next to the values of the config."""
    rows = [("option", "the file", "the config")]
    rows += [(name, str(value), str(arguments.get(name, "default"))) for name, value in implied.items()]
    return "\n".join(text.columns(rows, left=range(3)))
