"""Compute cross entropy, of softmax or sigmoid, with label smoothing, mixup and clip weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from utils import mixup


def training_loss(answer: Any, labels: Tensor, **targets: Any) -> tuple[Tensor, Tensor]:
    """Return the loss of a model's answer in training: logits, or an object with `logits`, `aux` and `aux_weight`.

    Args:
        answer: (B, K), or methods._output.Output: loss(logits) + aux_weight * loss(aux), as in TPN (Yang et al. 2020);
            (heads, B, K) for a probe with several heads.
        labels: (B,) int64, or (B, K) with several labels per clip.
        targets: keyword arguments of `classification_loss`.

    Returns:
        (scalar loss, logits (B, K)); for several heads one loss and the logits of each, (heads,) and (heads, B, K).
    """
    # (heads, B, K): the heads train side by side on the same clips, each by its own loss.
    if isinstance(answer, Tensor) and answer.dim() == 3:
        return torch.stack([classification_loss(logits, labels, **targets) for logits in answer]), answer
    if isinstance(answer, Tensor):
        return classification_loss(answer, labels, **targets), answer
    main = classification_loss(answer.logits, labels, **targets)
    return main + answer.aux_weight * classification_loss(answer.aux, labels, **targets), answer.logits


def classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smooth: float = 0.0,
    weights: Tensor | None = None,
    partner: Tensor | None = None,
    lam: float = 1.0,
    kind: str = "ce",
) -> Tensor:
    """Return ``sum_i w_i l_i / B``, the mean over the clips; a clip of weight 0 keeps its place in the mean.

    Args:
        logits: (B, K).
        labels: (B,) int64; with "bce" also (B, K).
        label_smooth, partner, lam: see `per_clip_loss` and `per_clip_bce`.
        weights: (B,); None for all ones.
        kind: "ce" or "bce".

    Returns:
        A scalar, float32 or float64.
    """
    per_clip = {"ce": per_clip_loss, "bce": per_clip_bce}[kind]
    return weighted_mean(per_clip(logits, labels, label_smooth=label_smooth, partner=partner, lam=lam), weights)


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return ``sum_i w_i l_i / B`` of losses (B,)."""
    if weights is not None:
        # Selected, not multiplied: 0 * nan is nan, and the pixels of a clip of weight 0 may be anything.
        losses = torch.where(weights == 0, 0, losses * weights.to(losses.dtype))
    return losses.mean()


def per_clip_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smooth: float = 0.0,
    partner: Tensor | None = None,
    lam: float = 1.0,
) -> Tensor:
    """Return each clip's cross entropy with target ``eps / K + (1 - eps) * onehot`` (Szegedy et al. 2016, section 7).

    Args:
        logits: (B, K); K is the model's number of classes.
        labels: (B,) int64.
        label_smooth: eps.
        partner: (B,) labels of the clips mixed in; None with lam < 1: those of the neighbours (utils/mixup.py).
        lam: weight of a clip's own label; 1: no mixup.

    Returns:
        (B,), computed in float32, or in float64 if the logits are.
    """
    # In bf16 the logarithm of a small probability would have 8 bits.
    log_probability = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)
    losses = functional.nll_loss(log_probability, labels, reduction="none")

    if lam != 1.0:
        # In training `partner` is None: the clips were mixed in pairs of neighbours.
        other = mixup.partner(labels) if partner is None else partner
        losses = lam * losses + (1 - lam) * functional.nll_loss(log_probability, other, reduction="none")
    # Cross entropy is linear in the target, so both changes apply to the terms (B,), not to a target (B, K).
    if label_smooth:
        losses = (1 - label_smooth) * losses - label_smooth * log_probability.mean(1)

    return losses


def per_clip_bce(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smooth: float = 0.0,
    partner: Tensor | None = None,
    lam: float = 1.0,
) -> Tensor:
    """Return each clip's binary cross entropy of the sigmoid, mean over the classes (MMAction2's BCELossWithLogits).

    The target y is 1 at each of a clip's labels. Mixup makes it ``lam y + (1 - lam) y'`` with the partner's y'. Label
    smoothing then makes it ``(1 - eps) y + eps / K``, for any number of labels.

    Args:
        logits: (B, K).
        labels: (B,) int64, or (B, K) of 0 and 1.
        label_smooth: eps.
        partner: labels of the clips mixed in; None with lam < 1: the neighbours' (utils/mixup.py).
        lam: weight of a clip's own labels; 1: no mixup.

    Returns:
        (B,), computed in float32, or in float64 if the logits are.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    target = _multi_hot(labels, wide)

    if lam != 1.0:
        other = mixup.partner(labels) if partner is None else partner
        target = lam * target + (1 - lam) * _multi_hot(other, wide)
    if label_smooth:
        target = (1 - label_smooth) * target + label_smooth / wide.shape[1]

    return functional.binary_cross_entropy_with_logits(wide, target, reduction="none").mean(1)  # (B, K) -> (B,)


def _multi_hot(labels: Tensor, like: Tensor) -> Tensor:
    if labels.dim() == 2:
        return labels.to(like.dtype)
    return torch.zeros_like(like).scatter_(1, labels.unsqueeze(1), 1.0)  # (B,) -> (B, K)
