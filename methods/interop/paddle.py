"""Convert names of PaddleVideo (TSN, TSM, PP-TSN, PP-TSM) and of PaddleClas' ResNet-vd for images. `.pdparams`.

A linear layer's weight is (in, out) there. TSM shifts in the opposite direction (`shift_direction: paddle`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from methods.interop._names import Converted, convert, has

SLOW_FIRST = None  # no SlowFast here
NEEDS = {"shift_direction": "paddle"}

_NORM = {"weight": "weight", "bias": "bias", "_mean": "running_mean", "_variance": "running_var"}


def recognises(names: Mapping[str, Tensor]) -> bool:
    """Return True if the names are of this family."""
    return has(names, r".*\._batch_norm\._variance$")


def to_ours(state: Mapping[str, Tensor]) -> Converted:
    """Return their state dict under our names."""
    renamed = {_stage_and_block(name.removeprefix("backbone.")): tensor for name, tensor in state.items()}
    vd = has(renamed, r"conv1_1\.")

    # The stem: one convolution, or three in ResNet-vd, where the last BN keeps the name bn1.
    rules: list[tuple[str, str]] = [(r"(?:head\.fc|out)\.(weight|bias)", r"classifier.\1")]
    stem = (("conv1_1", "conv1.0", "conv1.1"), ("conv1_2", "conv1.3", "conv1.4"), ("conv1_3", "conv1.6", "bn1"))
    for theirs, conv, norm in stem if vd else (("conv", "conv1", "bn1"),):
        rules += _conv_and_norm(theirs, f"backbone.{conv}", f"backbone.{norm}")

    for index in range(3):
        ours = r"backbone.layer\1.\2."
        rules += _conv_and_norm(rf"(\d)\.(\d+)\.conv{index}", f"{ours}conv{index + 1}", f"{ours}bn{index + 1}")
    # the D variant pools before the convolution of a shortcut, which is then the second module
    conv, norm = ("1", "2") if vd else ("0", "1")
    ours = r"backbone.layer\1.\2.downsample."
    rules += _conv_and_norm(r"(\d)\.(\d+)\.short", ours + conv, ours + norm)

    result = convert(renamed, rules)
    if "classifier.weight" in result.state:
        result.state["classifier.weight"] = result.state["classifier.weight"].t().contiguous()  # (D, K) -> (K, D)
        result.changed["classifier.weight"] = "transposed"
    return result


def _conv_and_norm(theirs: str, conv: str, norm: str) -> list[tuple[str, str]]:
    """Return the rules for a convolution and its BN."""
    rules = [(rf"{theirs}\._conv\.weight", f"{conv}.weight")]
    return rules + [(rf"{theirs}\._batch_norm\.{name}", f"{norm}.{ours}") for name, ours in _NORM.items()]


def _stage_and_block(name: str) -> str:
    """Turn `bb_1_0.x` (vd), `res3a.x` and `res4b12.x` (ResNet-101) into `2.0.x`, `2.0.x` and `3.12.x`."""
    match = re.match(r"bb_(\d)_(\d+)\.", name)
    if match:
        return f"{int(match[1]) + 1}.{match[2]}.{name[match.end() :]}"

    match = re.match(r"res(\d)([a-z])(\d*)\.", name)
    if match:
        # a letter, or in long stages the letter b and a number
        index = int(match[3]) if match[3] else ord(match[2]) - ord("a")
        return f"{int(match[1]) - 1}.{index}.{name[match.end() :]}"
    return name
