"""Define DenseNet-161 (Huang et al. 2017, arXiv:1608.06993): every layer sees the maps of all layers before it.

State-dict names and initialisation are torchvision's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.convolution import Conv2d
from networks.pooling import MaxPool2d

BOTTLENECK = 4  # output channels of the 1x1 convolution over the growth rate (section 3)


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution, BN, ReLU, 3x3 convolution; its map is appended to its input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = Conv2d(in_channels, BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Append `growth` maps: (N, C, H, W) -> (N, C + growth, H, W)."""
        y = self.conv1(self.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu(self.norm2(y)))], 1)


class DenseNet(nn.Module):
    """Stem, dense blocks with transitions that halve channels and sides, pooling and an optional classifier.

    Args:
        growth: number of maps that a layer adds.
        depths: layers of each block.
        stem: channels of the first convolution.
        num_class: number of classes K; None for no classifier.

    Attributes:
        feature_dim: channels after pooling.
    """

    def __init__(self, growth: int, depths: tuple[int, ...], stem: int, num_class: int | None) -> None:
        super().__init__()
        # Names as in torchvision's state dict: modules are added by name, not by position.
        layers: dict[str, nn.Module] = {
            "conv0": Conv2d(3, stem, 7, stride=2, padding=3, bias=False),
            "norm0": nn.BatchNorm2d(stem),
            "relu0": nn.ReLU(inplace=True),
            "pool0": MaxPool2d(3, stride=2, padding=1),
        }

        channels = stem
        for number, depth in enumerate(depths, start=1):
            # Each layer adds `growth` maps to the input of the next.
            block = {f"denselayer{i + 1}": DenseLayer(channels + i * growth, growth) for i in range(depth)}
            layers[f"denseblock{number}"] = _named(block)
            channels += depth * growth
            if number < len(depths):
                layers[f"transition{number}"] = _transition(channels)
                channels //= 2

        layers["norm5"] = nn.BatchNorm2d(channels)
        self.features = _named(layers)

        self.feature_dim = channels
        self.classifier = None if num_class is None else nn.Linear(channels, num_class)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (N, feature_dim), or scores (N, K) with a classifier, of images (N, 3, H, W)."""
        x = F.relu(self.features(x))  # no layer follows that would begin with its own ReLU
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, C, H, W) -> (N, C)
        return x if self.classifier is None else self.classifier(x)


def _transition(channels: int) -> nn.Sequential:
    conv = Conv2d(channels, channels // 2, 1, bias=False)
    parts = {"norm": nn.BatchNorm2d(channels), "relu": nn.ReLU(inplace=True), "conv": conv, "pool": nn.AvgPool2d(2)}
    return _named(parts)


def _named(modules: Mapping[str, nn.Module]) -> nn.Sequential:
    sequence = nn.Sequential()
    for name, module in modules.items():
        sequence.add_module(name, module)
    return sequence


def densenet161(*, num_class: int | None = None) -> DenseNet:
    """Build DenseNet-161: 28,681,000 parameters with 1000 classes, 7.7 GMAC at 224x224."""
    return DenseNet(48, (6, 12, 36, 24), 96, num_class)
