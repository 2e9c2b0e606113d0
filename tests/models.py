"""The models of `methods` with the attributes that `nn.Module` does not name, for the type checker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

import methods

if TYPE_CHECKING:
    from methods.interop.provenance import Start
    from methods.tpn import AuxHead, Neck


class Model(nn.Module):
    """What tests read of a model. It only describes: models are of their own classes."""

    # of all methods
    backbone: Any  # one of many networks
    classifier: nn.Linear
    dropout: nn.Dropout
    frames_per_clip: int
    pretrained_note: str

    # of models with loaded weights
    pretrained: Start
    carried: dict[str, Tensor]

    # of some methods
    neck: Neck
    aux_head: AuxHead
    pooler: Any  # V-JEPA 2's, with attributes for methods.interop
    fc_norm: nn.LayerNorm


def build(**arguments: Any) -> Model:
    """As `methods.build`."""
    return cast("Model", methods.build(**arguments))


def from_pretrained(path: str | Path, num_class: int | None = None, **options: Any) -> Model:
    """As `methods.from_pretrained`."""
    return cast("Model", methods.from_pretrained(path, num_class, **options))
