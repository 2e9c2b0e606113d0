"""Build what methods on a vision transformer share: layers that draw at random, and the head."""

from __future__ import annotations

from torch import nn

from networks.vit3d import Block, VisionTransformer3D
from utils.draws import Dropout, DropPath


def insert_drops(network: VisionTransformer3D, *, drop_path: float, attention_dropout: float) -> VisionTransformer3D:
    """Put drop path and dropout of the attention weights into the slots of a transformer's blocks.

    Args:
        network: changed in place; no parameter is added.
        drop_path: probability in the last block; it rises linearly from 0 in the first (Huang et al. 2016,
            arXiv:1603.09382, section 3).
        attention_dropout: probability in each block. Above 0 the attention weights, N x N values per head, are in
            memory.

    Raises:
        ValueError: a probability outside [0, 1).
    """
    for name, rate in (("drop_path", drop_path), ("attention_dropout", attention_dropout)):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} is {rate}; it must be at least 0 and below 1")

    for i, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        # the paper counts from the input: block i of L has probability i / (L - 1) of the last one's
        rate = drop_path * i / max(network.depth - 1, 1)
        if rate:
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        if attention_dropout:
            block.attn.attention_drop = Dropout(attention_dropout)
    return network


def new_head(dim: int, num_class: int, init_scale: float) -> nn.Linear:
    """Return a classifier with weights N(0, .02 * init_scale) and biases 0."""
    classifier = nn.Linear(dim, num_class)
    nn.init.normal_(classifier.weight, std=0.02)
    nn.init.zeros_(classifier.bias)
    classifier.weight.data.mul_(init_scale)  # after the draw, so that the draw is the same for each scale
    return classifier
