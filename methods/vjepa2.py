"""V-JEPA 2: a vision transformer that predicts features of masked video (Assran et al. 2025, arXiv:2506.09985).

Here it classifies with an attentive probe.

* Encoder: tubelets of 2 x 16 x 16 pixels and rotary positions in time, row and column. Classification does not use the
  predictor of the pre-training.
* Attentive probe: three blocks of self-attention over all tokens, one query that attends to them, a linear classifier.
* The published results keep the encoder frozen: see `methods.probe`. This file trains encoder and probe together;
  `freeze` keeps the first blocks as they are.
* Choose it for motion (Something-Something), or if one frozen encoder serves many tasks.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods import _backbones
from methods._heads import class_scores, new_dropout
from methods._transformers import insert_drops, new_head
from networks.vit3d import Block, Mlp, VisionTransformer3D, initialise

MLP_RATIO = 4  # of the pooler, even if the encoder has a different ratio


class CrossAttention(nn.Module):
    """Let queries attend to tokens: a residual block without output projection, and without a norm on the queries."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, MLP_RATIO * dim)

    def project(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, heads, Q, D/heads), and keys and values (B, heads, N, D/heads) of the tokens."""
        q = self.q(queries).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, Q, D/heads)
        kv = self.kv(self.norm1(tokens)).unflatten(2, (2, self.heads, -1))  # (B, N, 2, heads, D/heads)
        # the order (keys, values) is that of the authors' `kv` weights
        k, v = kv.transpose(1, 3).unbind(2)  # (B, heads, N, D/heads)
        return q, k, v

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Map queries (B, Q, D) and tokens (B, N, D) to (B, Q, D)."""
        q, k, v = self.project(queries, tokens)
        y = F.scaled_dot_product_attention(q, k, v)
        x = queries + y.transpose(1, 2).flatten(2)  # (B, heads, Q, D/heads) -> (B, Q, D)
        return x + self.mlp(self.norm2(x))


class AttentivePooler(nn.Module):
    """Apply self-attention to the tokens, then one learned query that attends to them.

    Args:
        dim: D.
        heads: attention heads of all its layers.
        layers: blocks of self-attention.
        eps: epsilon of all its layer norms.

    Raises:
        ValueError: D is not a multiple of heads, or the number of layers is negative.
    """

    def __init__(self, dim: int, *, heads: int, layers: int, eps: float) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"pooler_heads is {heads}; it must divide the width {dim}")
        if layers < 0:
            raise ValueError(f"pooler_layers is {layers}; it must be at least 0")

        # for `methods.interop`, see methods/_traits.py
        self.weight_options = {"head_eps": str(eps), "pooler_heads": str(heads)}
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, MLP_RATIO * dim, qkv_bias="all", eps=eps) for _ in range(layers))
        self.cross = CrossAttention(dim, heads, eps)

        nn.init.normal_(self.query_tokens, std=0.02)
        # after all layers exist, and before the last weights are scaled down
        initialise(self)
        rescale([*self.blocks, self.cross])

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, D) to (B, D)."""
        for block in self.blocks:
            tokens = block(tokens)

        queries = self.query_tokens.expand(len(tokens), -1, -1)
        return self.cross(queries, tokens).squeeze(1)  # (B, 1, D) -> (B, D)


def rescale(blocks: list[nn.Module]) -> None:
    """Divide the last weights of the branches of block i, from 1, by sqrt(2*i), to keep the residual stream's scale."""
    for i, block in enumerate(blocks, 1):
        for name in ("attn.proj", "mlp.fc2"):
            # the cross-attention has no output projection
            if name != "attn.proj" or isinstance(block, Block):
                block.get_submodule(name).weight.data.div_(math.sqrt(2 * i))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


