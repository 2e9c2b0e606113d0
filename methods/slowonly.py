"""SlowOnly: the Slow pathway of SlowFast alone (Feichtenhofer et al. 2019, arXiv:1812.03982, sections 3.1 and 4).

* Few frames, far apart (T x tau: 4x16, 8x8), pass through a 3D ResNet that never strides in time. Its convolutions have
  a temporal extent in res4 and res5 only, because early features move too far between frames half a second apart.
* It starts from 2D weights by inflation, with `pretrained: true` from those of ImageNet.
* It accepts any number of frames in evaluation.
* Choose it as the plain 3D model: more accurate than TSM for about the same cost per frame, with real 3D convolutions.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from methods import _backbones
from methods._heads import class_scores, new_classifier, new_dropout
from methods._non_local import NonLocal, add_non_local
from methods.positions import window_means
from networks.resnet3d import ResNet3d

FORMS = ("pyslowfast", "mmaction2")


class SlowOnly(nn.Module):
    """Classify a clip by a 3D backbone, the average over time and space, dropout and a linear classifier.

    Args:
        backbone: (B, 3, T, H, W) -> (B, feature_dim, T, H', W').
        num_class: K.
        num_segments: T.
        dropout: probability before the classifier.
        fc_std: standard deviation of the classifier's initial weights.

    Attributes:
        frames_per_clip: T.
    """

    def __init__(
        self, backbone: nn.Module, *, num_class: int, num_segments: int, dropout: float, fc_std: float
    ) -> None:
        super().__init__()
        if num_segments < 1:
            raise ValueError(f"num_segments is {num_segments}; it must be at least 1")
        self.backbone = backbone
        self.dropout = new_dropout(dropout)
        self.classifier = new_classifier(_backbones.feature_dim(backbone), num_class, fc_std)
        self.frames_per_clip = num_segments

    def forward(self, clips: Tensor) -> Tensor:
        """Return the class scores of B clips.

        Args:
            clips: (B, C, T, H, W), float, normalised.

        Returns:
            Logits (B, K).
        """
        features = self.backbone(clips).mean((2, 3, 4))  # (B, D, T, H', W') -> (B, D)
        return class_scores(self.classifier, self.dropout(features))  # (B, D) -> (B, K)

    def window_logits(self, clips: Tensor, side: int) -> Tensor:
        """Return the logits of every window of the map: (B, C, T, H, W) -> (B, P, K); see `methods.positions`."""
        features = window_means(self.backbone(clips), side)  # (B, P, D)
        return class_scores(self.classifier, self.dropout(features))  # (B, P, D) -> (B, P, K)


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.5,
    pretrained: bool | str = False,
    non_local: Literal["embedded_gaussian", "dot_product", "gaussian"] | None = None,
    non_local_form: Literal["pyslowfast", "mmaction2"] = "pyslowfast",
    fc_std: float = 0.01,
    zero_init_residual: bool = True,
) -> SlowOnly:
    """Build SlowOnly (Feichtenhofer et al. 2019, arXiv:1812.03982).

    ResNet-50 has 32,454,096 parameters with 400 classes; 8 frames take 41.9 GMAC at 224.

    Args:
        backbone: resnet18, resnet34, resnet50 or resnet101: the 2D network that is inflated.
        num_class: K.
        num_segments: T (4 or 8 in the paper).
        dropout: probability before the classifier.
        pretrained: see `methods.build`; 2D weights are inflated.
        non_local: non-local blocks after every second block of res3 and res4 (see `methods/_non_local.py`).
        non_local_form: "pyslowfast": the first block follows the second block of a stage, and x is pooled before the
            projections; "mmaction2": it follows the first block, and the projections are pooled.
        fc_std: standard deviation of the classifier's initial weights.
        zero_init_residual: residual blocks start as identities; for training from scratch.

    Raises:
        ValueError: unknown `non_local_form`.
    """
    network = ResNet3d(backbone, zero_init_residual=zero_init_residual)
    if non_local_form not in FORMS:
        raise ValueError(f"non_local_form is {non_local_form!r}; it must be one of {', '.join(FORMS)}")

    if non_local is not None:
        early = non_local_form == "pyslowfast"
        make = lambda channels: NonLocal(channels, non_local, scaled=True, pool_first=early)  # noqa: E731
        add_non_local(network, first=int(early), make=make)

    model = SlowOnly(network, num_class=num_class, num_segments=num_segments, dropout=dropout, fc_std=fc_std)
    return _backbones.load(model, pretrained, backbone)
