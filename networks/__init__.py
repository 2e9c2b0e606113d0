"""Define the backbones: images or clips in, features or class scores out. They import torch and none of our modules.

* State-dict names are torchvision's, so its published weights fit without a map; torchvision itself is not needed.
* With `num_class=None` there is no classifier and the output is the pooled feature, (N, feature_dim).
* `resnet3d` has the networks over space and time; methods select them by the name of the 2D network of the same layout.
* Every residual block of a 2D network has a slot `branch_input` (an `nn.Identity`, so it adds no state-dict key). A
  module in this slot changes the input of the block's first convolution, but not that of the shortcut. Methods place
  temporal operators in it.
* `VIDEO` names the networks over clips, (B, 3, T, H, W) -> tokens (B, N, feature_dim); see `vit3d`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from networks import vit3d
from networks.densenet import densenet161
from networks.mobilenet import mobilenetv2
from networks.mobileone import mobileone_s4
from networks.resnet import resnet18, resnet34, resnet50, resnet101, resnet152, resnext101_32x4d
from networks.resnet_vd import resnet18_vd, resnet34_vd, resnet50_vd, resnet101_vd

# Networks over clips; the keys of both tables are the values of `model.backbone`.
VIDEO: dict[str, Callable[..., nn.Module]] = {
    "vit3d": vit3d.vit3d,
    "vit3d_small": vit3d.vit3d_small,
    "vit3d_base": vit3d.vit3d_base,
    "vit3d_large": vit3d.vit3d_large,
    "vit3d_huge": vit3d.vit3d_huge,
    "vit3d_giant": vit3d.vit3d_giant,
}
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "resnet18_vd": resnet18_vd,
    "resnet34_vd": resnet34_vd,
    "resnet50_vd": resnet50_vd,
    "resnet101_vd": resnet101_vd,
    "resnext101_32x4d": resnext101_32x4d,
    "densenet161": densenet161,
    "mobilenetv2": mobilenetv2,
    "mobileone_s4": mobileone_s4,
    **VIDEO,
}
