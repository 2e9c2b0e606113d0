"""Convert names of the TSN and TSM repositories: ResNet, even with non-local blocks, and MobileNetV2 (2D)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from methods.interop._names import Converted, convert, has

SLOW_FIRST = None  # no SlowFast here
NEEDS = {"shift_direction": "tsm"}

_BLOCK = r"base_model\.(layer\d\.\d+)\."
_INVERTED = r"base_model\.features\.(\d+)\.conv\."
RULES = (
    (r"new_fc\.(.*)", r"classifier.\1"),
    # `nl` wraps a residual block; our block comes after it
    (_BLOCK + r"nl\.(theta|phi|g)\.(?:0\.)?(weight|bias)", r"backbone.\1_non_local.\2.\3"),
    (_BLOCK + r"nl\.W\.0\.(.*)", r"backbone.\1_non_local.out.\2"),
    (_BLOCK + r"nl\.W\.1\.(.*)", r"backbone.\1_non_local.bn.\2"),
    # `net` is the convolution inside a shift
    (_BLOCK + r"(?:block\.)?(conv\d)\.(?:net\.)?(weight)", r"backbone.\1.\2.\3"),
    (_BLOCK + r"(?:block\.)?((?:bn|downsample).*)", r"backbone.\1.\2"),
    (r"base_model\.((?:conv1|bn1)\..*)", r"backbone.\1"),
    # MobileNetV2: the steps of a block are flat (convolution, BN, activation, ...), and block 1 does not expand.
    (r"base_model\.features\.(0|18)\.(.*)", r"backbone.features.\1.\2"),
    (r"base_model\.features\.1\.conv\.([01])\.(.*)", r"backbone.features.1.conv.0.\1.\2"),
    (r"base_model\.features\.1\.conv\.3\.(.*)", r"backbone.features.1.conv.1.\1"),
    (r"base_model\.features\.1\.conv\.4\.(.*)", r"backbone.features.1.conv.2.\1"),
    (_INVERTED + r"([01])\.(?:net\.)?(.*)", r"backbone.features.\1.conv.0.\2.\3"),
    (_INVERTED + r"3\.(.*)", r"backbone.features.\1.conv.1.0.\2"),
    (_INVERTED + r"4\.(.*)", r"backbone.features.\1.conv.1.1.\2"),
    (_INVERTED + r"6\.(.*)", r"backbone.features.\1.conv.2.\2"),
    (_INVERTED + r"7\.(.*)", r"backbone.features.\1.conv.3.\2"),
)


def recognises(names: Mapping[str, Tensor]) -> bool:
    """Return True if the names are of this family."""
    return has(names, r"base_model\.") and has(names, r"new_fc\.")


def to_ours(state: Mapping[str, Tensor]) -> Converted:
    """Return their state dict under our names."""
    return convert(state, RULES)