class VJEPA2(nn.Module):
    """Classify by an encoder, an attentive pooler and a linear classifier.

    Args:
        backbone: (B, 3, T, H, W) -> tokens (B, N, D).
        pooler: tokens -> (B, D).
        num_class: K.
        num_segments: T.
        dropout: probability before the classifier.
        init_scale: see `new_head`.

    Attributes:
        frames_per_clip: T.
        options_left_open: options that the user left to a rule (see methods/_traits.py).
    """

    options_left_open: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: VisionTransformer3D,
        pooler: AttentivePooler,
        *,
        num_class: int,
        num_segments: int,
        dropout: float,
        init_scale: float,
    ) -> None:
        super().__init__()
        if num_segments < 1:
            raise ValueError(f"num_segments is {num_segments}; it must be at least 1")

        self.backbone = backbone
        self.pooler = pooler
        self.dropout = new_dropout(dropout)
        self.classifier = new_head(backbone.feature_dim, num_class, init_scale)
        self.frames_per_clip = num_segments

    def forward(self, clips: Tensor) -> Tensor:
        """Return the class scores of B clips.

        Args:
            clips: (B, C, T, H, W), float, normalised.

        Returns:
            Logits (B, K).
        """
        features = self.pooler(self.backbone(clips))  # (B, C, T, H, W) -> (B, N, D) -> (B, D)
        return class_scores(self.classifier, self.dropout(features))  # (B, D) -> (B, K)


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.0,
    pretrained: bool | str = False,
    patch: int = 16,
    tubelet: int = 2,
    qkv_bias: Literal["all", "none"] = "all",
    eps: float = 1e-6,
    head_eps: float = 1e-6,
    pooler_layers: int = 3,
    pooler_heads: int | None = None,
    init_scale: float = 1.0,
    drop_path: float = 0.0,
    attention_dropout: float = 0.0,
    checkpointing: bool = False,
    freeze: int = 0,
    **backbone_options: Any,
) -> VJEPA2:
    """Build V-JEPA 2 with its attentive probe (Assran et al. 2025, arXiv:2506.09985).

    ViT-L with 174 classes: encoder 303,885,312 parameters and 827.9 GMAC at 16 x 256 x 256, pooler 49,336,320,
    classifier 178,350.

    Args:
        backbone: vit3d_large, vit3d_huge, vit3d_giant, or a smaller one.
        num_class: K.
        num_segments: T, a multiple of `tubelet` (16 or 64 in the paper).
        dropout: probability before the classifier.
        pretrained: see `methods.build`.
        patch: side of a patch in pixels.
        tubelet: frames of a patch.
        qkv_bias: "all" or "none" for queries, keys and values of the encoder; those of the pooler always have a bias.
        eps: epsilon of the encoder's layer norms.
        head_eps: epsilon of the pooler's layer norms (Hugging Face 1e-6, the authors' code 1e-5).
        pooler_layers: blocks of self-attention before the query.
        pooler_heads: attention heads of the pooler; null for the encoder's number.
        init_scale: factor on the classifier's initial weights, whose standard deviation is .02.
        drop_path: probability with which the last block's branches are dropped; it rises linearly from 0.
        attention_dropout: probability of a zero in the encoder's attention weights; above 0 they are kept in memory.
        checkpointing: recompute the blocks in the backward pass, for a fraction of the memory and a third more time.
        freeze: the patch embedding and this many blocks do not learn; 0 for none.
        backbone_options: width, depth, heads and mlp_ratio of `vit3d`.
    """
    options = {
        **backbone_options,
        "patch": patch,
        "tubelet": tubelet,
        "positions": "rotary",
        "qkv_bias": qkv_bias,
        "eps": eps,
        "final_norm": True,
        "checkpointing": checkpointing,
        "freeze": freeze,
    }
    network = _backbones.make(backbone, options, video=True)
    assert isinstance(network, VisionTransformer3D)
    heads = network.heads if pooler_heads is None else pooler_heads

    model = VJEPA2(
        insert_drops(network, drop_path=drop_path, attention_dropout=attention_dropout),
        AttentivePooler(network.feature_dim, heads=heads, layers=pooler_layers, eps=head_eps),
        num_class=num_class,
        num_segments=num_segments,
        dropout=dropout,
        init_scale=init_scale,
    )

    # The number of heads leaves no trace in the tensors: the file or the user must give it.
    model.options_left_open = ("pooler_heads",) if pooler_heads is None else ()
    return _backbones.load(model, pretrained, backbone)
