"""Convert names of V-JEPA 2: Hugging Face's, and those of the authors' encoder and probe files.

A pre-trained file also holds a predictor. No logit depends on it, so it is only carried along for an export, under
transformers' names. Files of V-JEPA 2.1 describe a different network and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.interop import _vit
from methods.interop._names import Converted, Options, convert, has
from utils.errors import UserError

if TYPE_CHECKING:
    from methods.interop._config import HfConfig

SLOW_FIRST = None  # no SlowFast here
NEEDS: dict[str, str] = {}
HEADS = ("pooler.",)  # missing in an encoder's file
BIAS = "all"  # q, k and v
FRAMES = 16  # of a clip, if nothing else is known
LICENCE = "mit"
ARCHITECTURE = "VJEPA2ForVideoClassification"
MODEL_TYPE = "vjepa2"
AMBIGUOUS = "ask"  # in place of an option that neither tensors nor a rule decide
#: {option: values that the user may choose from}
CHOICES = {
    "pooler_heads": "16 by the authors' recipe, 22 in transformers",
    "heads": "16 or 22 in networks of this width",
}

_ORIGINAL = {"eps": "1e-06", "head_eps": "1e-05"}  # the probe's norms have torch's default epsilon
_HEADS = 16  # of the authors' probes, by their recipe
# names that only V-JEPA 2.1 has
_LATER = r"(predictor\.)?(norms_block\.|img_mod_embed|video_mod_embed|patch_embed_img\.)"
RULES = (
    (r"(?:predictor\.predictor_)?pos_embed", None),  # a table that rotary positions replaced
    (r"patch_embed\.proj\.(.*)", r"backbone.patch_embed.\1"),
    (r"(blocks\.\d+\..*)", r"backbone.\1"),
    (r"norm\.(.*)", r"backbone.norm.\1"),
    (r"pooler\.cross_attention_block\.xattn\.(q|kv)\.(.*)", r"pooler.cross.\1.\2"),
    (r"pooler\.cross_attention_block\.((?:norm\d|mlp)\..*)", r"pooler.cross.\1"),
    (r"pooler\.(query_tokens|blocks\.\d+\..*)", r"pooler.\1"),
    (r"linear\.(.*)", r"classifier.\1"),
)


def is_hf(names: Mapping[str, Tensor]) -> bool:
    """Return True for the names that transformers uses."""
    return has(names, r"(vjepa2\.)?encoder\.embeddings\.patch_embeddings\.proj\.weight$")


def recognises(names: Mapping[str, Tensor]) -> bool:
    """Return True if the names are of this family."""
    patch = names.get("patch_embed.proj.weight")
    encoder = has(names, r"blocks\.0\.attn\.qkv\.weight$") and patch is not None and patch.dim() == 5

    return is_hf(names) or encoder or has(names, r"pooler\.cross_attention_block\.")


def table(names: Mapping[str, Tensor]) -> _vit.Table:
    """Return {our name: transformers' names}, for as many blocks as the names have (theirs or ours)."""
    stem, parts = "vjepa2.encoder", ("query", "key", "value")
    blocks = _vit.numbers(names, r"(?:vjepa2\.encoder\.layer|backbone\.blocks)\.(\d+)\.")
    pooler = _vit.numbers(names, r"pooler\.(?:self_attention_layers|blocks)\.(\d+)\.")

    # the encoder
    entries = _vit.pairs("backbone.patch_embed", f"{stem}.embeddings.patch_embeddings.proj")
    for number in blocks:
        ours, theirs = f"backbone.blocks.{number}", f"{stem}.layer.{number}"
        entries |= _vit.joined(f"{ours}.attn.qkv", f"{theirs}.attention", parts, ("weight", "bias"))
        entries |= _vit.pairs(f"{ours}.attn.proj", f"{theirs}.attention.proj")
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            entries |= _vit.pairs(f"{ours}.{name}", f"{theirs}.{name}")
    entries |= _vit.pairs("backbone.norm", f"{stem}.layernorm")

    # the pooler: self-attention blocks, then the cross-attention that reads the tokens
    entries |= {"pooler.query_tokens": ("pooler.query_tokens",)}
    for number in pooler:
        ours, theirs = f"pooler.blocks.{number}", f"pooler.self_attention_layers.{number}"
        entries |= _vit.joined(
            f"{ours}.attn.qkv", f"{theirs}.self_attn", ("q_proj", "k_proj", "v_proj"), ("weight", "bias")
        )
        entries |= _vit.pairs(f"{ours}.attn.proj", f"{theirs}.self_attn.out_proj")
        entries |= _norms_and_mlp(ours, theirs)

    ours, theirs = "pooler.cross", "pooler.cross_attention_layer"
    entries |= _vit.pairs(f"{ours}.q", f"{theirs}.cross_attn.q_proj")
    entries |= _vit.joined(f"{ours}.kv", f"{theirs}.cross_attn", ("k_proj", "v_proj"), ("weight", "bias"))
    return entries | _norms_and_mlp(ours, theirs) | _vit.pairs("classifier", "classifier")


def _norms_and_mlp(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    entries: dict[str, tuple[str, ...]] = {}
    for mine, name in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2",) * 2):
        entries |= _vit.pairs(f"{ours}.{mine}", f"{theirs}.{name}")
    return entries


def to_ours(state: Mapping[str, Tensor]) -> Converted:
    """Return their state dict under our names.

    Raises:
        UserError: the file is of V-JEPA 2.1.
    """
    if has(state, _LATER):
        raise UserError(
            "the file holds V-JEPA 2.1, a different network than V-JEPA 2 (different rotary positions, embeddings "
            "of the kind of input, norms of four blocks) and is not built here; use a file of V-JEPA 2"
        )

    # The predictor is carried along; rotary positions make its table of positions useless.
    hf = is_hf(state)
    stems = ("vjepa2.predictor.", "predictor.") if hf else ("predictor.",)
    carried = {name: tensor for name, tensor in state.items() if name.startswith(stems) and "pos_embed" not in name}
    rest = {name: tensor for name, tensor in state.items() if name not in carried}

    if hf:
        renamed = {f"vjepa2.{name}" if name.startswith("encoder.") else name: tensor for name, tensor in rest.items()}
        result = _vit.to_ours(renamed, table(renamed))
        result.carried = {f"vjepa2.{name.removeprefix('vjepa2.')}": tensor for name, tensor in carried.items()}
    else:
        result = convert(rest, RULES)
        result.carried, left = _predictor(carried)
        result.unknown += left
        result.needs = _original_needs(result.state)
    return result


def _original_needs(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the options of the authors' files that no tensor shows; heads are those of the network of this width."""
    query = state.get("pooler.query_tokens")
    if query is None:
        return {"eps": _ORIGINAL["eps"]} | _vit.published_heads(state, giant=22)

    options = _ORIGINAL | _vit.published_heads(state, giant=22)
    # The recipe has 16 heads for every encoder, transformers takes the encoder's number. Both are 16 up to ViT-H.
    sure = query.shape[-1] != 1408
    return options | {"pooler_heads": str(_HEADS) if sure else AMBIGUOUS}


def _predictor(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the authors' predictor under transformers' names, and the names that no rule matches."""
    tensors = {name.removeprefix("predictor."): tensor for name, tensor in state.items()}
    stem = "vjepa2.predictor"
    names = _vit.pairs("predictor_embed", f"{stem}.embeddings.predictor_embeddings")
    names |= _vit.pairs("predictor_norm", f"{stem}.layernorm") | _vit.pairs("predictor_proj", f"{stem}.proj")

    for number in _vit.numbers(tensors, r"predictor_blocks\.(\d+)\."):
        ours, theirs = f"predictor_blocks.{number}", f"{stem}.layer.{number}"
        names |= _vit.joined(f"{ours}.attn.qkv", f"{theirs}.attention", ("query", "key", "value"), ("weight", "bias"))
        names |= _vit.pairs(f"{ours}.attn.proj", f"{theirs}.attention.proj")
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            names |= _vit.pairs(f"{ours}.{name}", f"{theirs}.{name}")

    known = {name: tensor for name, tensor in tensors.items() if name in names and tensor.dim()}
    renamed = _vit.to_theirs(known, names)
    # separate tensors in the authors' files, one stacked tensor in transformers
    tokens = [tensors[name] for name in (f"mask_tokens.{n}" for n in range(len(tensors))) if name in tensors]
    if tokens and len({token.shape for token in tokens}) == 1:
        renamed[f"{stem}.embeddings.mask_tokens"] = torch.stack(tokens)

    left = [f"predictor.{name}" for name in tensors if name not in known and not name.startswith("mask_tokens.")]
    return renamed, left


def needs(config: HfConfig, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the options that a folder's config holds and no tensor shows, as text."""
    eps, heads = repr(config.number("layer_norm_eps", 1e-6)), str(config.count("num_attention_heads", 16))
    pooler = {"head_eps": eps, "pooler_heads": heads} if "pooler.query_tokens" in state else {}
    return {"eps": eps, "heads": heads, **pooler}


def arguments(config: HfConfig, state: Mapping[str, Tensor]) -> Options:
    """Return the arguments of `methods.build` that a folder describes; see `videomae.arguments`."""
    config.require("hidden_act", "gelu")
    config.require("in_chans", 3)

    # Refuse a config of a different size before any memory is allocated for it.
    width = config.count("hidden_size", 1024)
    config.agree(
        _vit.shape_of(state),
        width=width,
        depth=config.count("num_hidden_layers", 24),
        mlp=int(width * config.number("mlp_ratio", 4.0)),
        patch=config.side("patch_size", 16),
        tubelet=config.count("tubelet_size", 2),
    )
    config.agree(
        {"q, k and v biases": _vit.bias_of(state) != "none"}, **{"q, k and v biases": config.flag("qkv_bias", True)}
    )

    # one epsilon and one number of heads serve encoder and pooler
    heads, eps = config.count("num_attention_heads", 16), config.number("layer_norm_eps", 1e-6)
    # If the file has no pooler, a config must not request one that is larger than the encoder.
    layers = config.count("num_pooler_layers", 3, least=0, most=max(4, config.count("num_hidden_layers", 24)))
    if "pooler.query_tokens" in state:
        pooler_layers = len(_vit.numbers(state, r"pooler\.blocks\.(\d+)\."))
        config.agree({"num_pooler_layers": pooler_layers}, num_pooler_layers=layers)

    options = _vit.backbone_options(state, heads=heads, bias=BIAS)
    return {
        "type": "vjepa2",
        **options,
        "num_segments": config.count("frames_per_clip", 64),
        "eps": eps,
        "head_eps": eps,
        "pooler_heads": heads,
        **({"pooler_layers": layers} if layers != 3 else {}),
    }


def side(config: HfConfig) -> int:
    """Return the height and width of the frames, pixels."""
    return config.side("crop_size", 256)


def written(arch: _vit.Architecture) -> Options:
    """Return the keys of config.json for one of our networks."""
    return {
        "hidden_size": arch.width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "mlp_ratio": _vit.ratio(arch.mlp, arch.width),
        "patch_size": arch.patch,
        "tubelet_size": arch.tubelet,
        "in_chans": 3,
        "frames_per_clip": arch.frames,
        "crop_size": arch.side,
        "hidden_act": "gelu",
        "layer_norm_eps": arch.eps,
        "qkv_bias": arch.bias != "none",
        "num_pooler_layers": arch.pooler_layers,
    }


def carried_keys(carried: Mapping[str, Tensor]) -> Options:
    """Return the keys of config.json for a predictor, as its tensors show them."""
    embedding = carried.get("vjepa2.predictor.embeddings.predictor_embeddings.weight")
    tokens = carried.get("vjepa2.predictor.embeddings.mask_tokens")
    fc1 = carried.get("vjepa2.predictor.layer.0.mlp.fc1.weight")
    if embedding is None or tokens is None or fc1 is None:
        return {}

    return {
        "pred_hidden_size": len(embedding),
        "pred_num_hidden_layers": len(_vit.numbers(carried, r"vjepa2\.predictor\.layer\.(\d+)\.")),
        "pred_mlp_ratio": _vit.ratio(len(fc1), len(embedding)),
        "pred_num_mask_tokens": len(tokens),
        # all published predictors have 12, and no tensor shows it
        "pred_num_attention_heads": 12,
    }
