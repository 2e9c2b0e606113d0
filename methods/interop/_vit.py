"""Convert what the families of video transformers share: names of blocks, split tensors, options by shape."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.interop._names import Converted, Options

# {our name: their names}; their tensors are parts of our tensor along the first axis.
Table = Mapping[str, tuple[str, ...]]

# {(width, depth, heads, hidden of the MLP): name in networks/}
SIZES = {
    (384, 12, 6, 1536): "vit3d_small",
    (768, 12, 12, 3072): "vit3d_base",
    (1024, 24, 16, 4096): "vit3d_large",
    (1280, 32, 16, 5120): "vit3d_huge",
    (1408, 40, 22, 6144): "vit3d_giant",
}


@dataclass(frozen=True)
class Architecture:
    """Describe one of our networks, for a config.json.

    Attributes:
        width, depth, heads, mlp, patch, tubelet: options of the encoder.
        bias: its option `qkv_bias`.
        eps: epsilon of its norms.
        pooling: option of VideoMAE.
        pooler_layers: option of V-JEPA 2.
        frames: number of frames of a clip.
        side: height and width of its frames, pixels.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    tubelet: int
    bias: str
    eps: float
    pooling: str
    pooler_layers: int
    frames: int
    side: int


_HEADS = {width: heads for width, _, heads, _ in SIZES}
_DEPTHS = {(width, depth) for width, depth, _, _ in SIZES}
_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")


def pairs(ours: str, theirs: str, kinds: Iterable[str] = ("weight", "bias")) -> dict[str, tuple[str, ...]]:
    """Return table entries of a layer whose tensors both sides keep whole."""
    return {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in kinds}


def joined(ours: str, theirs: str, parts: Iterable[str], kinds: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return table entries of a layer that they keep in parts."""
    names = tuple(parts)
    return {f"{ours}.{kind}": tuple(f"{theirs}.{part}.{kind}" for part in names) for kind in kinds}


def numbers(names: Iterable[str], pattern: str) -> range:
    """Return 0, 1, ... up to the highest number that `pattern` finds in the names without a gap before it."""
    matches = (re.match(pattern, name) for name in names)
    # fewer than 6 digits, because int() refuses thousands of them with a ValueError
    present = {int(match[1]) for match in matches if match and len(match[1]) < 6}
    return range(next(number for number in range(len(present) + 1) if number not in present))


def to_ours(state: Mapping[str, Tensor], table: Table) -> Converted:
    """Return a state under our names; a tensor that is incomplete, or whose parts do not fit, stays unknown."""
    result, used = Converted(), set[str]()
    for ours, theirs in table.items():
        parts = [state[name] for name in theirs if name in state]
        # parts can be joined along their first axis only
        if len(parts) < len(theirs) or len({tensor.shape[1:] for tensor in parts}) > 1 or parts[0].dim() == 0:
            continue

        used.update(theirs)
        result.state[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(parts) > 1:
            result.changed[ours] = f"{len(parts)} tensors joined"

    result.unknown = [name for name in state if name not in used]
    return result


def to_theirs(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Return a state under their names, in separate contiguous tensors.

    Raises:
        KeyError: the table lacks a name.
    """
    renamed: dict[str, Tensor] = {}
    for ours, tensor in state.items():
        names = table[ours]
        renamed.update(zip(names, tensor.chunk(len(names)), strict=True))

    # safetensors refuses tensors that share memory
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in renamed.items()}


def shape_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return width, depth, mlp, patch and tubelet as tensors under our names show them; {} if they do not."""
    # (D, C, tubelet, patch, patch) and (hidden, D)
    patch, fc1 = state.get("backbone.patch_embed.weight"), state.get("backbone.blocks.0.mlp.fc1.weight")
    if patch is None or fc1 is None or patch.dim() != 5 or fc1.dim() != 2:
        return {}

    return {
        "width": patch.shape[0],
        "depth": len(numbers(state, _BLOCK.pattern)),
        "mlp": fc1.shape[0],
        "tubelet": patch.shape[2],
        "patch": patch.shape[3],
    }


def published_heads(state: Mapping[str, Tensor], giant: int) -> dict[str, str]:
    """Return the option `heads` of a file without config: the heads of the published network of this width and depth.

    Args:
        state: under our names.
        giant: heads of the family's network of width 1408; for the other widths all families have the same number.
    """
    shape = shape_of(state)
    if (shape.get("width"), shape.get("depth")) not in _DEPTHS:
        return {}
    return {"heads": str(giant if shape["width"] == 1408 else _HEADS[shape["width"]])}


def bias_of(state: Mapping[str, Tensor]) -> str:
    """Return the network's option `qkv_bias`."""
    first = "backbone.blocks.0.attn."
    return "all" if f"{first}qkv.bias" in state else "qv" if f"{first}q_bias" in state else "none"


def ratio(hidden: int, width: int) -> float:
    """Return a ratio whose product with `width`, rounded down, is `hidden`."""
    quotient = hidden / width
    # the rounded quotient may give one less; the next larger float then does not
    while int(width * quotient) < hidden:
        quotient = math.nextafter(quotient, math.inf)
    return quotient


def implied(state: Mapping[str, Tensor], family: str, needs: Mapping[str, str]) -> Options:
    """Return type, backbone, num_class and keys of `model.kwargs`, as far as a file shows them.

    Args:
        state: under our names.
        family: the family of the file's names; "" for one of our models.
        needs: options that no tensor shows, as text.
    """
    # V-JEPA 2 has biases for q, k and v, and these norms; VideoMAE has none for k
    rotary = any(name.startswith(("pooler.", "backbone.norm.")) for name in state) and bias_of(state) == "all"
    method = family or ("vjepa2" if rotary else "videomae")
    heads = needs.get("heads", "")

    options: Options = {"type": method}
    options |= backbone_options(
        state, heads=int(heads) if heads.isdigit() else None, bias="all" if method == "vjepa2" else "qv"
    )

    classifier = state.get("classifier.weight")
    if classifier is not None and classifier.dim() == 2:
        options["num_class"] = len(classifier)

    # Values that differ from the defaults of `build`, so that a config shows only what matters.
    options |= {key: float(needs[key]) for key in ("eps", "head_eps") if key in needs}
    options |= {key: int(needs[key]) for key in ("pooler_heads",) if needs.get(key, "").isdigit()}
    options |= {"pooling": "first"} if needs.get("pooling") == "first" else {}

    if "pooler.query_tokens" in state:
        layers = len(numbers(state, r"pooler\.blocks\.(\d+)\."))
        options |= {"pooler_layers": layers} if layers != 3 else {}
    return options


def backbone_options(state: Mapping[str, Tensor], *, heads: int | None, bias: str) -> Options:
    """Return `backbone` and the network's options that differ from its defaults.

    Args:
        state: under our names.
        heads: attention heads of the encoder, which no tensor shows; None: as in the published network of this width.
        bias: the family's `qkv_bias`.
    """
    shape = shape_of(state)
    if not shape:
        return {}

    width, depth, mlp = shape["width"], shape["depth"], shape["mlp"]
    heads = heads or _HEADS.get(width)
    name = SIZES.get((width, depth, heads or 0, mlp))
    options: Options = {"backbone": name or "vit3d"}
    # not a published size: all numbers must be given
    if not name:
        options |= {"width": width, "depth": depth, "mlp_ratio": mlp / width} | ({"heads": heads} if heads else {})

    defaults = {"tubelet": 2, "patch": 16}
    options |= {key: shape[key] for key, usual in defaults.items() if shape[key] != usual}
    return options | ({"qkv_bias": bias_of(state)} if bias_of(state) != bias else {})
