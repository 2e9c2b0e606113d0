"""TPN: temporal pyramid network (Yang et al. 2020, arXiv:2004.03548).

* It is a neck between a backbone and its classifier. Spatial modulation brings the feature levels res4 and res5
  (section 3.1) to one shape, temporal modulation to different tempos (3.2). They exchange information top-down and
  bottom-up and are joined (3.3, 3.4). An auxiliary head on res4 (3.5) is used in training only.
* The backbone is SlowOnly's 3D ResNet or TSM's 2D one.
* The paper calls the two flows "parallel". In the authors' code, and so in all published weights, the bottom-up flow
  starts from the result of the top-down one ("cascade").
* Choose it on top of SlowOnly or TSM if actions differ in tempo; it costs a fifth more arithmetic, and memory.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods import _backbones
from methods._heads import class_scores, new_classifier, new_dropout
from methods._output import Output
from methods.tsm import TemporalShift, insert_shift
from networks.convolution import Conv3d
from networks.pooling import max_pool3d
from networks.resnet import BasicBlock, Bottleneck, ResNet
from networks.resnet3d import ResNet3d
from networks.resnet_vd import ResNetVd

FLOWS = ("cascade", "parallel")
GROUPS = 32  # of the grouped convolutions in temporal modulation and level fusion


class ConvNorm(nn.Module):
    """Apply convolution, BN and ReLU; the padding keeps the size at stride 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = _conv(in_channels, out_channels, kernel, stride=stride, groups=groups)
        self.bn = nn.BatchNorm3d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, T, H, W) to (B, out_channels, T, H/stride, W/stride)."""
        return self.relu(self.bn(self.conv(x)))


class TemporalModulation(nn.Module):
    """Set the tempo of one level: a convolution over time, then every `scale` frames become one (section 3.2)."""

    def __init__(self, in_channels: int, out_channels: int, scale: int, groups: int) -> None:
        super().__init__()
        self.conv = _conv(in_channels, out_channels, (3, 1, 1), groups=groups)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, T, H, W) to (B, out_channels, ceil(T/scale), H, W)."""
        return _pool_time(self.conv(x), self.scale)


