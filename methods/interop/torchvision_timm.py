"""Convert names of ImageNet networks: torchvision's ResNet and MobileNetV2, timm's `resnet*d`. Only few differ."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from methods.interop._names import Converted, convert, has

SLOW_FIRST = None  # images have no pathways
NEEDS: dict[str, str] = {}

RULES = (
    (r"fc\.(.*)", r"classifier.\1"),
    (r"classifier\.1\.(.*)", r"classifier.\1"),
    (r"((?:conv1|bn1|layer[1-4]|features)\..*)", r"backbone.\1"),
)


def recognises(names: Mapping[str, Tensor]) -> bool:
    """Return True if the names are of this family."""
    return has(names, r"(layer1\.0\.conv1\.weight|features\.0\.0\.weight)$")


def to_ours(state: Mapping[str, Tensor]) -> Converted:
    """Return their state dict under our names."""
    return convert(state, RULES)
