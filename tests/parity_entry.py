"""`logits(case_dir, meta, arrays)` for the parity set of the golden data: our model, their weights, their input.

parity-expand --check tests.parity_entry:logits ../shared/data/golden/parity
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import methods
from methods.interop import load_weights


def logits(case_dir: str, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> np.ndarray:
    x = torch.from_numpy(arrays["input"])
    layout = meta["layout"]
    if layout == "N,T,C,H,W":
        clips = x.transpose(1, 2)
    else:
        clips = x.flatten(0, 1) if layout == "N,views,C,T,H,W" else x
    model = methods.build(**options(meta, num_segments=clips.shape[2]))
    report = load_weights(model, Path(case_dir) / meta["checkpoint"])
    assert not report.missing
    assert not report.unexpected
    with torch.inference_mode():
        return model.eval()(clips).numpy()


def options(meta: dict[str, Any], *, num_segments: int) -> dict[str, Any]:
    """What a user would write in `model`, from the description of a case."""
    forward = meta["forward"]
    method = forward["method"]
    options_of = {"type": method, "backbone": _backbone(meta), "num_class": forward["num_class"]}
    options_of["num_segments"] = num_segments
    shift = forward.get("shift", "")
    if method in ("tsm", "pptsm"):
        options_of["shift_direction"] = "paddle" if "take frame t-1, next" in shift else "tsm"
        options_of["shift_div"] = forward["shift_div"]
    if method == "tsm":
        options_of["n_round"] = forward.get("n_round", 1)
        if meta["case"].endswith("_nl"):
            options_of["non_local"] = "embedded_gaussian"
    if method == "slowfast":
        options_of |= _slowfast(meta, forward)
    if method == "tpn":
        options_of["base"] = "tsm" if "TSM" in forward["backbone"] else "slowonly"
        options_of["shift_shortcut"] = meta["peer"] == "TPN"
        if "fully_convolutional" in forward:
            options_of["fcn_pool"] = forward["pool"][1]
    return options_of


def _slowfast(meta: dict[str, Any], forward: dict[str, Any]) -> dict[str, Any]:
    mm = meta["peer"] == "mmaction2"
    kernel = forward.get("fusion_kernel", 5 if forward["alpha"] == 8 else 7)
    options_of = {
        "alpha": forward["alpha"],
        "fusion_kernel": kernel,
        "lateral_norm": not mm,
        "slow_index": "strided" if mm else "linspace",
        "slow_first": forward["head_order"].endswith("[slow, fast]"),
    }
    if "non_local" in forward:
        options_of["non_local"] = forward["non_local"]["instantiation"]
    return options_of


def _backbone(meta: dict[str, Any]) -> str:
    text = str(meta["forward"]["backbone"]).lower()
    if "mobilenet" in text:
        return "mobilenetv2"
    return f"resnet{meta['forward'].get('depth') or ''.join(c for c in text.split('_')[0].split()[0] if c.isdigit())}"
