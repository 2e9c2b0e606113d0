"""`python main.py export EXP --to onnx|torch|hf`: write the trained model as a file that runs without this repository.

`--to hf` writes a Hugging Face folder (anal_tools/export_hf.py). The other two write a file with the network and, as
JSON, everything that turns a video into its input (docs/predict.md). The file gets its name only after it has given the
same logits as the checkpoint on real clips.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from anal_tools.export_check import clips_to_check, compare, export_form
from utils.errors import UserError
from utils.options import Parser

if TYPE_CHECKING:
    import torch

    from anal_tools.predict.predictor import ModelMetadata, Predictor

TOLERANCE = 1e-4  # of the logits' largest magnitude, at least 1
METADATA = "zoetrope"  # key of the metadata in the file
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


def main(argv: list[str]) -> int:
    """Parse the command line and export the model."""
    parser = Parser(
        prog="main.py export",
        description="Write the model as an ONNX file, a torch.export file or a Hugging Face folder.",
    )
    parser.add_argument("target", type=Path, metavar="EXP|CKPT", help="experiment folder or checkpoint")
    parser.add_argument("folder", type=Path, nargs="?", metavar="OUT", help="output, like --out")
    parser.add_argument(
        "--to", choices=(*SUFFIXES, "hf"), required=True, help="onnx, torch.export's .pt2, or a Hugging Face folder"
    )
    parser.add_argument("--checkpoint", default=None, metavar="best|latest|FILE", help="default: best, else latest")
    parser.add_argument("--check", nargs="+", default=[], metavar="FILE", help="videos on which the file is compared")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="default: EXP/results/TYPE_BACKBONE.*")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a config value")
    parser.add_argument("--predictor", type=Path, metavar="PATH", help="hf, V-JEPA 2: weights with the predictor")
    args = parser.parse_intermixed_args(argv)

    if args.folder is not None and args.out is not None:
        raise UserError(f"export: {args.folder} and --out {args.out}: give the target only once")
    args.out = args.folder or args.out

    if args.to == "hf":
        from anal_tools import export_hf

        print(export_hf.export(args))
    else:
        print(export(args))
    return 0


def export(args: argparse.Namespace) -> str:
    """Write the file; return the lines to print.

    Raises:
        UserError: no such checkpoint, no onnx, nothing to compare with, or logits that differ from the checkpoint's.
    """
    from anal_tools.predict.predictor import from_experiment
    from utils.dist import World

    # Names are checked twice: loading a model takes long, and the default name needs the model
    if args.out is not None:
        check_out(args.out, args.to)
    overrides = [*args.set, "common.precision=fp32"]  # in whatever precision it was trained
    predictor = from_experiment(args.target, args.checkpoint, overrides, World(), as_is=True)

    net = export_form(predictor.net)
    folder = args.target / "results" if args.target.is_dir() else args.target.parent
    out = args.out or folder / f"{predictor.about['type']}_{predictor.about['backbone']}{SUFFIXES[args.to]}"
    check_out(out, args.to)
    out.parent.mkdir(parents=True, exist_ok=True)

    sources = clips_to_check(args, predictor)
    metadata = metadata_of(predictor)
    # The final name appears only after the comparison
    temporary = out.with_name(f"{out.stem}.tmp{out.suffix}")
    try:
        with quiet():
            program = traced(net, metadata)
            write_onnx(program, metadata, temporary) if args.to == "onnx" else write_torch(program, metadata, temporary)
        with predicting(temporary, args.to, predictor) as exported:
            lines = compare(dataclasses.replace(predictor, net=net), exported, sources, tolerance=TOLERANCE)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)

    shape = " x ".join(map(str, metadata["input"]))
    lines.append(f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB): float32 clips {shape} -> logits")
    return "\n".join(lines)


def check_out(out: Path, kind: str) -> None:
    """Check the name of the file before anything takes time.

    Raises:
        UserError: the ending is not that of the kind of file, or a folder has this name.
    """
    if out.suffix != SUFFIXES[kind]:
        raise UserError(f"{out}: a file for --to {kind} must end in {SUFFIXES[kind]}")
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the name of a file as --out")


def metadata_of(predictor: Predictor) -> ModelMetadata:
    """Return all that turns a video into the input of the network, and its scores into class names."""
    from datasets.plan.described import rule_of_test
    from datasets.plan.views import boxes_by_example
    from datasets.readers.resize import KERNEL
    from utils import checkpoint, run_dir

    spec = predictor.spec
    colour = predictor.normalise.keywords
    return {
        "format": 1,
        "input": ["batch", 3, spec.sampling.frames_per_clip, spec.crop_size, spec.crop_size],
        "axes": "batch, channel (RGB), frame, height, width; a batch is any number of views",
        "values": "pixel / 255, minus mean, divided by std, per channel",
        "mean": list(colour["mean"]),
        "std": list(colour["std"]),
        "views": dataclasses.asdict(spec),
        "frames": rule_of_test(spec.sampling, spec.num_clips),
        "boxes": boxes_by_example(spec),
        "resize": KERNEL,
        "score": "mean over the views of a video of the softmax of the logits",
        "classes": predictor.classes,
        **{key: predictor.about[key] for key in ("type", "backbone", "weights_hash")},
        "code": run_dir.revision(),
        "versions": checkpoint.versions(),
    }


def traced(net: torch.nn.Module, metadata: ModelMetadata) -> torch.export.ExportedProgram:
    """Return the network as a graph for any number of views; both kinds of file are made from it."""
    import torch

    # The batch dimension stays free
    return torch.export.export(net, (example(metadata),), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_onnx(program: torch.export.ExportedProgram, metadata: ModelMetadata, file: Path) -> None:
    """Write one file with the weights and the metadata inside."""
    import torch

    try:
        import onnxscript  # noqa: F401  torch needs it for this
    except ImportError as error:
        raise UserError(
            f"export --to onnx needs the extra export: {sys.executable} -m pip install onnx onnxscript onnxruntime"
        ) from error

    model = torch.onnx.export(
        program,
        (example(metadata),),
        dynamo=True,
        input_names=["clips"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )

    assert model is not None, "with dynamo a model is returned"
    model.model.metadata_props[METADATA] = json.dumps(metadata)
    model.save(os.fspath(file), external_data=False)


def write_torch(program: torch.export.ExportedProgram, metadata: ModelMetadata, file: Path) -> None:
    """Write a torch.export archive; the metadata is its extra file zoetrope.json."""
    import torch

    torch.export.save(program, file, extra_files={f"{METADATA}.json": json.dumps(metadata)})


def example(metadata: ModelMetadata) -> torch.Tensor:
    """Return two clips of seeded noise, (2, C, T, H, W)."""
    import torch

    # Two clips: torch.export would fix a batch of 1
    return torch.randn(2, *metadata["input"][1:], generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters: they warn of their own future and print progress, and the comparison decides anyway."""
    import io
    import logging

    # torch.onnx logs, warns and prints
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def predicting(file: Path, kind: str, like: Predictor) -> Iterator[Predictor]:
    """Yield the new file as a predictor that takes one view at a time, to see that any batch size works."""
    import torch

    from anal_tools.predict.predictor import from_onnx
    from utils.dist import World

    if kind == "onnx":
        exported = from_onnx(file, World(), like=like)
    else:
        with quiet():
            # `load` unpickles what the file has pickled; this file is our own, written a moment ago
            module = torch.export.load(file).module()
        module.eval = lambda: module  # it is in evaluation mode, and its own `eval` raises an error
        exported = dataclasses.replace(like, net=module)
    yield dataclasses.replace(exported, clips=1)
