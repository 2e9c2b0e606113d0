"""Turn frame features into class scores: what the 2D methods share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from utils.draws import Dropout

CONSENSUS = ("logits", "features")  # averaged over the frames of a clip


def new_classifier(feature_dim: int, num_class: int, std: float) -> nn.Linear:
    """Return a linear layer with weights N(0, std) and bias 0."""
    classifier = nn.Linear(feature_dim, num_class)
    nn.init.normal_(classifier.weight, std=std)
    nn.init.zeros_(classifier.bias)
    return classifier


def new_dropout(p: float) -> nn.Module:
    """Return a dropout layer whose mask does not depend on the rank, or the identity for p = 0."""
    return Dropout(p) if p > 0 else nn.Identity()


def class_scores(classifier: nn.Linear, features: Tensor) -> Tensor:
    """Apply a classifier in float32 at least: (..., D) -> (..., K). The 8 bits of bf16 scores would cause ties."""
    kind = features.device.type
    # Autocast does not support the meta device, on which shapes and multiplications are counted.
    if features.is_meta or not torch.is_autocast_enabled(kind):
        return classifier(features)
    with torch.autocast(kind, enabled=False):
        return classifier(features.to(classifier.weight.dtype))


def segmental_consensus(features: Tensor, dropout: nn.Module, classifier: nn.Linear, consensus: str) -> Tensor:
    """Average over the frames of a clip (Wang et al. 2016, arXiv:1608.00859, section 3.1, average consensus).

    In evaluation both orders give the same scores, since the classifier is linear. In training "logits" drops different
    features in each frame (TSN and TSM repositories), "features" drops one set for the clip (MMAction2, PaddleVideo).

    Args:
        features: (B, T, D).
        consensus: "logits": dropout and classifier on each frame, then the mean; "features": the mean first.

    Returns:
        (B, K), float32 at least: an average of bf16 scores would lose digits that the loss needs.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    if consensus == "features":
        mean = features.mean(1, dtype=wide).to(features.dtype)  # (B, T, D) -> (B, D)
        return class_scores(classifier, dropout(mean))  # (B, D) -> (B, K)
    return class_scores(classifier, dropout(features)).mean(1, dtype=wide)  # (B, T, D) -> (B, T, K) -> (B, K)
