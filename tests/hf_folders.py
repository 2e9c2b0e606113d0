"""Hugging Face folders as transformers writes them, and the authors' files of the same numbers, for tests.

The names stand here once more, from the fact sheet and not from `methods/interop`. Values follow from (name, shape).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

VIDEOMAE = {
    "architectures": ["VideoMAEForVideoClassification"],
    "model_type": "videomae",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 60,
    "image_size": 32,
    "patch_size": 8,
    "tubelet_size": 2,
    "num_frames": 4,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
    "use_mean_pooling": True,
}
VJEPA2 = {
    "architectures": ["VJEPA2ForVideoClassification"],
    "model_type": "vjepa2",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 3.0,
    "crop_size": 32,
    "patch_size": 8,
    "tubelet_size": 2,
    "frames_per_clip": 4,
    "in_chans": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "num_pooler_layers": 2,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
    "pred_num_mask_tokens": 3,
    "pred_mlp_ratio": 2.0,
}
KINDS = {"videomae": VIDEOMAE, "vjepa2": VJEPA2}
CLASSES = 5

Shapes = dict[str, tuple[int, ...]]


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return weights N(0, .05), biases N(0, .1) and norm weights 1 + N(0, .1), drawn from the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    drawn = torch.from_numpy(np.random.Generator(np.random.Philox(seed)).standard_normal(shape)).float()
    if name.endswith("bias") or "tokens" in name:
        return drawn * 0.1
    return 1 + drawn * 0.1 if "norm" in name else drawn * 0.05


def layer(name: str, out: int, into: int) -> Shapes:
    """Return a linear layer."""
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    """Return a layer norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def videomae(config: dict, *, new_biases: bool = False) -> Shapes:
    """Return the tensors of a VideoMAE folder; `new_biases`: as transformers 5 names them in memory."""
    width, hidden, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    stem = "videomae.embeddings.patch_embeddings.projection"
    shapes: Shapes = {f"{stem}.weight": (width, 3, config["tubelet_size"], patch, patch), f"{stem}.bias": (width,)}
    for number in range(config["num_hidden_layers"]):
        block = f"videomae.encoder.layer.{number}"
        attention = f"{block}.attention.attention"
        shapes |= {f"{attention}.{part}.weight": (width, width) for part in ("query", "key", "value")}
        if config.get("qv_bias", config.get("qkv_bias", True)):
            biases = ("query.bias", "value.bias") if new_biases else ("q_bias", "v_bias")
            shapes |= {f"{attention}.{name}": (width,) for name in biases}
        shapes |= layer(f"{block}.attention.output.dense", width, width)
        shapes |= layer(f"{block}.intermediate.dense", hidden, width) | layer(f"{block}.output.dense", width, hidden)
        shapes |= norm(f"{block}.layernorm_before", width) | norm(f"{block}.layernorm_after", width)
    shapes |= norm("fc_norm" if config["use_mean_pooling"] else "videomae.layernorm", width)
    return shapes | layer("classifier", CLASSES, width)


def vjepa2(config: dict) -> Shapes:
    """Return the tensors of a V-JEPA 2 folder, predictor included."""
    width, patch = config["hidden_size"], config["patch_size"]
    stem = "vjepa2.encoder.embeddings.patch_embeddings.proj"
    shapes: Shapes = {f"{stem}.weight": (width, 3, config["tubelet_size"], patch, patch), f"{stem}.bias": (width,)}
    shapes |= _jepa_blocks("vjepa2.encoder", config["num_hidden_layers"], width, int(width * config["mlp_ratio"]))
    shapes |= norm("vjepa2.encoder.layernorm", width) | {"pooler.query_tokens": (1, 1, width)}
    for number in range(config["num_pooler_layers"]):
        block = f"pooler.self_attention_layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= layer(f"{block}.self_attn.{part}", width, width)
        shapes |= _pooler_rest(block, width)
    block = "pooler.cross_attention_layer"
    for part in ("q_proj", "k_proj", "v_proj"):
        shapes |= layer(f"{block}.cross_attn.{part}", width, width)
    shapes |= _pooler_rest(block, width) | layer("classifier", CLASSES, width)
    inner, stem = config["pred_hidden_size"], "vjepa2.predictor"
    shapes |= layer(f"{stem}.embeddings.predictor_embeddings", inner, width)
    shapes |= {f"{stem}.embeddings.mask_tokens": (config["pred_num_mask_tokens"], 1, 1, inner)}
    shapes |= _jepa_blocks(stem, config["pred_num_hidden_layers"], inner, int(inner * config["pred_mlp_ratio"]))
    shapes |= norm(f"{stem}.layernorm", inner) | layer(f"{stem}.proj", width, inner)
    return shapes if config["qkv_bias"] else {name: shapes[name] for name in shapes if not name.endswith(_BIASES)}


_BIASES = ("query.bias", "key.bias", "value.bias")


def _jepa_blocks(stem: str, depth: int, width: int, hidden: int) -> Shapes:
    shapes: Shapes = {}
    for number in range(depth):
        block = f"{stem}.layer.{number}"
        for part in ("query", "key", "value", "proj"):
            shapes |= layer(f"{block}.attention.{part}", width, width)
        shapes |= layer(f"{block}.mlp.fc1", hidden, width) | layer(f"{block}.mlp.fc2", width, hidden)
        shapes |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
    return shapes


