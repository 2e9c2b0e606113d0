"""VideoMAE and V-JEPA 2 beside Hugging Face's: sizes, logits, CPU seconds and memory of a training step.

`$ZOETROPE_HF_PYTHON` names the interpreter of a virtual environment with transformers, safetensors and our version of
torch, without torchvision; without it the rows that need it are not measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.reliability.pairs import compare
from tests.benchmarks.rows import ROOT, run_rows

WORKER = Path(__file__).with_name("hf_worker.py")
MISSING = {"measured": "not measured: $ZOETROPE_HF_PYTHON names no interpreter with transformers", "holds": True}

# name: (arguments of methods.build, parts with their parameters, {shape: GMACs, of the encoder for V-JEPA 2})
SIZES: dict[str, tuple[dict[str, Any], dict[str, int], tuple[int, float] | None]] = {
    "videomae small": ({}, {"": 22_033_936}, (224, 56.9)),
    "videomae base": ({}, {"": 86_534_800}, (224, 180.3)),
    "videomae large": ({}, {"": 304_270_736}, (224, 596.8)),
    "videomae huge": ({}, {"": 632_119_440}, None),
    "vjepa2 large": (
        {"num_class": 174},
        {"backbone": 303_885_312, "pooler": 49_336_320, "classifier": 178_350},
        (256, 827.9),
    ),
    "vjepa2 huge": ({"num_class": 174}, {"backbone": 631_648_000}, None),
    "vjepa2 giant": ({"num_class": 174}, {"backbone": 1_012_173_952, "pooler": 93_249_024}, None),
}


def sizes() -> dict:
    """Build every size on the meta device and compare parameters and GMACs."""
    import torch

    from methods.macs import count_macs, count_parameters
    from tests import models

    figures, wrong = {}, []
    for name, (given, parts, macs) in SIZES.items():
        type_, size = name.split()
        arguments = {"type": type_, "backbone": f"vit3d_{size}", "num_class": 400, "num_segments": 16} | given
        with torch.device("meta"):
            model = models.build(**arguments)
        counted = {part: count_parameters(model.get_submodule(part)) for part in parts}
        wrong += [f"{name} {part}: {counted[part]}" for part in parts if counted[part] != parts[part]]
        figures[name] = list(counted.values())
        if macs:
            side, published = macs
            network = model.backbone if type_ == "vjepa2" else model
            gmacs = count_macs(network, (1, 3, 16, side, side)) / 1e9
            figures[name].append(round(gmacs, 1))
            wrong += [] if abs(gmacs / published - 1) <= 0.01 else [f"{name}: {gmacs} GMAC"]
    return {"measured": {"found": figures, "different": wrong}, "holds": not wrong}


# Width, heads, layers, MLP width, patch, tubelet, frames, side, classes, and what else differs.
VIDEOMAE = [
    (48, 3, 1, 192, 16, 2, 4, 64, 5, {}),
    (54, 3, 2, 100, 8, 2, 8, 32, 7, {"layer_norm_eps": 1e-6}),
    (35, 5, 3, 140, 16, 1, 3, 48, 4, {"use_mean_pooling": False}),
    (64, 4, 4, 256, 4, 4, 8, 20, 11, {"qkv_bias": False}),
    (27, 1, 2, 31, 16, 2, 6, 32, 3, {"use_mean_pooling": False, "qkv_bias": False}),
    (96, 8, 3, 384, 14, 2, 2, 42, 2, {"layer_norm_eps": 1e-3}),
    (66, 2, 4, 264, 8, 3, 9, 24, 9, {}),
    (13, 13, 1, 52, 2, 2, 4, 10, 6, {}),
]
VJEPA2 = [
    (48, 3, 1, 192, 16, 2, 4, 64, 5, {}),
    (54, 3, 2, 100, 8, 2, 8, 32, 7, {"layer_norm_eps": 1e-3}),
    (35, 5, 3, 140, 16, 1, 3, 48, 4, {"num_pooler_layers": 1}),
    (128, 4, 4, 512, 4, 4, 8, 20, 11, {"qkv_bias": False}),
    (26, 2, 2, 31, 16, 2, 6, 32, 3, {"num_pooler_layers": 2}),
    (64, 1, 3, 279, 14, 2, 1, 42, 2, {}),
    (80, 1, 4, 320, 8, 3, 9, 24, 9, {"num_pooler_layers": 4, "qkv_bias": False}),
    (15, 1, 1, 60, 2, 2, 4, 10, 6, {}),
]
PUBLISHED = {"small": (384, 6, 12), "base": (768, 12, 12), "large": (1024, 16, 24)}


def videomae_case(shape: tuple) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of one network: transformers' and ours."""
    width, heads, layers, hidden, patch, tubelet, frames, side, classes, more = shape
    theirs = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    theirs |= {"intermediate_size": hidden, "patch_size": patch, "tubelet_size": tubelet, "num_frames": frames}
    theirs |= {"image_size": side, "num_labels": classes, **more}
    mean = more.get("use_mean_pooling", True)
    ours = {"pooling": "mean" if mean else "first", "qkv_bias": "qv" if more.get("qkv_bias", True) else "none"}
    ours |= {"eps": more.get("layer_norm_eps", 1e-12), "head_eps": 1e-5}
    return theirs, ours


