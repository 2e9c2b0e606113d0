"""Define the training output of a method with an auxiliary classifier."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Output:
    """Hold the class scores of two heads; the training loss is loss(logits) + aux_weight * loss(aux).

    In evaluation such a method returns the logits alone, as all methods do.

    Attributes:
        logits: (B, K).
        aux: (B, K), from the auxiliary head.
        aux_weight: weight of that head in the loss.
    """

    logits: Tensor
    aux: Tensor
    aux_weight: float
