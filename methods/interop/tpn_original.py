"""Convert names of the TPN authors' repository: TPN on SlowOnly and on TSM.

In their code the first level fusion has the second name, `level_fusion_op2`. TSM's shift also comes before the
convolutions of the shortcuts (`shift_shortcut`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from methods.interop._names import Converted, convert, has

SLOW_FIRST = None  # no SlowFast here
NEEDS = {"shift_direction": "tsm", "shift_shortcut": "true", "flow": "cascade"}


def _fusion(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    """Return the names of one level fusion."""
    return (
        (rf"necks\.{theirs}\.ops\.(\d)\.conv\.(.*)", rf"neck.{ours}.levels.\1.conv.\2"),
        (rf"necks\.{theirs}\.ops\.(\d)\.norm\.(.*)", rf"neck.{ours}.levels.\1.bn.\2"),
        (rf"necks\.{theirs}\.fusion_conv\.0\.(.*)", rf"neck.{ours}.fusion.conv.\1"),
        (rf"necks\.{theirs}\.fusion_conv\.1\.(.*)", rf"neck.{ours}.fusion.bn.\1"),
    )


RULES = (
    *_fusion("level_fusion_op2", "top_down_fusion"),
    *_fusion("level_fusion_op", "bottom_up_fusion"),
    (r"necks\.spatial_modulation\.spatial_modulation\.0\.0\.(.*)", r"neck.spatial_modulation.\1"),
    (r"necks\.temporal_modulation_ops\.(\d)\.conv\.(.*)", r"neck.temporal_modulation.\1.conv.\2"),
    (r"necks\.downsampling_ops\.0\.conv\.(.*)", r"neck.bottom_up.conv.\1"),
    (r"necks\.pyramid_fusion_op\.0\.(.*)", r"neck.pyramid_fusion.conv.\1"),
    (r"necks\.pyramid_fusion_op\.1\.(.*)", r"neck.pyramid_fusion.bn.\1"),
    (r"necks\.aux_head\.convs\.(.*)", r"aux_head.conv.\1"),
    (r"necks\.aux_head\.fc\.(.*)", r"aux_head.fc.\1"),
    (r"cls_head\.fc_cls\.(.*)", r"classifier.\1"),
    # `net` is the convolution inside a shift
    (r"(backbone\..*\.conv1)\.net\.(.*)", r"\1.\2"),
    (r"(backbone\..*)", r"\1"),
)


def recognises(names: Mapping[str, Tensor]) -> bool:
    """Return True if the names are of this family."""
    return has(names, r"necks\.")


def to_ours(state: Mapping[str, Tensor]) -> Converted:
    """Return their state dict under our names."""
    return convert(state, RULES)