def vjepa2_case(shape: tuple) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of one network: transformers' and ours."""
    width, heads, layers, hidden, patch, tubelet, frames, side, classes, more = shape
    theirs = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    theirs |= {"mlp_ratio": (hidden + 0.1) / width, "patch_size": patch, "tubelet_size": tubelet, "crop_size": side}
    theirs |= {"frames_per_clip": frames, "num_labels": classes, "pred_hidden_size": 24, "pred_num_hidden_layers": 1}
    theirs |= {"pred_num_attention_heads": 2, **more}
    eps = more.get("layer_norm_eps", 1e-6)
    ours = {"pooler_layers": more.get("num_pooler_layers", 3), "eps": eps, "head_eps": eps}
    ours["qkv_bias"] = "all" if more.get("qkv_bias", True) else "none"
    return theirs, ours


CASES = {"videomae": (VIDEOMAE, videomae_case), "vjepa2": (VJEPA2, vjepa2_case)}


def difference(worker: Worker, family: str, shape: tuple, *, seed: int, dtype: str) -> float:
    """Return the largest difference of the logits, over the largest logit; every tensor of theirs must be used."""
    import torch
    from safetensors.torch import load_file

    import methods

    theirs, ours = CASES[family][1](shape)
    width, heads, layers, hidden, patch, tubelet, frames, side, classes, _ = shape
    with tempfile.TemporaryDirectory() as folder:
        clips = [2 if width < 300 else 1, 3, frames, side, side]
        request = {"do": "logits", "family": family, "config": theirs, "seed": seed, "dtype": dtype, "shape": clips}
        worker.ask(request | {"file": f"{folder}/case.safetensors"})
        tensors = load_file(f"{folder}/case.safetensors")
    weights = {key.removeprefix("weights."): tensors[key] for key in tensors if key.startswith("weights.")}
    with torch.device("meta"):
        model = methods.build(
            type=family,
            backbone="vit3d",
            num_class=classes,
            num_segments=frames,
            dropout=0,
            patch=patch,
            tubelet=tubelet,
            width=width,
            depth=layers,
            heads=heads,
            mlp_ratio=hidden / width,
            **ours,
        )
    model.load_state_dict(renamed(weights), assign=True)  # strict: fills all of our tensors, uses all of theirs
    with torch.inference_mode():
        logits = model.eval()(tensors["clips"])
    return float((logits - tensors["logits"]).abs().max() / tensors["logits"].abs().max())


_NAMES = {
    "embeddings.patch_embeddings.projection.": "backbone.patch_embed.",
    "encoder.embeddings.patch_embeddings.proj.": "backbone.patch_embed.",
    "pooler.self_attention_layers.": "pooler.blocks.",
    "pooler.cross_attention_layer.": "pooler.cross.",
    "encoder.layer.": "backbone.blocks.",
    "encoder.layernorm.": "backbone.norm.",
    ".attention.attention.": ".attn.",
    ".attention.output.dense.": ".attn.proj.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
    ".attention.": ".attn.",
    ".self_attn.out_proj.": ".attn.proj.",
    ".self_attn.": ".attn.",
    ".cross_attn.": ".",
    "_proj.": ".",
    ".query.": ".q.",
    ".key.": ".k.",
    ".value.": ".v.",
}


