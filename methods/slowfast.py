"""SlowFast networks (Feichtenhofer et al. 2019, arXiv:1812.03982).

* Slow pathway (section 3.1): every alpha-th frame, all the channels. Fast pathway (3.2): every frame, 1/beta_inv of the
  channels and temporal kernels in all stages. Lateral connections (3.4): after the stem, res2, res3 and res4 a
  convolution with stride alpha in time brings Fast features to the Slow pathway.
* num_segments is the number of frames of the Fast pathway: 32 for the paper's 4x16 (alpha 8) and 8x8 (alpha 4).
* Published weights fix details that the paper leaves open: `slow_index`, `lateral_norm`, `slow_first`. The defaults are
  those of PySlowFast, the authors' code; MMAction2's Kinetics models need "strided", false and false.
* Choose it for accuracy, if you can afford to train from scratch on a large data set.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from methods import _backbones
from methods._heads import class_scores, new_classifier, new_dropout
from methods._non_local import NonLocal, add_non_local
from methods._traits import ClassifierColumns
from methods.positions import window_means
from networks.convolution import Conv3d
from networks.resnet3d import KERNELS_FAST, KERNELS_SLOW, ResNet3d

SLOW_INDEX = ("linspace", "strided")
WIDTH = 64  # channels of the Slow pathway's stem
FUSION_RATIO = 2  # a lateral connection doubles the Fast pathway's channels


def slow_frames(num_frames: int, alpha: int, rule: str) -> list[int]:
    """Return the indices of the Fast pathway's frames that the Slow pathway sees.

    Args:
        num_frames: T, a multiple of alpha.
        alpha: T / alpha frames are taken.
        rule: "strided": 0, alpha, 2*alpha, ... (MMAction2); "linspace": evenly from the first to the last frame,
            rounded down (PySlowFast): 0, 10, 20, 31 of 32 for alpha = 8.

    Raises:
        ValueError: T is not a multiple of alpha, or the rule is unknown.
    """
    if rule not in SLOW_INDEX:
        raise ValueError(f"slow_index is {rule!r}; it must be one of {', '.join(SLOW_INDEX)}")
    if alpha < 1 or num_frames < 1 or num_frames % alpha:
        raise ValueError(
            f"num_segments is {num_frames}; the Fast pathway's frames must be a multiple of alpha = {alpha}"
        )
    if rule == "strided":
        return list(range(0, num_frames, alpha))
    # on the CPU: `from_pretrained` builds on the meta device first, where tensors have no values
    return torch.linspace(0, num_frames - 1, num_frames // alpha, device="cpu").long().tolist()


class Lateral(nn.Module):
    """Connect the Fast to the Slow pathway: a time-strided convolution (section 3.4, iii), with BN and ReLU or bare.

    Args:
        channels: C of the Fast features.
        alpha: stride in time.
        kernel: extent in time, odd.
        norm: BN and ReLU after the convolution.
    """

    def __init__(self, channels: int, *, alpha: int, kernel: int, norm: bool) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"fusion_kernel is {kernel}; it must be odd")

        out_channels = FUSION_RATIO * channels
        self.conv = Conv3d(channels, out_channels, (kernel, 1, 1), (alpha, 1, 1), (kernel // 2, 0, 0), bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.bn = nn.BatchNorm3d(out_channels) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True) if norm else nn.Identity()

    def forward(self, fast: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to (B, 2*C, T/alpha, H, W)."""
        return self.relu(self.bn(self.conv(fast)))


class TwoPathways(nn.Module):
    """Run Slow and Fast ResNets with the four lateral connections.

    Args:
        slow, fast: the networks; the stages of the Slow one expect the lateral channels.
        frames: indices of the Slow pathway's frames.
        laterals: after stem, res2, res3 and res4.

    Attributes:
        feature_dim: channels of both pathways together (2304 for ResNet-50).
    """

    def __init__(self, slow: ResNet3d, fast: ResNet3d, *, frames: list[int], laterals: list[Lateral]) -> None:
        super().__init__()
        self.slow = slow
        self.fast = fast
        self.laterals = nn.ModuleList(laterals)
        self.frames: Tensor
        self.feature_dim = slow.feature_dim + fast.feature_dim
        # not in the state dict: it follows from the options, and published files lack it
        self.register_buffer("frames", torch.tensor(frames), persistent=False)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 3, T, H, W) to pooled features (B, D_slow) and (B, D_fast)."""
        slow, fast = self.maps(clips)
        return slow.mean((2, 3, 4)), fast.mean((2, 3, 4))  # (B, D, T, H, W) -> (B, D)

    def maps(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 3, T, H, W) to (B, D_slow, T/alpha, H/32, W/32) and (B, D_fast, T, H/32, W/32)."""
        slow, fast = self.slow.stem(clips.index_select(2, self.frames)), self.fast.stem(clips)
        for lateral, name in zip(self.laterals, ("layer1", "layer2", "layer3", "layer4"), strict=True):
            joined = torch.cat([slow, lateral(fast)], 1)  # (B, C + 2*C_fast, T/alpha, H, W)
            slow, fast = self.slow.get_submodule(name)(joined), self.fast.get_submodule(name)(fast)

        return slow, fast


