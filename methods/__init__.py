"""Video models, one paper per file: `model.type: tsm` is `methods/tsm.py`.

What every method file keeps (tests/methods/test_contract.py finds new files by itself):

* `build(*, backbone, num_class, num_segments, dropout, pretrained, <its options, with defaults>,
  **backbone_options where it passes options on)`, whose docstring names the paper; it returns an `nn.Module` and knows
  no config. `backbone` is a 2D name; methods on 3D networks take the network of the same layout.
* Input (B, C, T, H, W) float of any memory format, output logits (B, K). B clips, T frames, K classes. In training a
  method with an auxiliary head answers with an `Output` (`methods/_output.py`).
* `build` ends with `return _backbones.load(model, pretrained, backbone)` (`from methods import _backbones`): it fills
  the model. A method that does not call it is refused with `pretrained: True`: it would train from random weights.
* Attributes: `backbone`, `classifier` (the last `nn.Linear`), `frames_per_clip` (T).
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.faults import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn


def names() -> list[str]:
    """The method files of this folder: those without a leading underscore that define `build`."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return [file.stem for file in files if re.search(r"^def build\(", file.read_text(encoding="utf-8"), re.MULTILINE)]


def build(
    *,
    type: str,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.5,
    pretrained: bool | str = False,
    **kwargs: Any,
) -> nn.Module:
    """A model by the name of its file: `methods.build(type="tsm", backbone="resnet50", num_class=400, num_segments=8)`.

    Args:
        type: file name in `methods/`.
        backbone: a key of `networks.BACKBONES`.
        num_class: K.
        num_segments: T, the frames that enter the network per clip.
        dropout: probability before the classifier; 0 for no dropout layer.
        pretrained: False; True for the published ImageNet weights in `pretrained/`; or the path of a weights file, a
            checkpoint or an experiment folder (see `methods/_backbones.py`).
        kwargs: options of the method's own `build` and of the backbone.

    Returns:
        The model on the CPU, contiguous float32, in training mode, (B, C, T, H, W) -> (B, K). Its `pretrained_note`
        is a line for the log: which weights it starts from, "" for random ones.

    Raises:
        UserError: unknown type, backbone or option, an option's bad value, or weights that are not there or do not fit.
    """
    from methods import _backbones
    from utils import draws

    known = names()
    if type not in known:
        raise UserError(
            f"model.type: no method called {type!r}{did_you_mean(type, known)}; there are {', '.join(known)}"
        )
    method = importlib.import_module(f"{__name__}.{type}")
    options = _options(method.build)
    network = _backbones.function(backbone)
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method.build).parameters.values()):
        options |= _options(network)  # the method hands the rest on to its backbone
    for key in sorted(kwargs.keys() - options):
        there_are = f"{did_you_mean(key, options)}; there are {', '.join(sorted(options))}"
        raise UserError(f"model.kwargs.{key}: {type} with {backbone} has no such option{there_are}")
    try:
        model = method.build(
            backbone=backbone,
            num_class=num_class,
            num_segments=num_segments,
            dropout=dropout,
            pretrained=pretrained,
            **kwargs,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    if pretrained and not getattr(model, "pretrained_note", ""):
        raise UserError(
            f"model.pretrained: {type} ignores it and would start from random weights; let its build end with "
            "`return methods._backbones.load(model, pretrained, backbone)`, or set model.pretrained: false"
        )
    return draws.prepare(model)


def from_pretrained(path: str | Path, num_class: int | None = None, **options: Any) -> nn.Module:
    """Build and fill the network that a weights file or folder describes.

    Args:
        path: a Hugging Face folder (VideoMAE, V-JEPA 2), an original file of these, a checkpoint of ours or an
            experiment folder.
        num_class: K; None: that of its classifier. With another number, or without a classifier in the file, the
            classifier is new.
        options: arguments of `build` that replace those of the file, such as `num_segments`, or say what it does not
            show, such as `pooler_heads`.

    Returns:
        The model, in training mode. `pretrained_note` says what was loaded, `pretrained` where it is from, `carried`
        (a dict of tensors) what an export needs and no logit.

    Raises:
        UserError: the file cannot be read, contradicts itself, or does not say which network it is of.
    """
    import torch

    from methods import _backbones

    found = _backbones.described(Path(path))
    arguments = found.arguments | options | ({} if num_class is None else {"num_class": num_class})
    needed = ["type", "backbone", "num_class", "num_segments", *(["heads"] if found.arguments.get("width") else [])]
    lacking = [key for key in needed if key not in arguments]
    if lacking:
        raise UserError(
            f"{path}: it does not show {', '.join(lacking)}; say so in the call: from_pretrained(PATH, {lacking[0]}=...)"
        )
    with torch.device("meta"):
        shapes = build(**arguments)
    found.check(shapes.state_dict())
    model = build(**arguments, pretrained=str(found.path))
    model.carried = found.carried  # pyright: ignore[reportArgumentType]
    return model


def _options(function: Any) -> set[str]:
    """Names of the parameters that are options of this function, not part of what all methods share."""
    shared = {"backbone", "num_class", "num_segments", "dropout", "pretrained"}
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - shared