class LevelFusion(nn.Module):
    """Join both levels at the coarser tempo: (B, C, T0, H, W), (B, C, T1, H, W) -> (B, D, T1, H, W)."""

    def __init__(self, channels: int, out_channels: int, ratio: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(ConvNorm(channels, channels, (1, 1, 1), groups=GROUPS) for _ in range(2))
        self.fusion = ConvNorm(2 * channels, out_channels, (1, 1, 1))
        self.ratio = ratio

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Join the levels of res4 (`low`) and res5 (`high`)."""
        parts = [self.levels[0](_pool_time(low, self.ratio)), self.levels[1](high)]
        return self.fusion(torch.cat(parts, 1))  # (B, 2*C, T1, H, W) -> (B, D, T1, H, W)


class AuxHead(nn.Module):
    """Classify res4 in training (section 3.5): (B, D/2, T, H, W) -> (B, K)."""

    def __init__(self, feature_dim: int, num_class: int, dropout: float, fc_std: float) -> None:
        super().__init__()
        self.conv = ConvNorm(feature_dim // 2, feature_dim, (1, 3, 3), stride=2)
        self.dropout = new_dropout(dropout)
        self.fc = new_classifier(feature_dim, num_class, fc_std)

    def forward(self, res4: Tensor) -> Tensor:
        """Return the class scores."""
        return self.fc(self.dropout(self.conv(res4).mean((2, 3, 4))))  # (B, D, T, H', W') -> (B, D) -> (B, K)


class Neck(nn.Module):
    """Build the pyramid: levels res4 and res5 in, one map out.

    Args:
        feature_dim: D, channels of res5; res4 has D/2. Between the flows there are D/2.
        scales: (s0, s1), frames of res4 and res5 that become one; s0 divides s1.
        flow: one of `FLOWS`.
    """

    def __init__(self, feature_dim: int, *, scales: tuple[int, int], flow: str) -> None:
        super().__init__()
        if flow not in FLOWS:
            raise ValueError(f"flow is {flow!r}; it must be one of {', '.join(FLOWS)}")
        if scales[0] < 1 or scales[1] % scales[0]:
            raise ValueError(f"scales are {scales[0]} and {scales[1]}; the first must divide the second")

        inner, ratio = feature_dim // 2, scales[1] // scales[0]
        self.flow, self.ratio = flow, ratio
        # res4 has twice the side and half the channels of res5
        self.spatial_modulation = ConvNorm(inner, feature_dim, (1, 3, 3), stride=2)
        self.temporal_modulation = nn.ModuleList(
            TemporalModulation(feature_dim, inner, scale, GROUPS) for scale in scales
        )
        self.top_down_fusion = LevelFusion(inner, feature_dim, ratio)
        self.bottom_up = TemporalModulation(inner, inner, ratio, groups=1)
        self.bottom_up_fusion = LevelFusion(inner, feature_dim, ratio)
        self.pyramid_fusion = ConvNorm(2 * feature_dim, feature_dim, (1, 1, 1))

    def forward(self, res4: Tensor, res5: Tensor) -> Tensor:
        """Map (B, D/2, T, 2H, 2W) and (B, D, T, H, W) to (B, D, ceil(T/s1), H, W)."""
        low, high = self.spatial_modulation(res4), res5  # both (B, D, T, H, W)
        low, high = self.temporal_modulation[0](low), self.temporal_modulation[1](high)  # (B, D/2, T0 or T1, H, W)

        # The two flows; cascade starts the second one from the result of the first.
        fed = low + F.interpolate(high, size=low.shape[2:], mode="nearest")  # top-down
        first = self.top_down_fusion(fed, high)
        start = fed if self.flow == "cascade" else low
        second = self.bottom_up_fusion(start, high + self.bottom_up(start))

        return self.pyramid_fusion(torch.cat([first, second], 1))  # (B, 2*D, T1, H, W) -> (B, D, T1, H, W)


class TPN(nn.Module):
    """Classify by backbone, neck, average and dropout; training adds the auxiliary head.

    Attributes:
        frames_per_clip: T.
        aux_head: None for aux_weight = 0.
        fcn_pool, shift_shortcut: see `build`.
    """

    def __init__(
        self,
        backbone: ResNet3d | ResNet,
        neck: Neck,
        *,
        num_class: int,
        num_segments: int,
        dropout: float,
        fc_std: float,
        aux_weight: float,
        fcn_pool: int | None,
        shift_shortcut: bool,
    ) -> None:
        super().__init__()
        feature_dim = _backbones.feature_dim(backbone)

        self.backbone = backbone
        self.neck = neck
        self.aux_head = AuxHead(feature_dim, num_class, dropout, fc_std) if aux_weight else None
        self.dropout = new_dropout(dropout)
        self.classifier = new_classifier(feature_dim, num_class, fc_std)

        self.aux_weight, self.fcn_pool, self.shift_shortcut = aux_weight, fcn_pool, shift_shortcut
        # for `methods.interop`, see methods/_traits.py
        self.weights_without = () if aux_weight else ("aux_head.",)
        self.weight_options = {"flow": neck.flow}
        if any(isinstance(module, TemporalShift) for module in backbone.modules()):
            self.weight_options["shift_shortcut"] = str(shift_shortcut).lower()
        self.frames_per_clip = num_segments

    def forward(self, clips: Tensor) -> Tensor | Output:
        """Map (B, C, T, H, W) to logits (B, K); in training, with an auxiliary head, to an `Output`.

        Raises:
            ValueError: T is not the number that the model was built for.
        """
        if clips.shape[2] != self.frames_per_clip:
            raise ValueError(
                f"a clip has {clips.shape[2]} frames, this TPN was built for num_segments = {self.frames_per_clip}"
            )

        res4, res5 = self._levels(clips)
        pyramid = self.neck(res4, res5)
        # (B, D, T1, H, W) -> (B, D, T1, H - s + 1, W - s + 1)
        if self.fcn_pool is not None and not self.training and min(pyramid.shape[3:]) > self.fcn_pool:
            pyramid = F.avg_pool3d(pyramid, (1, self.fcn_pool, self.fcn_pool), stride=1)
        features = self.dropout(pyramid.mean((2, 3, 4)))  # (B, D, T1, H, W) -> (B, D)
        logits = class_scores(self.classifier, features)  # (B, D) -> (B, K)

        if not self.training or self.aux_head is None:
            return logits
        return Output(logits, self.aux_head(res4), self.aux_weight)

    def _levels(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Return res4 (B, D/2, T, 2H, 2W) and res5 (B, D, T, H, W)."""
        net = self.backbone
        if isinstance(net, ResNet3d):
            res4 = net.res4(clips)
            return res4, net.layer4(res4)

        # the 2D network of TSM sees each frame alone
        frames = clips.transpose(1, 2).flatten(0, 1)  # (B, C, T, H, W) -> (B*T, C, H, W)
        x = net.maxpool(net.relu(net.bn1(net.conv1(frames))))
        res4 = net.layer3(net.layer2(net.before_layer2(net.layer1(x))))
        levels = (res4, net.layer4(res4))

        # (B*T, D, H, W) -> (B, D, T, H, W)
        first, second = (level.unflatten(0, (clips.shape[0], -1)).transpose(1, 2) for level in levels)
        return first, second


def _conv(
    in_channels: int, out_channels: int, kernel: tuple[int, int, int], *, stride: int = 1, groups: int = 1
) -> Conv3d:
    """Return a convolution with Xavier-uniform weights (the authors' code) and a stride in space only."""
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    conv = Conv3d(in_channels, out_channels, kernel, (1, stride, stride), padding, groups=groups, bias=False)
    nn.init.xavier_uniform_(conv.weight)
    return conv


def _pool_time(x: Tensor, scale: int) -> Tensor:
    """Return the maximum over groups of `scale` frames: (B, C, T, H, W) -> (B, C, ceil(T/scale), H, W)."""
    return max_pool3d(x, (scale, 1, 1), (scale, 1, 1), ceil_mode=True) if scale > 1 else x


def _tsm_network(backbone: str, num_segments: int, shift_div: int, shift_shortcut: bool) -> ResNet:
    """Build a 2D ResNet with temporal shifts, optionally also before the convolutions in its shortcuts."""
    network = _backbones.make(backbone, {})
    if not isinstance(network, ResNet):
        raise ValueError(f"TPN takes the levels res4 and res5 of a ResNet, not of {backbone}")

    insert_shift(network, num_segments=num_segments, shift_div=shift_div)
    for block in network.modules():
        if shift_shortcut and isinstance(block, BasicBlock | Bottleneck) and block.downsample is not None:
            # the first module of a vd shortcut is a pool
            if isinstance(network, ResNetVd):
                raise ValueError("shift_shortcut is an option of a plain ResNet, not of a vd one")
            conv, norm = block.downsample  # they keep their state-dict names
            block.downsample = nn.Sequential(OrderedDict({"shift": block.branch_input, "0": conv, "1": norm}))

    return network


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.5,
    pretrained: bool | str = False,
    base: Literal["slowonly", "tsm"] = "slowonly",
    scales: tuple[int, int] | None = None,
    flow: Literal["cascade", "parallel"] = "cascade",
    aux_weight: float = 0.5,
    fcn_pool: int | None = None,
    shift_div: int = 8,
    shift_shortcut: bool = False,
    fc_std: float = 0.01,
    zero_init_residual: bool = True,
) -> TPN:
    """Build TPN (Yang et al. 2020, arXiv:2004.03548).

    On SlowOnly-50, 8 frames: 91,498,336 parameters with 400 classes (19.7 million of them used in training only), 50.3
    GMAC at 224.

    Args:
        backbone: resnet18, resnet34, resnet50 or resnet101.
        num_class: K.
        num_segments: T.
        dropout: probability before the classifiers.
        pretrained: see `methods.build`; the neck starts from random weights.
        base: "slowonly" (3D network) or "tsm" (2D network with temporal shifts).
        scales: frames of res4 and of res5 that become one; None for (T, T). (16, 32) in the paper's ResNet-101 32x2.
        flow: "cascade", or "parallel" as in the paper.
        aux_weight: weight of the auxiliary head's loss; 0 for no such head.
        fcn_pool: in evaluation average over all windows of this side with stride 1 and then over the windows, as the
            authors' fully convolutional test does (7 for a 256 crop); None for a plain average of the map.
        shift_div: as for TSM, with base "tsm".
        shift_shortcut: the convolutions in TSM's shortcuts see the shifted frames too (the authors' code, not
            MMAction2).
        fc_std: standard deviation of the classifiers' initial weights.
        zero_init_residual: residual blocks start as identities, with base "slowonly".
    """
    low, high = scales or (num_segments, num_segments)
    if high > num_segments:
        raise ValueError(f"scales are {low} and {high}; there are only {num_segments} frames")

    if base == "slowonly":
        network: ResNet3d | ResNet = ResNet3d(backbone, zero_init_residual=zero_init_residual)
    elif base == "tsm":
        network = _tsm_network(backbone, num_segments, shift_div, shift_shortcut)
    else:
        raise ValueError(f"base is {base!r}; it must be slowonly or tsm")

    model = TPN(
        network,
        Neck(network.feature_dim, scales=(low, high), flow=flow),
        num_class=num_class,
        num_segments=num_segments,
        dropout=dropout,
        fc_std=fc_std,
        aux_weight=aux_weight,
        fcn_pool=fcn_pool,
        shift_shortcut=shift_shortcut,
    )

    return _backbones.load(model, pretrained, backbone)