class SlowFast(nn.Module):
    """Classify the features of `TwoPathways` with dropout and a linear classifier.

    Attributes:
        frames_per_clip: T of the Fast pathway.
        slow_first: the classifier's input is [slow, fast]; otherwise [fast, slow].
        slow_index: the rule of the Slow pathway's frames.
    """

    def __init__(
        self,
        backbone: TwoPathways,
        *,
        num_class: int,
        num_segments: int,
        dropout: float,
        fc_std: float,
        slow_first: bool,
        slow_index: str,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = new_dropout(dropout)
        self.classifier = new_classifier(backbone.feature_dim, num_class, fc_std)

        self.slow_first, self.slow_index = slow_first, slow_index
        # for `methods.interop`, see methods/_traits.py
        self.weight_options = {"slow_index": slow_index}
        self.classifier_columns = ClassifierColumns(slow_first, backbone.fast.feature_dim)
        self.frames_per_clip = num_segments

    def forward(self, clips: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to logits (B, K).

        Raises:
            ValueError: T is not the number that the pathways were built for.
        """
        if clips.shape[2] != self.frames_per_clip:
            raise ValueError(
                f"a clip has {clips.shape[2]} frames, this SlowFast was built for num_segments = {self.frames_per_clip}"
            )

        slow, fast = self.backbone(clips)
        features = torch.cat([slow, fast] if self.slow_first else [fast, slow], 1)  # (B, D_slow + D_fast)
        return class_scores(self.classifier, self.dropout(features))  # (B, D) -> (B, K)

    def window_logits(self, clips: Tensor, side: int) -> Tensor:
        """Return the logits of every window of the maps: (B, C, T, H, W) -> (B, P, K); see `methods.positions`."""
        slow, fast = (window_means(features, side) for features in self.backbone.maps(clips))  # (B, P, D)
        features = torch.cat([slow, fast] if self.slow_first else [fast, slow], 2)
        return class_scores(self.classifier, self.dropout(features))


def _slow_and_fast(
    backbone: str, fast_backbone: str, beta_inv: int, options: dict[str, Any], fast_temporal: int | None
) -> tuple[ResNet3d, ResNet3d]:
    """Build the two networks; the stages of the Slow one expect the lateral channels."""
    if beta_inv < 1 or WIDTH % beta_inv:
        raise ValueError(f"beta_inv is {beta_inv}; it must divide the {WIDTH} channels of the Slow pathway's stem")

    fast_options = dict(options, res4_temporal_blocks=fast_temporal)
    fast = ResNet3d(fast_backbone, width=WIDTH // beta_inv, kernels=KERNELS_FAST, **fast_options)
    # one lateral connection before each stage; the last stage's output has none
    first, second, third, fourth, _ = (FUSION_RATIO * channels for channels in fast.out_channels)
    slow = ResNet3d(backbone, width=WIDTH, kernels=KERNELS_SLOW, lateral=(first, second, third, fourth), **options)
    return slow, fast


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.5,
    pretrained: bool | str = False,
    alpha: int = 4,
    beta_inv: int = 8,
    fusion_kernel: int = 7,
    lateral_norm: bool = True,
    slow_index: Literal["linspace", "strided"] = "linspace",
    slow_first: bool = True,
    fast_backbone: str | None = None,
    res4_temporal_blocks: int | None = None,
    fast_res4_temporal_blocks: int | None = None,
    non_local: Literal["embedded_gaussian", "dot_product", "gaussian"] | None = None,
    fc_std: float = 0.01,
    zero_init_residual: bool = True,
) -> SlowFast:
    """Build SlowFast (Feichtenhofer et al. 2019, arXiv:1812.03982).

    ResNet-50 8x8 has 34,566,488 parameters with 400 classes, and 50.6 GMAC at 224.

    Args:
        backbone: resnet18, resnet34, resnet50 or resnet101, of the Slow pathway.
        num_class: K.
        num_segments: T, frames of the Fast pathway; a multiple of alpha.
        dropout: probability before the classifier.
        pretrained: false, or the path of a SlowFast's weights (the paper trains from scratch).
        alpha: ratio of the frame rates, Fast over Slow (8 for 4x16, 4 for 8x8).
        beta_inv: ratio of the channels, Slow over Fast.
        fusion_kernel: temporal kernel of the lateral connections (5 for 4x16, 7 for 8x8 in the published models).
        lateral_norm: BN and ReLU in the lateral connections.
        slow_index: "linspace" or "strided", see `slow_frames`.
        slow_first: order of the classifier's input columns.
        fast_backbone: None for the same depth as the Slow pathway.
        res4_temporal_blocks: blocks of res4 with a temporal kernel; None for all (6 in PySlowFast's R101 "50-50").
        fast_res4_temporal_blocks: the same for the Fast pathway; None for as many (23 in PySlowFast's "50-101").
        non_local: None, "embedded_gaussian", "dot_product" or "gaussian": non-local blocks in res3 and res4 of the Slow
            pathway.
        fc_std: standard deviation of the classifier's initial weights.
        zero_init_residual: residual blocks start as identities.
    """
    frames = slow_frames(num_segments, alpha, slow_index)
    options = {"res4_temporal_blocks": res4_temporal_blocks, "zero_init_residual": zero_init_residual}
    fast_temporal = res4_temporal_blocks if fast_res4_temporal_blocks is None else fast_res4_temporal_blocks
    slow, fast = _slow_and_fast(backbone, fast_backbone or backbone, beta_inv, options, fast_temporal)

    if non_local is not None:
        # the form and the places of PySlowFast's blocks
        add_non_local(slow, first=1, make=lambda channels: NonLocal(channels, non_local, scaled=True, pool_first=True))
    laterals = [
        Lateral(channels, alpha=alpha, kernel=fusion_kernel, norm=lateral_norm) for channels in fast.out_channels[:4]
    ]

    model = SlowFast(
        TwoPathways(slow, fast, frames=frames, laterals=laterals),
        num_class=num_class,
        num_segments=num_segments,
        dropout=dropout,
        fc_std=fc_std,
        slow_first=slow_first,
        slow_index=slow_index,
    )

    return _backbones.load(model, pretrained, backbone)