def renamed(weights: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' tensors under our names; those of V-JEPA 2's predictor are left out."""
    import torch

    names = {}
    for key, tensor in weights.items():
        name = key.removeprefix("videomae.").removeprefix("vjepa2.")
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        names["backbone.norm." + name.removeprefix("layernorm.") if name.startswith("layernorm.") else name] = tensor
    ours = {}
    for name, tensor in names.items():
        place, _, rest = name.rpartition(".k.")
        parts: list[Any] = [names.get(f"{place}.{letter}.{rest}") for letter in "qkv"]
        if name.startswith("predictor."):
            continue
        if place and place.endswith(".attn"):
            ours[f"{place}.qkv.{rest}"] = torch.cat(parts)
        elif place:
            ours[f"{place}.kv.{rest}"], ours[f"{place}.q.{rest}"] = torch.cat(parts[1:]), parts[0]
        elif ".attn.q.bias" in name and name.replace(".q.", ".k.") not in names:
            ours[name.replace("q.bias", "q_bias")] = tensor
        elif ".attn.v.bias" in name and name.replace(".v.", ".k.") not in names:
            ours[name.replace("v.bias", "v_bias")] = tensor
        elif not name.endswith((".q.weight", ".v.weight", ".q.bias", ".v.bias")):
            ours[name] = tensor
    return ours


class Worker:
    """A process of `hf_worker.py`: transformers' in its own environment, or ours in this one."""

    def __init__(self, side: str, more: Mapping[str, str] | None = None) -> None:
        python = os.environ["ZOETROPE_HF_PYTHON"] if side == "theirs" else sys.executable
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        env |= {"HF_HUB_OFFLINE": "1"} if side == "theirs" else {"PYTHONPATH": str(ROOT)}
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [python, str(WORKER), side],
            cwd=self.folder.name,
            env=env | {"PYTHONSAFEPATH": "1"} | dict(more or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict) -> dict:
        """Send a request and return the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{WORKER.name} left with {self.process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def has_peer() -> bool:
    """Return whether there is an interpreter with transformers."""
    return Path(os.environ.get("ZOETROPE_HF_PYTHON", "/nowhere")).exists()


def logits_fp64() -> dict:
    """Compare small networks of many shapes, every parameter drawn."""
    if not has_peer():
        return MISSING
    gaps: dict[str, list[float]] = {}
    with Worker("theirs") as worker:
        for family, (shapes, _) in CASES.items():
            gaps[family] = [
                difference(worker, family, shape, seed=10 * i, dtype="float64") for i, shape in enumerate(shapes)
            ]
    worst = {family: f"{max(values):.1e} over {len(values)} shapes" for family, values in gaps.items()}
    return {"measured": worst, "holds": max(max(values) for values in gaps.values()) <= 1e-10}


def logits_fp32() -> dict:
    """Compare the published sizes."""
    if not has_peer():
        return MISSING
    gaps = {}
    with Worker("theirs") as worker:
        for family, size in (("videomae", "small"), ("videomae", "base"), ("videomae", "large"), ("vjepa2", "large")):
            width, heads, layers = PUBLISHED[size]
            side, classes = (224, 400) if family == "videomae" else (256, 174)
            shape = (width, heads, layers, 4 * width, 16, 2, 16, side, classes, {})
            gaps[f"{family} {size}"] = difference(worker, family, shape, seed=1, dtype="float32")
    return {"measured": {name: f"{value:.1e}" for name, value in gaps.items()}, "holds": max(gaps.values()) <= 1e-5}


STEP = {"do": "step", "batch": 2, "frames": 16, "size": 112}


def cpu(pairs: int = 24) -> dict:
    """Forward, backward and AdamW of ViT-S on one thread, ours and theirs in turn: CPU seconds, ours / theirs."""
    if not has_peer():
        return MISSING
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    with Worker("ours") as ours, Worker("theirs") as theirs:
        workers = {"ours": ours, "theirs": theirs}
        for i in range(pairs + 2):
            for side in sorted(workers, reverse=bool(i % 2)):
                taken = workers[side].ask(STEP)["seconds"]
                seconds[side] += [taken] if i > 1 else []  # the first ones warm up
    measured = compare(seconds["ours"], seconds["theirs"])
    return {"measured": measured, "holds": measured["median"] <= 1.00 and measured["high"] <= 1.03}


# glibc keeps freed memory in pieces that the next tensor does not fit into; so it gives each tensor back at once.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def memory() -> dict:
    """Peak memory of two steps of ViT-S with 8 clips over that after importing torch: weights, AdamW and all."""
    peaks = {}
    for allocator, env in (("exact", EXACT), ("glibc's own", {})):
        mib = {}
        for name, more in (("without", {}), ("with", {"checkpointing": True})):
            with Worker("ours", env) as worker:
                answers = [worker.ask(STEP | {"batch": 8} | more) for _ in range(2)]
                mib[name] = round(answers[-1]["mib"])
        peaks[allocator] = {"mib": mib, "ratio": round(mib["with"] / mib["without"], 3)}
    return {"measured": peaks, "holds": peaks["exact"]["ratio"] <= 0.5}


ROWS = {
    "vit_sizes": ("parameters and GMACs of VideoMAE and V-JEPA 2", "equal; within 1 %", sizes),
    "vit_logits": ("logits beside transformers, fp64, small networks", "<= 1e-10 of the largest", logits_fp64),
    "vit_published": ("the same in fp32 at published sizes", "<= 1e-5", logits_fp32),
    "vit_cpu": ("ViT-S 16x112x112, a step's CPU seconds / transformers'", "median <= 1.00, high <= 1.03", cpu),
    "vit_memory": ("peak memory with checkpointing / without", "<= .5", memory),
}


if __name__ == "__main__":
    sys.exit(run_rows(ROWS))
