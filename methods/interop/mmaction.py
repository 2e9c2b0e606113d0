"""Convert names of MMAction2 (0.x and 1.x): TSN, TSM, SlowOnly, SlowFast and TPN; ResNet, MobileNetV2 (2D)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from methods.interop._names import Converted, convert, has

SLOW_FIRST = False  # the classifier's input is [fast, slow]
#: Options that the weights need and no tensor shows.
NEEDS = {"slow_index": "strided", "shift_direction": "tsm", "shift_shortcut": "false", "flow": "cascade"}

# a group for the pathway, empty for networks with one
_PATHS = r"backbone\.(?:(slow|fast)_path\.)?"
_STAGE = _PATHS + r"(layer\d\.\d+)\."
RESNET = (
    (r"backbone\.slow_path\.conv1_lateral\.(.*)", r"backbone.laterals.0.\1"),
    (r"backbone\.slow_path\.layer(\d)_lateral\.(.*)", r"backbone.laterals.\1.\2"),
    (_PATHS + r"conv1\.conv\.(.*)", r"backbone.\1.conv1.\2"),
    (_PATHS + r"conv1\.bn\.(.*)", r"backbone.\1.bn1.\2"),
    # our non-local blocks come after a residual block, theirs are inside it
    (_STAGE + r"non_local_block\.conv_out\.conv\.(.*)", r"backbone.\1.\2_non_local.out.\3"),
    (_STAGE + r"non_local_block\.conv_out\.bn\.(.*)", r"backbone.\1.\2_non_local.bn.\3"),
    (_STAGE + r"non_local_block\.(theta|phi|g)\.(?:0\.)?conv\.(.*)", r"backbone.\1.\2_non_local.\3.\4"),
    # `block.` and `net.` are wrappers of a temporal shift
    (_STAGE + r"(?:block\.)?conv(\d)\.conv\.(?:net\.)?(.*)", r"backbone.\1.\2.conv\3.\4"),
    (_STAGE + r"(?:block\.)?conv(\d)\.bn\.(.*)", r"backbone.\1.\2.bn\3.\4"),
    (_STAGE + r"(?:block\.)?downsample\.conv\.(.*)", r"backbone.\1.\2.downsample.0.\3"),
    (_STAGE + r"(?:block\.)?downsample\.bn\.(.*)", r"backbone.\1.\2.downsample.1.\3"),
)
NECK = (
    (r"neck\.spatial_modulation\.spatial_modulation\.0\.0\.(.*)", r"neck.spatial_modulation.\1"),
    (r"neck\.temporal_modulation_ops\.(\d)\.conv\.conv\.(.*)", r"neck.temporal_modulation.\1.conv.\2"),
    (r"neck\.downsample_ops\.0\.conv\.conv\.(.*)", r"neck.bottom_up.conv.\1"),
    (r"neck\.level_fusion_1\.downsamples\.(\d)\.conv\.(.*)", r"neck.top_down_fusion.levels.\1.\2"),
    (r"neck\.level_fusion_2\.downsamples\.(\d)\.conv\.(.*)", r"neck.bottom_up_fusion.levels.\1.\2"),
    (r"neck\.level_fusion_1\.fusion_conv\.(.*)", r"neck.top_down_fusion.fusion.\1"),
    (r"neck\.level_fusion_2\.fusion_conv\.(.*)", r"neck.bottom_up_fusion.fusion.\1"),
    (r"neck\.pyramid_fusion\.(.*)", r"neck.pyramid_fusion.\1"),
    (r"neck\.aux_head\.(conv|fc)\.(.*)", r"aux_head.\1.\2"),
)
HEAD = ((r"cls_head\.fc_cls\.(.*)", r"classifier.\1"),)

# MobileNetV2: {MMAction2's layer: number of its first block in torchvision's `features`}.
_FIRST = {1: 1, 2: 2, 3: 4, 4: 7, 5: 11, 6: 14, 7: 17}


def recognises(names: Mapping[str, Tensor]) -> bool:
    """Return True if the names are of this family."""
    return has(names, r"backbone\.(slow_path\.)?conv1\.conv\.weight$")


def to_ours(state: Mapping[str, Tensor]) -> Converted:
    """Return their state dict under our names."""
    if has(state, r"backbone\.conv2\."):
        return convert(state, (*_mobilenet_rules(), *HEAD))

    result = convert(state, (*RESNET, *NECK, *HEAD))
    # A network with one pathway leaves an empty group, and so two dots.
    result.state = {name.replace("..", "."): tensor for name, tensor in result.state.items()}
    return result


def _mobilenet_rules() -> list[tuple[str, str]]:
    """Return rules for MobileNetV2, where convolution and BN of a block's last step lie a level higher than others."""
    rules = [
        (r"backbone\.conv1\.conv\.(.*)", r"backbone.features.0.0.\1"),
        (r"backbone\.conv1\.bn\.(.*)", r"backbone.features.0.1.\1"),
        (r"backbone\.conv2\.conv\.(.*)", r"backbone.features.18.0.\1"),
        (r"backbone\.conv2\.bn\.(.*)", r"backbone.features.18.1.\1"),
    ]

    depths = (1, 2, 3, 4, 3, 3, 1)  # blocks of each layer
    for layer, depth in enumerate(depths, start=1):
        for index in range(depth):
            # block 1 does not expand, so it has a step less
            ours, last = f"backbone.features.{_FIRST[layer] + index}.conv", 1 if layer == 1 else 2
            for step in range(last + 1):
                theirs = rf"backbone\.layer{layer}\.{index}\.conv\.{step}\.(?:net\.)?"
                conv, norm = (f"{step}", f"{step + 1}") if step == last else (f"{step}.0", f"{step}.1")
                rules += [
                    (theirs + r"conv\.(.*)", rf"{ours}.{conv}.\1"),
                    (theirs + r"bn\.(.*)", rf"{ours}.{norm}.\1"),
                ]
    return rules
