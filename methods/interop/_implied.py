"""Find the model that a weights file belongs to, as far as tensors and family show it: the values for `model`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from methods.interop import _vit

# {(blocks per stage, bottleneck?): name of the 2D network}
_DEPTHS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def implied(
    state: Mapping[str, Tensor], theirs: Iterable[str], family: str, needs: Mapping[str, str]
) -> dict[str, Any]:
    """Return the options of the model that a file was trained with, as far as the file shows them.

    Args:
        state: the tensors under our names.
        theirs: the names in the file, since a shift shows only in the names of some families.
        family: the family of these names.
        needs: the family's rules that no tensor shows, as text.

    Returns:
        type, backbone, num_class, and keys of `model.kwargs`, in that order.
    """
    if any(name.startswith(("backbone.blocks.", "pooler.")) for name in state):
        return _vit.implied(state, family, needs)

    # What every method has.
    options: dict[str, Any] = {}
    method = _method(state, list(theirs), family)
    if method:
        options["type"] = method
    backbone = _backbone(state, "backbone.slow." if method == "slowfast" else "backbone.")
    if backbone:
        options["backbone"] = backbone
    if "classifier.weight" in state and state["classifier.weight"].dim() == 2:
        options["num_class"] = len(state["classifier.weight"])

    # What one method has.
    if method == "slowfast":
        options |= _slowfast(state, backbone)
    if method == "tpn":
        stem = state.get("backbone.conv1.weight")
        options["base"] = "slowonly" if stem is not None and stem.dim() == 5 else "tsm"
        if not any(name.startswith("aux_head.") for name in state):
            options["aux_weight"] = 0
    if any("_non_local." in name for name in state) and not any("_non_local.theta." in name for name in state):
        options["non_local"] = "gaussian"

    # Rules of the family count only for the methods that have the option.
    shifts = method in ("tsm", "pptsm") or options.get("base") == "tsm"
    relevant = {
        "shift_direction": shifts,
        "shift_shortcut": options.get("base") == "tsm",
        "slow_index": method == "slowfast",
        "flow": method == "tpn",
    }

    values = {"true": True, "false": False}
    return options | {name: values.get(text, text) for name, text in needs.items() if relevant.get(name)}


def _method(state: Mapping[str, Tensor], theirs: list[str], family: str) -> str:
    """Return the name of the method; "" if TSN and TSM (and their PP forms) look alike, and for image networks."""
    if any(name.startswith("backbone.slow.") for name in state):
        return "slowfast"
    if any(name.startswith("neck.") for name in state):
        return "tpn"

    # a stem with five axes is 3D, and of the 3D methods only SlowOnly is left
    stem = state.get("backbone.conv1.weight")
    if stem is not None and stem.dim() == 5:
        return "slowonly"
    # these families wrap a shifted convolution in a module called `net`
    shifted = any(re.search(r"\.(conv1|conv\.\d)(\.conv)?\.net\.", name) for name in theirs)
    return "tsm" if shifted and family in ("mmaction", "tsn_tsm") else ""


def _backbone(state: Mapping[str, Tensor], prefix: str) -> str:
    """Return the name of the (2D) network; "" if no network here has its shape."""
    if f"{prefix}features.0.0.weight" in state:
        return "mobilenetv2"

    depths = []
    for stage in range(1, 5):
        blocks = [re.match(re.escape(f"{prefix}layer{stage}.") + r"(\d+)\.conv", name) for name in state]
        depths.append(len({match[1] for match in blocks if match}))

    name = _DEPTHS.get((tuple(depths), f"{prefix}layer1.0.conv3.weight" in state), "")  # pyright: ignore[reportArgumentType, reportCallIssue]
    # the D variant has three convolutions in the stem
    return f"{name}_vd" if name and f"{prefix}conv1.0.weight" in state else name


def _slowfast(state: Mapping[str, Tensor], backbone: str) -> dict[str, Any]:
    """Return the options of the lateral connections, and a Fast pathway of a different depth."""
    options: dict[str, Any] = {}
    fast = _backbone(state, "backbone.fast.")
    if fast and fast != backbone:
        options["fast_backbone"] = fast

    slow_stem, fast_stem = (state.get(f"backbone.{path}.conv1.weight") for path in ("slow", "fast"))
    if slow_stem is not None and fast_stem is not None and slow_stem.dim() == fast_stem.dim() == 5:
        # channels of the Slow pathway over those of the Fast one
        options["beta_inv"] = len(slow_stem) // max(1, len(fast_stem))

    lateral = state.get("backbone.laterals.0.conv.weight")
    if lateral is not None and lateral.dim() == 5:
        options["fusion_kernel"] = lateral.shape[2]
    options["lateral_norm"] = "backbone.laterals.0.bn.weight" in state

    # a kernel over time in res4 of the Slow pathway
    res4 = re.compile(r"backbone\.slow\.layer3\.\d+\.conv1\.weight")
    kernels = [tensor.shape[2] for name, tensor in state.items() if res4.fullmatch(name) and tensor.dim() == 5]
    temporal = sum(kernel > 1 for kernel in kernels)
    if temporal < len(kernels):
        options["res4_temporal_blocks"] = temporal
    return options
