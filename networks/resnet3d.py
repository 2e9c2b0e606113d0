"""Define ResNet-18/34/50/101 over space and time: (B, C, T, H, W) in, a feature map with the same T out.

* A 2D ResNet (layout v1.5) whose convolutions get a temporal extent: no stride in time, and a temporal kernel per stage
  (Feichtenhofer et al. 2019, arXiv:1812.03982, table 1). In a bottleneck the first 1x1 carries it, (k, 1, 1); in a
  basic block the first 3x3, (k, 3, 3). ResNet-50 with kernels (1, 1, 1, 3, 3) for stem and stages is SlowOnly's.
* State-dict names are those of the 2D ResNet, so `inflate` converts 2D weights key by key.
* Stages are `layer1` ... `layer4` (res2 ... res5 in the papers), plain `nn.Sequential`s of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from networks.convolution import Conv3d
from networks.pooling import MaxPool3d

KERNELS_SLOW = (1, 1, 1, 3, 3)  # temporal kernels of stem, res2 ... res5
# The Fast pathway of SlowFast (table 1).
KERNELS_FAST = (5, 3, 3, 3, 3)


class BasicBlock3d(nn.Module):
    """Convolutions (k, 3, 3) and (1, 3, 3) and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, width, (kernel, 3, 3), stride)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = _conv(width, width, (1, 3, 3))
        self.bn2 = nn.BatchNorm3d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (B, in_channels, T, H, W) -> (B, width, T, H/stride, W/stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)  # in place: one map fewer in memory
        return self.relu(y)


class Bottleneck3d(nn.Module):
    """Convolutions (k, 1, 1), (1, 3, 3) with the stride, and (1, 1, 1), and a shortcut (ResNet-50 and -101)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, kernel: int) -> None:
        super().__init__()

        out_channels = width * self.expansion
        # The first 1x1 convolution carries the temporal kernel.
        self.conv1 = _conv(in_channels, width, (kernel, 1, 1))
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = _conv(width, width, (1, 3, 3), stride)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = _conv(width, out_channels, (1, 1, 1))
        self.bn3 = nn.BatchNorm3d(out_channels)
        self.relu = nn.ReLU(inplace=True)

        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (B, in_channels, T, H, W) -> (B, 4*width, T, H/stride, W/stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


# Name of the 2D network with the same shape: (block, blocks per stage).
LAYOUTS: dict[str, tuple[type[BasicBlock3d] | type[Bottleneck3d], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock3d, (2, 2, 2, 2)),
    "resnet34": (BasicBlock3d, (3, 4, 6, 3)),
    "resnet50": (Bottleneck3d, (3, 4, 6, 3)),
    "resnet101": (Bottleneck3d, (3, 4, 23, 3)),
}


class ResNet3d(nn.Module):
    """Stem and four stages, without pooling over the map and without classifier.

    Args:
        layout: a key of `LAYOUTS`.
        width: channels of the stem (64; a Fast pathway has 64 / 8).
        kernels: temporal kernels of stem, res2, res3, res4 and res5; odd.
        lateral: channels that the caller appends to the input of res2, res3, res4 and res5 (SlowFast).
        res4_temporal_blocks: number of blocks of res4 with the temporal kernel, the others get 1; None for all.
            ResNet-101 with 6 keeps the temporal extent of ResNet-50.
        zero_init_residual: scale 0 for the last BN of every block, so that blocks start as identities (Goyal et al.
            2017, arXiv:1706.02677, section 5.1).

    Attributes:
        feature_dim: channels of res5's output.
        out_channels: channels of the outputs of stem, res2, res3, res4 and res5.

    Raises:
        ValueError: unknown layout.
    """

    def __init__(
        self,
        layout: str,
        *,
        width: int = 64,
        kernels: tuple[int, int, int, int, int] = KERNELS_SLOW,
        lateral: tuple[int, int, int, int] = (0, 0, 0, 0),
        res4_temporal_blocks: int | None = None,
        zero_init_residual: bool = True,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"there is no 3D form of {layout!r}; choose one of {', '.join(LAYOUTS)}")

        block, depths = LAYOUTS[layout]
        # Channels double from stage to stage; a bottleneck's output is 4 times its width.
        self.out_channels = (width, *(width * 2**i * block.expansion for i in range(4)))
        self.feature_dim = self.out_channels[-1]

        self.conv1 = _conv(3, width, (kernels[0], 7, 7), stride=2)
        self.bn1 = nn.BatchNorm3d(width)
        self.relu = nn.ReLU(inplace=True)
        # No pooling in time anywhere: T stays.
        self.maxpool = MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))

        stages = []
        for i, depth in enumerate(depths):
            # Only res4 (i = 2) can have fewer temporal blocks than blocks.
            temporal = depth if i != 2 or res4_temporal_blocks is None else res4_temporal_blocks
            stages.append(nn.Sequential())
            for j in range(depth):
                in_channels = self.out_channels[i + 1] if j else self.out_channels[i] + lateral[i]
                # res2 has the stem's resolution; the first block of each later stage halves it.
                stride = 2 if i and not j else 1
                stages[i].append(block(in_channels, width * 2**i, stride, kernels[i + 1] if j < temporal else 1))

        self.layer1, self.layer2, self.layer3, self.layer4 = stages

        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            # The last BN of each block.
            elif zero_init_residual and isinstance(module, BasicBlock3d | Bottleneck3d):
                nn.init.zeros_((module.bn2 if isinstance(module, BasicBlock3d) else module.bn3).weight)

    def stem(self, x: Tensor) -> Tensor:
        """Apply the stem: (B, 3, T, H, W) -> (B, width, T, H/4, W/4)."""
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def res4(self, x: Tensor) -> Tensor:
        """Return the clip's map of stride 16: (B, 3, T, H, W) -> (B, out_channels[3], T, H/16, W/16)."""
        return self.layer3(self.layer2(self.layer1(self.stem(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Return the clip's feature map: (B, 3, T, H, W) -> (B, feature_dim, T, H/32, W/32)."""
        return self.layer4(self.res4(x))


def inflate(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Convert weights of a 2D network for the 3D network with the same names.

    A 2D kernel is repeated k times along the new axis and divided by k (Carreira and Zisserman 2017, arXiv:1705.07750,
    section 2.1). So for a clip of equal frames the 3D network gives the 2D network's result, except near the first and
    last frames, where zero padding has an effect. All tensors other than 2D kernels of 3D convolutions stay unchanged.

    Args:
        state: name: tensor.
        shapes: name: shape in the 3D network, which defines k.
    """
    return {
        name: _inflated(tensor, shapes[name][2]) if tensor.dim() == 4 and len(shapes.get(name, ())) == 5 else tensor
        for name, tensor in state.items()
    }


def _inflated(kernel: Tensor, k: int) -> Tensor:
    """Repeat and scale a kernel: (O, I, h, w) -> (O, I, k, h, w)."""
    return kernel.unsqueeze(2).repeat(1, 1, k, 1, 1) / k


def _conv(in_channels: int, out_channels: int, kernel: tuple[int, int, int], stride: int = 1) -> Conv3d:
    """Return a convolution with a stride in space only; the padding keeps the size at stride 1."""
    # Half the (odd) kernel on each side.
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return Conv3d(in_channels, out_channels, kernel, (1, stride, stride), padding, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return 1x1x1 convolution and BN if the shape changes, else None (the identity)."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(_conv(in_channels, out_channels, (1, 1, 1), stride), nn.BatchNorm3d(out_channels))
