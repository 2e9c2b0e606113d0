"""Define ResNet 18 to 152 (He et al. 2016, arXiv:1512.03385) and ResNeXt-101 (Xie et al. 2017, arXiv:1611.05431).

* Layout "v1.5": in a bottleneck the 3x3 convolution carries the stride, not the 1x1 before it (torchvision, MMAction2's
  `style='pytorch'`).
* State-dict names and initialisation are torchvision's.
* Two kinds of slots without parameters, both `nn.Identity` until a method fills them: `branch_input` of every block,
  and `before_layer2` (TSM's temporal pooling).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from networks.convolution import Conv2d
from networks.pooling import MaxPool2d


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1  # output channels over width

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch_input: nn.Module = nn.Identity()
        self.conv1 = Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (N, in_channels, H, W) -> (N, width, H/stride, W/stride)."""
        y = self.relu(self.bn1(self.conv1(self.branch_input(x))))
        y = self.bn2(self.conv2(y))
        # In place: one map fewer in memory.
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions and a shortcut (ResNet-50 and deeper)."""

    expansion = 4  # output channels over width

    def __init__(self, in_channels: int, width: int, stride: int, *, groups: int = 1, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or width  # channels of the 3x3 convolution

        self.branch_input: nn.Module = nn.Identity()
        self.conv1 = Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = Conv2d(inner, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)

        self.downsample = _shortcut(in_channels, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (N, in_channels, H, W) -> (N, 4*width, H/stride, W/stride)."""
        y = self.relu(self.bn1(self.conv1(self.branch_input(x))))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)  # in place: one map fewer in memory
        return self.relu(y)


class Bottleneck32x4d(Bottleneck):
    """A bottleneck whose 3x3 convolution has 32 groups, of 4 channels in the first stage (ResNeXt, table 1)."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__(in_channels, width, stride, groups=32, inner=2 * width)


class ResNet(nn.Module):
    """Stem, four stages, global average pooling and an optional classifier.

    Args:
        block: the kind of residual block.
        depths: number of blocks in each of the four stages.
        num_class: number of classes K of `fc`; None for no classifier.

    Attributes:
        feature_dim: channels after pooling (512 or 2048).
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, int, int, int], num_class: int | None
    ) -> None:
        super().__init__()
        self.feature_dim = 512 * block.expansion
        # The stem: stride 4 in all.

        self.conv1 = Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool2d(3, stride=2, padding=1)

        self.layer1 = _stage(block, 64, 64, depths[0], stride=1)
        self.before_layer2: nn.Module = nn.Identity()
        self.layer2 = _stage(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, depths[3], stride=2)

        self.fc = None if num_class is None else nn.Linear(self.feature_dim, num_class)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return features or class scores of N images.

        Args:
            x: (N, 3, H, W), float.

        Returns:
            (N, feature_dim), or (N, K) with a classifier.
        """
        # Sides: 1/4 after the stem and layer1, then 1/8, 1/16, 1/32.
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.before_layer2(self.layer1(x)))
        x = self.layer4(self.layer3(x))

        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, C, H, W) -> (N, C)
        return x if self.fc is None else self.fc(x)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return 1x1 convolution and BN if the shape changes, else None (the identity)."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, depth: int, *, stride: int
) -> nn.Sequential:
    """Return `depth` blocks; the first one changes width and resolution."""
    rest = [block(width * block.expansion, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(block(in_channels, width, stride), *rest)


def resnet18(*, num_class: int | None = None) -> ResNet:
    """Build ResNet-18: 11,689,512 parameters with 1000 classes, 1.8 GMAC at 224x224."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_class)


def resnet34(*, num_class: int | None = None) -> ResNet:
    """Build ResNet-34: 21,797,672 parameters with 1000 classes, 3.7 GMAC at 224x224."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_class)


def resnet50(*, num_class: int | None = None) -> ResNet:
    """Build ResNet-50: 25,557,032 parameters with 1000 classes, 4.1 GMAC at 224x224."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_class)


def resnet101(*, num_class: int | None = None) -> ResNet:
    """Build ResNet-101: 44,549,160 parameters with 1000 classes, 7.8 GMAC at 224x224."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_class)


def resnet152(*, num_class: int | None = None) -> ResNet:
    """Build ResNet-152: 60,192,808 parameters with 1000 classes, 11.6 GMAC at 224x224."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_class)


def resnext101_32x4d(*, num_class: int | None = None) -> ResNet:
    """Build ResNeXt-101 32x4d: 44,177,704 parameters with 1000 classes, 8.0 GMAC at 224x224."""
    return ResNet(Bottleneck32x4d, (3, 4, 23, 3), num_class)
