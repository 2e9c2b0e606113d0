"""What a method with an auxiliary classifier answers in training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Output:
    """Class scores of two heads; the training loss is loss(logits) + aux_weight * loss(aux).

    In evaluation such a method answers with the logits alone, as all methods do.

    Attributes:
        logits: (B, K).
        aux: (B, K), of the auxiliary head.
        aux_weight: its weight in the loss.
    """

    logits: Tensor
    aux: Tensor
    aux_weight: float
