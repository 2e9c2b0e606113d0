"""Define MobileOne-S4 (Vasu et al. 2023, arXiv:2206.04040, tables 2 and 3), in its training form.

* A block is a depthwise 3x3 and a pointwise 1x1 unit. A unit sums a convolution, a 1x1 convolution (in the 3x3 unit)
  and the identity (if the shape stays), each with its own BN. In evaluation they equal one convolution; the code does
  not join them.
* The slot `branch_input` of every unit is an `nn.Identity` until a method fills it. It precedes all branches.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

# (channels, blocks, blocks with squeeze-and-excitation at the end) of the stages; each begins with stride 2.
S4 = ((192, 2, 0), (448, 8, 0), (896, 10, 5), (2048, 1, 1))
STEM = 64
REDUCTION = 16  # of squeeze-and-excitation, as in Hu et al. 2018


class SqueezeExcite(nn.Module):
    """Channel weights from the mean of the map (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // REDUCTION, 1)
        self.expand = nn.Conv2d(channels // REDUCTION, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels; same shape (N, C, H, W)."""
        weights = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))  # (N, C, H, W) -> (N, C, 1, 1)
        return x * weights.sigmoid()


class Unit(nn.Module):
    """Sum of the branches, optional squeeze-and-excitation, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        excite: bool = False,
    ) -> None:
        super().__init__()

        self.branch_input: nn.Module = nn.Identity()
        self.conv = _conv_bn(in_channels, out_channels, kernel, stride, groups)
        # A 1x1 unit has no separate 1x1 branch; the identity branch needs equal shapes.
        self.scale = _conv_bn(in_channels, out_channels, 1, stride, groups) if kernel > 1 else None
        self.identity = nn.BatchNorm2d(in_channels) if stride == 1 and in_channels == out_channels else None

        self.excite = SqueezeExcite(out_channels) if excite else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit: (N, in_channels, H, W) -> (N, out_channels, H/stride, W/stride)."""
        x = self.branch_input(x)
        y = self.conv(x)
        for branch in (self.scale, self.identity):
            if branch is not None:
                y = y + branch(x)
        return self.relu(self.excite(y))


class MobileOne(nn.Module):
    """Stem, four stages, global average pooling and an optional classifier.

    Args:
        stages: see `S4`.
        num_class: number of classes K; None for no classifier.

    Attributes:
        feature_dim: channels after pooling.
    """

    def __init__(self, stages: tuple[tuple[int, int, int], ...], num_class: int | None) -> None:
        super().__init__()
        self.stem = Unit(3, STEM, 3, stride=2)

        self.stages = nn.ModuleList()
        channels = STEM
        for width, depth, excited in stages:
            units: list[nn.Module] = []
            for block in range(depth):
                excite = block >= depth - excited  # squeeze-and-excitation only at the end of a stage
                stride = 1 if block else 2
                units += [
                    Unit(channels, channels, 3, stride=stride, groups=channels, excite=excite),
                    Unit(channels, width, 1, excite=excite),
                ]
                channels = width
            self.stages.append(nn.Sequential(*units))

        self.feature_dim = channels
        self.classifier = None if num_class is None else nn.Linear(channels, num_class)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return features (N, feature_dim), or scores (N, K) with a classifier, of images (N, 3, H, W)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)

        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, C, H, W) -> (N, C)
        return x if self.classifier is None else self.classifier(x)


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def mobileone_s4(*, num_class: int | None = None) -> MobileOne:
    """Build MobileOne-S4: 14,951,248 parameters (1000 classes, training form), 3.0 GMAC at 224x224 in one branch."""
    return MobileOne(S4, num_class)