def _pooler_rest(block: str, width: int) -> Shapes:
    shapes = norm(f"{block}.layer_norm1", width) | norm(f"{block}.layer_norm2", width)
    return shapes | layer(f"{block}.mlp.fc1", 4 * width, width) | layer(f"{block}.mlp.fc2", width, 4 * width)


def tensors(kind: str, config: dict | None = None, **options: bool) -> dict[str, Tensor]:
    """Return the tensors of a folder by name."""
    config = KINDS[kind] if config is None else config
    shapes = videomae(config, **options) if kind == "videomae" else vjepa2(config)
    return {name: value(name, shape) for name, shape in shapes.items()}


def write(
    folder: Path,
    kind: str,
    *,
    state: dict[str, Tensor] | None = None,
    labels: list[str] | None = None,
    shards: int = 1,
    card: str = "",
    **changes: object,
) -> Path:
    """Write a folder; `changes` replace values of its config.json, None removes one."""
    config = {key: one for key, one in (KINDS[kind] | changes).items() if one is not None}
    names = labels or [f"LABEL_{number}" for number in range(CLASSES)]
    config |= {"id2label": {str(number): name for number, name in enumerate(names)}}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = tensors(kind, KINDS[kind] | changes) if state is None else state
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        table = {}
        for number in range(shards):
            name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: tensor for place, (key, tensor) in enumerate(state.items()) if place % shards == number}
            save_file(part, folder / name, metadata={"format": "pt"})
            table |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": sum(one.nbytes for one in state.values())}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if card:
        (folder / "README.md").write_text(card)
    return folder


def original_videomae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the authors' file of the numbers of a VideoMAE folder."""
    stem = "videomae.embeddings.patch_embeddings.projection"
    original = {f"patch_embed.proj.{kind}": state[f"{stem}.{kind}"] for kind in ("weight", "bias")}
    depth = len({name.split(".")[3] for name in state if ".encoder.layer." in name})
    renamed = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    for number in range(depth):
        block, mine = f"videomae.encoder.layer.{number}", f"blocks.{number}"
        attention = f"{block}.attention.attention"
        parts = [state[f"{attention}.{part}.weight"] for part in ("query", "key", "value")]
        original[f"{mine}.attn.qkv.weight"] = torch.cat(parts)
        for name in ("q_bias", "v_bias"):
            original[f"{mine}.attn.{name}"] = state[f"{attention}.{name}"]
        for new, old in renamed.items():
            original |= {f"{mine}.{new}.{kind}": state[f"{block}.{old}.{kind}"] for kind in ("weight", "bias")}
    for new, old in {"fc_norm": "fc_norm", "head": "classifier"}.items():
        original |= {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}
    return original


def original_vjepa2(state: dict[str, Tensor]) -> tuple[dict, dict]:
    """Return the authors' encoder file (with predictor) and probe file of the numbers of a V-JEPA 2 folder."""
    fused: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for parts in (("query", "key", "value"), ("q_proj", "k_proj", "v_proj")):
            if f".{parts[0]}." in name and ".cross_attn." not in name:
                whole = [state[name.replace(f".{parts[0]}.", f".{part}.")] for part in parts]
                fused[name.replace(f".{parts[0]}.", ".qkv.")] = torch.cat(whole)
                break
            if any(f".{part}." in name for part in parts) and ".cross_attn." not in name:
                break
        else:
            fused[name] = tensor
    encoder, predictor, probe = {}, {}, {}
    for name, tensor in fused.items():
        if name.startswith("vjepa2.encoder."):
            new = name.removeprefix("vjepa2.encoder.").replace("embeddings.patch_embeddings.proj", "patch_embed.proj")
            new = new.replace("layer.", "blocks.", 1).replace(".attention.", ".attn.").replace("layernorm.", "norm.")
            encoder[f"module.backbone.{new}"] = tensor
        elif name.endswith("embeddings.mask_tokens"):
            predictor |= {f"module.backbone.mask_tokens.{number}": token for number, token in enumerate(tensor)}
        elif name.startswith("vjepa2.predictor."):
            new = name.removeprefix("vjepa2.predictor.").replace("embeddings.predictor_embeddings", "predictor_embed")
            new = new.replace("layer.", "predictor_blocks.", 1).replace(".attention.", ".attn.")
            new = new.replace("layernorm.", "predictor_norm.")
            predictor[f"module.backbone.{'predictor_' + new if new.startswith('proj.') else new}"] = tensor
        elif name.startswith("classifier."):
            probe[f"module.linear.{name.removeprefix('classifier.')}"] = tensor
        elif ".cross_attn.k_proj." in name:
            both = [fused[name.replace("k_proj", part)] for part in ("k_proj", "v_proj")]
            new = name.replace("cross_attention_layer.cross_attn.k_proj", "cross_attention_block.xattn.kv")
            probe[f"module.{new}"] = torch.cat(both)
        elif ".cross_attn.v_proj." not in name:
            new = name.replace("cross_attention_layer.cross_attn.q_proj", "cross_attention_block.xattn.q")
            new = new.replace("cross_attention_layer.", "cross_attention_block.")
            new = new.replace("self_attention_layers.", "blocks.").replace("self_attn.out_proj", "attn.proj")
            new = new.replace("self_attn.", "attn.").replace("layer_norm", "norm")
            probe[f"module.{new}"] = tensor
    encoder["module.backbone.pos_embed"] = torch.zeros(1, 8, 48)
    return {"target_encoder": encoder, "encoder": encoder, "predictor": predictor, "epoch": 3}, {"classifiers": [probe]}
