"""PP-TSN: TSN retuned (PaddleVideo, docs/en/model_zoo/recognition/pp-tsn.md; no paper of its own).

* TSN on ResNet-vd with the average of the features before the classifier. The rest of its gain is the recipe: mixup,
  label smoothing, no weight decay for BN, better ImageNet weights.
* The published distilled PP-TSN used a recipe that is not public.
* Choose it instead of TSN for the same cost.
"""

from __future__ import annotations

from typing import Any, Literal

from methods import _backbones
from methods.tsn import TSN


def vd_name(backbone: str) -> str:
    """Return the vd form of a ResNet's name: `resnet50` and `resnet50_vd` both mean ResNet-50-vd here.

    Raises:
        ValueError: not a ResNet that has a vd form.
    """
    name = backbone if backbone.endswith("_vd") else f"{backbone}_vd"
    if name.removesuffix("_vd") not in ("resnet18", "resnet34", "resnet50", "resnet101"):
        raise ValueError(f"backbone is {backbone}; PP-TSN and PP-TSM need resnet18, 34, 50 or 101 in the vd form")
    return name


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.4,
    pretrained: bool | str = False,
    activation: Literal["relu", "leaky_relu"] = "relu",
    fc_std: float = 0.01,
    partial_bn: bool = False,
    fc_lr5: bool = True,
) -> TSN:
    """Build PP-TSN: TSN (Wang et al. 2016, arXiv:1608.00859) on ResNet-vd (He et al. 2019, arXiv:1812.01187).

    ResNet-50-vd has 24,346,864 parameters with 400 classes.

    Args:
        backbone: resnet50_vd, or resnet50 for short; likewise 18, 34 and 101.
        num_class: K.
        num_segments: T (3, or 8 for the dense models).
        dropout: probability before the classifier, once per clip (PaddleVideo: 0.4).
        pretrained: see `methods.build`.
        activation: "relu" or "leaky_relu".
        fc_std: standard deviation of the classifier's initial weights.
        partial_bn: freeze every BN layer but the first in training.
        fc_lr5: with `policy: true`, learning rate x5 for the classifier's weight and x10 for its bias.
    """
    name = vd_name(backbone)
    options: dict[str, Any] = {"activation": activation}
    model = TSN(
        _backbones.make(name, options),
        num_class=num_class,
        num_segments=num_segments,
        dropout=dropout,
        consensus="features",
        fc_std=fc_std,
        partial_bn=partial_bn,
        fc_lr5=fc_lr5,
    )

    return _backbones.load(model, pretrained, name)
