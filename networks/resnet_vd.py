"""Define ResNet-vd 18/34/50/101 (He et al. 2019, "Bag of tricks", arXiv:1812.01187, figure 2: tweaks C and D).

Three changes to `networks.resnet`:

* the 7x7 convolution of the stem becomes three 3x3 ones (3 -> 32 -> 32 -> 64 channels, the first with stride 2);
* a shortcut that halves the resolution uses 2x2 average pooling, and its 1x1 convolution has stride 1, so that
  no position is skipped; an odd row or column at the edge is averaged over its existing values (`ceil_mode`, padding
  not counted);
* the activation can be leaky ReLU (PaddleVideo's PP-TSM; slope 0.01).

State-dict names are timm's (`resnet50d`). Slots `branch_input` and `before_layer2` are those of `networks.resnet`.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from networks.convolution import Conv2d
from networks.resnet import BasicBlock, Bottleneck, ResNet

ACTIVATIONS = {"relu": lambda: nn.ReLU(inplace=True), "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True)}


class ResNetVd(ResNet):
    """A `ResNet` with the three changes above.

    Args:
        block: the kind of residual block.
        depths: number of blocks in each of the four stages.
        num_class: number of classes K of `fc`; None for no classifier.
        activation: a key of `ACTIVATIONS`, used everywhere.

    Raises:
        ValueError: unknown activation.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_class: int | None,
        activation: str,
    ) -> None:
        super().__init__(block, depths, num_class)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")

        act = ACTIVATIONS[activation]
        self.conv1 = nn.Sequential(
            *(_conv3x3(3, 32, stride=2), nn.BatchNorm2d(32), act()),
            *(_conv3x3(32, 32), nn.BatchNorm2d(32), act()),
            _conv3x3(32, 64),  # its BN is bn1
        )
        self.relu = act()

        # The blocks are those of ResNet, changed in place.
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for residual in stage:
                assert isinstance(residual, BasicBlock | Bottleneck)
                residual.relu = act()
                if residual.downsample is not None:
                    residual.downsample = _shortcut(residual.downsample)


def _shortcut(downsample: nn.Sequential) -> nn.Sequential:
    """Return pooling (or nothing at stride 1), then the convolution at stride 1, then BN."""
    conv, norm = downsample
    assert isinstance(conv, nn.Conv2d)
    # The pooling takes over the stride of the convolution.
    strided = conv.stride[0] == 2
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if strided else nn.Identity()
    conv.stride = (1, 1)
    return nn.Sequential(pool, conv, norm)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    conv = Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    # ResNet has initialised its own layers before this one exists.
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def resnet18_vd(*, num_class: int | None = None, activation: Literal["relu", "leaky_relu"] = "relu") -> ResNetVd:
    """Build ResNet-18-vd: 11,400,944 parameters with 400 classes."""
    return ResNetVd(BasicBlock, (2, 2, 2, 2), num_class, activation)


def resnet34_vd(*, num_class: int | None = None, activation: Literal["relu", "leaky_relu"] = "relu") -> ResNetVd:
    """Build ResNet-34-vd: 21,509,104 parameters with 400 classes."""
    return ResNetVd(BasicBlock, (3, 4, 6, 3), num_class, activation)


def resnet50_vd(*, num_class: int | None = None, activation: Literal["relu", "leaky_relu"] = "relu") -> ResNetVd:
    """Build ResNet-50-vd: 24,346,864 parameters with 400 classes, 4.35 GMAC at 224x224."""
    return ResNetVd(Bottleneck, (3, 4, 6, 3), num_class, activation)


def resnet101_vd(*, num_class: int | None = None, activation: Literal["relu", "leaky_relu"] = "relu") -> ResNetVd:
    """Build ResNet-101-vd: 43,338,992 parameters with 400 classes, 8.07 GMAC at 224x224."""
    return ResNetVd(Bottleneck, (3, 4, 23, 3), num_class, activation)
