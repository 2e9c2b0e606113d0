"""Define MobileNetV2, width 1.0 (Sandler et al. 2018, arXiv:1801.04381, table 2).

* State-dict names and initialisation are torchvision's; activations are ReLU6.
* `t` is the expansion factor of the FIRST block of each stage after the first; the repeated blocks always expand by 6.
  That is the meaning of `model.kwargs.t` in the experiments' `config.yaml`; t = 6 is the published network.
* The slot `branch_input` of every block is an `nn.Identity` until a method fills it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from networks.relu6 import ReLU6

# (channels, blocks, stride of the first block) of the seven stages; stage 0 does not expand.
STAGES = ((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
EXPANSION = 6  # of all blocks but the first of a stage
FEATURE_DIM = 1280


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (3x3), project (1x1); the shortcut connects the narrow ends.

    Attributes:
        expands: True if there is a 1x1 expansion (expansion factor > 1).
        use_res_connect: True if there is a shortcut (stride 1 and equal channels).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.expands = expansion != 1
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self.branch_input: nn.Module = nn.Identity()

        hidden = in_channels * expansion
        layers: list[nn.Module] = [_conv_bn_relu(in_channels, hidden, 1)] if self.expands else []
        layers += [
            _conv_bn_relu(hidden, hidden, 3, stride=stride, groups=hidden),
            # No activation after the projection: in few channels it would lose information (paper, section 3.2).
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (N, in_channels, H, W) -> (N, out_channels, H/stride, W/stride)."""
        y = self.conv(self.branch_input(x))
        return x + y if self.use_res_connect else y


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residuals, last 1x1 convolution, global average pooling and an optional classifier.

    Args:
        t: expansion factor of the first block of stages 1 to 6.
        num_class: number of classes K; None for no classifier.

    Attributes:
        feature_dim: channels after pooling (1280).
    """

    def __init__(self, t: int, num_class: int | None) -> None:
        super().__init__()
        self.feature_dim = FEATURE_DIM
        layers: list[nn.Module] = [_conv_bn_relu(3, 32, 3, stride=2)]
        channels = 32
        for stage, (width, depth, stride) in enumerate(STAGES):
            for index in range(depth):
                first = t if stage else 1  # stage 0 does not expand
                layers.append(
                    InvertedResidual(channels, width, 1 if index else stride, EXPANSION if index else first),
                )
                channels = width

        layers.append(_conv_bn_relu(channels, FEATURE_DIM, 1))
        self.features = nn.Sequential(*layers)

        # Dropout as in torchvision, so that the state dict has its keys.
        self.classifier = None
        if num_class is not None:
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(FEATURE_DIM, num_class))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return features or class scores of N images.

        Args:
            x: (N, 3, H, W), float.

        Returns:
            (N, 1280), or (N, K) with a classifier.
        """
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)  # (N, C, H, W) -> (N, C)
        return x if self.classifier is None else self.classifier(x)


def _conv_bn_relu(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return convolution, BN and ReLU6; the padding keeps the size at stride 1."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        ReLU6(),
    )


def mobilenetv2(*, t: int = 6, num_class: int | None = None) -> MobileNetV2:
    """Build MobileNetV2: 3,504,872 parameters with 1000 classes, 0.31 GMAC at 224x224.

    Args:
        t: expansion factor of the first block of each stage after the first, at least 1; 6 is the published network.
        num_class: number of classes K; None for no classifier.

    Raises:
        ValueError: t is below 1.
    """
    if t < 1:
        raise ValueError(f"mobilenetv2: t (expansion factor) is {t}; it must be at least 1")
    return MobileNetV2(t, num_class)
