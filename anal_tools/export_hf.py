"""`python main.py export EXP --to hf OUT`: write a folder that transformers loads, with the same logits, and a card.

The folder gets its name only after it has been read back: its weights are bit-equal to the checkpoint's, and the
network that its config.json describes gives the same logits.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from anal_tools import model_card
from anal_tools.export_check import clips_to_check, compare, export_form
from utils.errors import UserError

if TYPE_CHECKING:
    import argparse

    from torch import Tensor, nn

    from anal_tools.predict.predictor import Predictor
    from methods.interop._names import Options
    from methods.interop._vit import Architecture

TOLERANCE = 1e-5  # of the logits' largest magnitude, at least 1
# Why logits may differ although the weights are equal, by family
_EPSILONS = {
    "videomae": "transformers' norm after the mean has head_eps: 1e-5",
    "vjepa2": "transformers' pooler has the epsilon of the encoder, head_eps equal to eps",
}
# Class of a network: family, if model.type names a different method
_KINDS = {"VideoMAE": "videomae", "VJEPA2": "vjepa2"}
_PROCESSORS = {"videomae": "VideoMAEImageProcessor", "vjepa2": "VJEPA2VideoProcessor"}


def export(args: argparse.Namespace) -> str:
    """Write the folder; return the lines to print.

    Raises:
        UserError: transformers has no such network, the folder exists, or it would give different logits.
    """
    from anal_tools.predict.predictor import from_experiment
    from methods.interop import hf, provenance
    from methods.probe import Probe
    from utils.dist import World

    overrides = [*args.set, "common.precision=fp32"]
    predictor = from_experiment(args.target, args.checkpoint, overrides, World(), as_is=True)
    net = export_form(predictor.net)
    net = net.alone() if isinstance(net, Probe) else net  # the encoder with its best head
    predictor = dataclasses.replace(predictor, net=net)

    kind = _KINDS.get(type(net).__name__, predictor.about["type"])
    if kind not in hf.FAMILIES.values():
        raise UserError(
            f"export --to hf: transformers has no network for {kind}; it has those of "
            f"{', '.join(hf.FAMILIES.values())}. --to onnx and --to torch take every model"
        )

    results = args.target / "results" if args.target.is_dir() else args.target.parent
    out: Path = args.out or results / f"{kind}_{predictor.about['backbone']}_hf"
    if os.path.lexists(out):
        raise UserError(f"{out} exists; remove it or name another folder")

    # The final name appears only after the check
    temporary = out.with_name(f"{out.name}.tmp")
    # Left by an export that was killed
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # The network: weights and config.json
        carried, extra = carried_tensors(args.predictor, predictor, kind)
        arch = architecture_of(net, predictor)
        try:
            hf.write_folder(
                temporary, family=kind, state=net.state_dict(), arch=arch, labels=predictor.classes,
                carried=carried, extra=extra,
            )  # fmt: skip
        except KeyError as error:
            raise UserError(f"export --to hf: transformers' {kind} has no tensor {error.args[0]}") from error

        # Check it, and add what transformers' users also need
        lines = check(net, temporary, predictor, args, kind)
        (temporary / "preprocessor_config.json").write_text(
            json.dumps(preprocessor(kind, predictor), indent=2) + "\n", encoding="utf-8"
        )
        card = model_card.text(predictor, results, hf.WEIGHTS, hf.digest(temporary / hf.WEIGHTS))
        (temporary / hf.CARD).write_text(card, encoding="utf-8", errors="replace")
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    if kind == "vjepa2" and not carried:
        lines.append(
            "V-JEPA 2's predictor is not in the folder (no logit depends on it; transformers draws a new one): name "
            "the weights that have it with --predictor"
        )
    lines += [line for line in [provenance.licence_line(predictor.initial)] if line]
    lines.append(f"wrote {out}: {hf.CONFIG}, {hf.WEIGHTS}, preprocessor_config.json, {hf.CARD}")
    return "\n".join(lines)


def architecture_of(net: nn.Module, predictor: Predictor) -> Architecture:
    """Return the architecture of a network for its config.json.

    Raises:
        UserError: a form that transformers does not have.
    """
    from methods.interop import _vit

    state = net.state_dict()
    # Options that no tensor shows: modules keep them for this purpose
    options: dict[str, str] = {}
    for module in net.modules():
        options |= getattr(module, "weight_options", {})
    # The pooler of V-JEPA 2 has heads, too
    if options["heads"] != options.get("pooler_heads", options["heads"]):
        raise UserError(
            f"export --to hf: transformers gives the pooler the {options['heads']} heads of the encoder, and this "
            f"model's has {options['pooler_heads']}; --to onnx and --to torch take it"
        )

    return _vit.Architecture(
        **_vit.shape_of(state),
        heads=int(options["heads"]),
        eps=float(options["eps"]),
        bias=_vit.bias_of(state),
        pooling=options.get("pooling", ""),
        pooler_layers=len(_vit.numbers(state, r"pooler\.blocks\.(\d+)\.")),
        frames=predictor.spec.sampling.frames_per_clip,
        side=predictor.spec.crop_size,
    )


def carried_tensors(named: Path | None, predictor: Predictor, kind: str) -> tuple[dict[str, Tensor], Options]:
    """Return V-JEPA 2's predictor and its keys of config.json, from --predictor or from the initial weights if present.

    Raises:
        UserError: the file that --predictor names has none.
    """
    from methods import interop
    from methods.interop import vjepa2

    pretrained = predictor.cfg.model.pretrained if predictor.cfg else False
    path = named or (Path(pretrained) if isinstance(pretrained, str) else None)
    if path is None or kind != "vjepa2" or (named is None and not path.exists()):
        return {}, {}
    try:
        opened = interop.open_weights(path)
    except UserError:
        if named:
            raise
        return {}, {}  # our own checkpoint, which has no predictor

    family = importlib.import_module(f"methods.interop.{opened.family}")
    carried = interop.converted(opened.tensors, family, path).carried
    if named and not carried:
        raise UserError(f"--predictor {named}: it holds no predictor of V-JEPA 2")

    config = opened.folder.config if opened.folder else vjepa2.carried_keys(carried)
    keys = {
        key: value for key, value in config.items() if key.startswith("pred_") and type(value) in (int, float, bool)
    }
    return carried, keys if carried else {}


def check(net: nn.Module, folder: Path, predictor: Predictor, args: argparse.Namespace, kind: str) -> list[str]:
    """Read the folder back and compare weights and logits; return lines to print.

    Raises:
        UserError: they differ.
    """
    import torch

    import methods

    # Compare weights
    again = export_form(methods.from_pretrained(folder))
    other = again.state_dict()
    differing = [name for name, tensor in net.state_dict().items() if not torch.equal(tensor, other[name])]
    assert not differing, f"not written as they are: {differing[:4]}"
    lines = [f"{len(other)} tensors read back, bit-equal"]

    # Compare logits
    ours, theirs = (dataclasses.replace(predictor, net=one) for one in (net, again))
    try:
        return lines + compare(ours, theirs, clips_to_check(args, predictor), tolerance=TOLERANCE)
    except UserError as error:
        rule = _EPSILONS[kind]
        raise UserError(f"{error}. {rule}; a model to be exported is best trained with it") from error


def preprocessor(kind: str, predictor: Predictor) -> dict[str, object]:
    """Return preprocessor_config.json: one centre crop, as transformers' processors do it."""
    spec, colour = predictor.spec, predictor.normalise.keywords
    return {
        "image_processor_type" if kind == "videomae" else "video_processor_type": _PROCESSORS[kind],
        "do_resize": True,
        "size": {"shortest_edge": spec.scale},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": spec.crop_size, "width": spec.crop_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(colour["mean"]),
        "image_std": list(colour["std"]),
    }
