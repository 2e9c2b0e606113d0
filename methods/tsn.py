"""TSN: temporal segment networks (Wang et al. 2016, arXiv:1608.00859).

* A 2D network sees T frames, one from each segment of the video, each of them alone; their class scores are averaged.
  The order of the frames does not matter, so it cannot separate motions that differ in order only: it is the baseline
  for every other method.
* It accepts any number of frames in evaluation (25 in the paper), not only the T it was trained with.
* Choose it as the baseline, or if the scene decides the class.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from methods import _backbones
from methods._heads import CONSENSUS, new_classifier, new_dropout, segmental_consensus


class TSN(nn.Module):
    """Classify by a 2D backbone on every frame, dropout, a linear classifier and the average over the frames.

    Args:
        backbone: (N, C, H, W) -> (N, backbone.feature_dim).
        num_class: K.
        num_segments: T.
        dropout: probability before the classifier.
        consensus: "logits" or "features" (see `segmental_consensus`).
        fc_std: standard deviation of the classifier's initial weights.
        partial_bn: in training every BN layer but the first keeps its statistics, scale and shift (section 3.2).
        norm_eval: in training all BN layers use and keep their running statistics; scale and shift learn.

    Attributes:
        frames_per_clip: T.
        fc_lr5: True if the optimiser's TSN/TSM policy trains the classifier five times as fast (utils/optim.py).
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_class: int,
        num_segments: int,
        dropout: float,
        consensus: str,
        fc_std: float,
        partial_bn: bool,
        fc_lr5: bool,
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        if consensus not in CONSENSUS:
            raise ValueError(f"consensus is {consensus!r}; it must be one of {', '.join(CONSENSUS)}")
        if num_segments < 1:
            raise ValueError(f"num_segments is {num_segments}; it must be at least 1")

        self.backbone = backbone
        self.dropout = new_dropout(dropout)
        self.classifier = new_classifier(_backbones.feature_dim(backbone), num_class, fc_std)
        self.consensus = consensus
        self.partial_bn = partial_bn
        self.norm_eval = norm_eval
        self.fc_lr5 = fc_lr5
        self.frames_per_clip = num_segments
        # applies partial_bn and norm_eval from the start
        self.train()

    def forward(self, clips: Tensor) -> Tensor:
        """Return the class scores of B clips.

        Args:
            clips: (B, C, T, H, W), float, normalised.

        Returns:
            Logits (B, K).
        """
        frames = clips.transpose(1, 2).flatten(0, 1)  # (B, C, T, H, W) -> (B*T, C, H, W); no copy if C is innermost
        features = self.backbone(frames).unflatten(0, (clips.shape[0], -1))  # (B*T, D) -> (B, T, D)
        return segmental_consensus(features, self.dropout, self.classifier, self.consensus)

    def train(self, mode: bool = True) -> TSN:
        """Set training or evaluation mode.

        With partial_bn all BN layers but the first stay as they are in both, with norm_eval the statistics of all do.
        """
        # needed after each `model.train()` of a loop, which would undo it
        super().train(mode)
        norms = [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]

        if self.partial_bn:
            for norm in norms[1:]:
                norm.eval().requires_grad_(False)

        if self.norm_eval:
            for norm in norms:
                norm.eval()
        return self


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.5,
    pretrained: bool | str = False,
    consensus: Literal["logits", "features"] = "logits",
    fc_std: float = 0.001,
    partial_bn: bool = False,
    norm_eval: bool = False,
    fc_lr5: bool = False,
    **backbone_options: Any,
) -> TSN:
    """Build TSN on RGB frames (Wang et al. 2016, arXiv:1608.00859); ResNet-50: 24,327,632 parameters, 400 classes.

    Args:
        backbone: a key of `networks.BACKBONES`.
        num_class: K.
        num_segments: T (3 in the paper).
        dropout: probability before the classifier (the authors' code: 0.8 on UCF101, 0.5 on Kinetics).
        pretrained: see `methods.build`.
        consensus: "logits": scores per frame, then their mean; "features": mean of the features, then the scores.
        fc_std: standard deviation of the classifier's initial weights (the authors' code 0.001; MMAction2 and Paddle
            0.01).
        partial_bn: freeze every BN layer but the first in training (section 3.2); for fine-tuning on small data sets.
        norm_eval: keep the statistics of all BN layers in training (MMAction2), those of the starting weights.
        fc_lr5: with `policy: true`, learning rate x5 for the classifier's weight and x10 for its bias.
        backbone_options: options of the backbone, such as `t` of mobilenetv2.
    """
    network = _backbones.make(backbone, backbone_options)
    model = TSN(
        network,
        num_class=num_class,
        num_segments=num_segments,
        dropout=dropout,
        consensus=consensus,
        fc_std=fc_std,
        partial_bn=partial_bn,
        norm_eval=norm_eval,
        fc_lr5=fc_lr5,
    )
    return _backbones.load(model, pretrained, backbone)
