"""PP-TSM: TSM retuned (PaddleVideo, docs/en/model_zoo/recognition/pp-tsm.md; no paper of its own).

* TSM on ResNet-vd with leaky ReLU. PaddleVideo's shift differs from the TSM repository's in three ways, which are the
  defaults here so that its weights fit: the two folds are exchanged, a fold is 1/T of the channels, and every block
  shifts, even in ResNet-101.
* Choose it instead of TSM for the same cost and a better recipe.
"""

from __future__ import annotations

from typing import Any, Literal

from methods import _backbones
from methods.pptsn import vd_name
from methods.tsm import TSM, insert_shift


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.5,
    pretrained: bool | str = False,
    activation: Literal["relu", "leaky_relu"] = "leaky_relu",
    shift_div: int | None = None,
    shift_direction: Literal["tsm", "paddle"] = "paddle",
    n_round: int | None = 1,
    fc_std: float = 0.01,
    partial_bn: bool = False,
    fc_lr5: bool = True,
) -> TSM:
    """Build PP-TSM: TSM (Lin et al. 2019, arXiv:1811.08383) on ResNet-vd (He et al. 2019, arXiv:1812.01187).

    ResNet-50-vd has 24,346,864 parameters with 400 classes.

    Args:
        backbone: resnet50_vd, or resnet50 for short; likewise 18, 34 and 101.
        num_class: K.
        num_segments: T.
        dropout: probability before the classifier, in each frame.
        pretrained: see `methods.build`.
        activation: "leaky_relu" (slope 0.01) or "relu".
        shift_div: one over the share of channels shifted in each direction; None for T, PaddleVideo's rule.
        shift_direction: "paddle" or "tsm", see `methods.tsm.temporal_shift`.
        n_round: shift every n-th block; None for the TSM repository's rule.
        fc_std: standard deviation of the classifier's initial weights.
        partial_bn: freeze every BN layer but the first in training.
        fc_lr5: with `policy: true`, learning rate x5 for the classifier's weight and x10 for its bias.
    """
    name = vd_name(backbone)
    options: dict[str, Any] = {"activation": activation}
    network = insert_shift(
        _backbones.make(name, options),
        num_segments=num_segments,
        # with T = 1 a fold would be all channels
        shift_div=max(num_segments, 2) if shift_div is None else shift_div,
        direction=shift_direction,
        n_round=n_round,
    )

    model = TSM(
        network,
        num_class=num_class,
        num_segments=num_segments,
        dropout=dropout,
        consensus="logits",
        fc_std=fc_std,
        partial_bn=partial_bn,
        fc_lr5=fc_lr5,
    )

    return _backbones.load(model, pretrained, name)
