"""Video models, one paper per file: `model.type: tsm` is `methods/tsm.py`.

Rules for every method file (tests/methods/test_contract.py finds new files by itself):

* `build(*, backbone, num_class, num_segments, dropout, pretrained, <its options, with defaults>,
  **backbone_options if it passes options on)`: its docstring names the paper; it returns an `nn.Module` and reads no
  config. `backbone` is a 2D name; methods on 3D networks take the network of the same layout.
* Input (B, C, T, H, W) float of any memory format, output logits (B, K). B clips, T frames, K classes. In training a
  method with an auxiliary head returns an `Output` (`methods/_output.py`).
* `build` ends with `return _backbones.load(model, pretrained, backbone)` (`from methods import _backbones`), which
  fills the model. A method without this call is refused with `pretrained: True`, since its weights would be random.
* Attributes: `backbone`, `classifier` (the last `nn.Linear`), `frames_per_clip` (T).
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn


def names() -> list[str]:
    """Return the names of the method files in this folder: no leading underscore, and a function `build`."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    # by text: an import of every method would load torch and all networks
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
    """Build a model by the name of its file.

    Example: `methods.build(type="tsm", backbone="resnet50", num_class=400, num_segments=8)`.

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
        is a line for the log with the weights it starts from, "" for random ones.

    Raises:
        UserError: unknown type, backbone or option, an option's bad value, or weights that are missing or do not fit.
    """
    from methods import _backbones
    from utils import draws

    known = names()
    if type not in known:
        raise UserError(
            f"model.type: no method called {type!r}{did_you_mean(type, known)}; choose one of {', '.join(known)}"
        )

    # The options of the method, and those of the backbone if the method passes them on.
    method = importlib.import_module(f"{__name__}.{type}")
    options = _options(method.build)
    network = _backbones.function(backbone)
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method.build).parameters.values()):
        options |= _options(network)
    for key in sorted(kwargs.keys() - options):
        there_are = f"{did_you_mean(key, options)}; choose one of {', '.join(sorted(options))}"
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
    # the draws of each Dropout depend on its name in the model, not on a global state
    return draws.prepare(model)


def from_pretrained(path: str | Path, num_class: int | None = None, **options: Any) -> nn.Module:
    """Build and fill the network that a weights file or folder describes.

    Args:
        path: a Hugging Face folder (VideoMAE, V-JEPA 2), an original file of either, one of our checkpoints or an
            experiment folder.
        num_class: K; None: as in the file's classifier. With another number, or without a classifier in the file, the
            classifier is new.
        options: arguments of `build` that replace those of the file, such as `num_segments`, or that the file does not
            show, such as `pooler_heads`.

    Returns:
        The model, in training mode. Its `pretrained_note` names the loaded weights, `pretrained` their origin, and
        `carried` (a dict of tensors) holds what an export needs but no logit depends on.

    Raises:
        UserError: the file cannot be read, contradicts itself, or does not show which network it belongs to.
    """
    import torch

    from methods import _backbones

    source = _backbones.described(Path(path))
    arguments: dict[str, Any] = source.arguments | options | ({} if num_class is None else {"num_class": num_class})

    # the number of heads leaves no trace in the shapes of the tensors
    needed = ["type", "backbone", "num_class", "num_segments", *(["heads"] if source.arguments.get("width") else [])]
    lacking = [key for key in needed if key not in arguments]
    if lacking:
        raise UserError(
            f"{path}: it does not show {', '.join(lacking)}; pass it in the call: from_pretrained(PATH, ...)"
        )

    # Compare shapes on the meta device first: a network that does not fit is never allocated.
    with torch.device("meta"):
        shapes = build(**arguments)
    source.check(shapes.state_dict())

    # Two copies of the weights would be in memory otherwise.
    file, carried = source.path, source.carried
    del source  # frees its tensors; the file is read once more
    model = build(**arguments, pretrained=str(file))
    model.carried = carried  # pyright: ignore[reportArgumentType]
    return model


def _options(function: Any) -> set[str]:
    """Return the names of the parameters that are options of this function, without those that all methods share."""
    shared = {"backbone", "num_class", "num_segments", "dropout", "pretrained"}
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - shared
