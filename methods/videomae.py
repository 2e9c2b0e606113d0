"""VideoMAE: a plain vision transformer, pre-trained as a masked autoencoder (Tong et al. 2022, arXiv:2203.12602).

* Tubelets of 2 x 16 x 16 pixels, fixed sinusoid positions, no class token. All tokens attend to all others, so the cost
  of attention rises with the square of T*H*W.
* Fine-tuning uses the mean over the tokens, a layer norm and a linear classifier. The weights of VideoMAE v2 (Wang et
  al. 2023, arXiv:2303.16727) have the same form.
* From random weights it needs many more videos than a convolutional network: start from published ones.
* Choose it for accuracy with a plain network, if its cost is affordable.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from methods import _backbones
from methods._heads import class_scores, new_dropout
from methods._transformers import insert_drops, new_head
from networks.vit3d import VisionTransformer3D

POOLING = ("mean", "first")


class VideoMAE(nn.Module):
    """Classify by a transformer over the tubelets of a clip, pooling, and a linear classifier.

    Args:
        backbone: (B, 3, T, H, W) -> tokens (B, N, D); with its final norm if pooling is "first".
        num_class: K.
        num_segments: T.
        dropout: probability before the classifier.
        pooling: "mean": the mean of the tokens, then a layer norm; "first": the first token.
        head_eps: epsilon of the norm after the mean.
        init_scale: see `new_head`.

    Attributes:
        frames_per_clip: T.
    """

    def __init__(
        self,
        backbone: VisionTransformer3D,
        *,
        num_class: int,
        num_segments: int,
        dropout: float,
        pooling: str,
        head_eps: float,
        init_scale: float,
    ) -> None:
        super().__init__()
        if num_segments < 1:
            raise ValueError(f"num_segments is {num_segments}; it must be at least 1")

        self.backbone = backbone
        self.pooling = pooling
        # for `methods.interop`, see methods/_traits.py
        self.weight_options = {"pooling": pooling}
        self.weights_without = ("backbone.norm.",) if pooling == "mean" else ()  # of pre-training
        if pooling == "mean":
            self.fc_norm = nn.LayerNorm(backbone.feature_dim, eps=head_eps)
            self.weight_options["head_eps"] = str(head_eps)

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
        tokens = self.backbone(clips)  # (B, C, T, H, W) -> (B, N, D)
        features = self.fc_norm(tokens.mean(1)) if self.pooling == "mean" else tokens[:, 0]  # (B, N, D) -> (B, D)
        return class_scores(self.classifier, self.dropout(features))  # (B, D) -> (B, K)


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.0,
    pretrained: bool | str = False,
    pooling: Literal["mean", "first"] = "mean",
    patch: int = 16,
    tubelet: int = 2,
    qkv_bias: Literal["qv", "all", "none"] = "qv",
    eps: float = 1e-6,
    head_eps: float = 1e-6,
    init_scale: float = 1.0,
    drop_path: float = 0.0,
    attention_dropout: float = 0.0,
    checkpointing: bool = False,
    freeze: int = 0,
    **backbone_options: Any,
) -> VideoMAE:
    """Build VideoMAE (Tong et al. 2022, arXiv:2203.12602).

    ViT-B has 86,534,800 parameters with 400 classes, and 180.3 GMAC at 16 x 224 x 224.

    Args:
        backbone: vit3d_small, vit3d_base, vit3d_large, vit3d_huge, vit3d_giant or vit3d.
        num_class: K.
        num_segments: T, a multiple of `tubelet` (16 in the paper).
        dropout: probability before the classifier.
        pretrained: see `methods.build`.
        pooling: "mean": mean of the tokens and a layer norm; "first": the first token after a layer norm of all.
        patch: side of a patch in pixels.
        tubelet: frames of a patch.
        qkv_bias: which of queries, keys and values have a bias; "qv" in the paper.
        eps: epsilon of the backbone's layer norms (the authors' code 1e-6, Hugging Face 1e-12).
        head_eps: epsilon of the layer norm after the mean (the authors' code 1e-6, Hugging Face 1e-5).
        init_scale: factor on the classifier's initial weights, whose standard deviation is .02.
        drop_path: probability with which the last block's branches are dropped; it rises linearly from 0.
        attention_dropout: probability of a zero in the attention weights; above 0 they are kept in memory.
        checkpointing: recompute the blocks in the backward pass, for a fraction of the memory and a third more time.
        freeze: the patch embedding and this many blocks do not learn; 0 for none.
        backbone_options: width, depth, heads and mlp_ratio of `vit3d`.
    """
    if pooling not in POOLING:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLING)}")

    options = {
        **backbone_options,
        "patch": patch,
        "tubelet": tubelet,
        "qkv_bias": qkv_bias,
        "eps": eps,
        # with the mean, fc_norm takes the place of the final norm
        "final_norm": pooling == "first",
        "checkpointing": checkpointing,
        "freeze": freeze,
    }
    network = _backbones.make(backbone, options, video=True)
    assert isinstance(network, VisionTransformer3D)

    model = VideoMAE(
        insert_drops(network, drop_path=drop_path, attention_dropout=attention_dropout),
        num_class=num_class,
        num_segments=num_segments,
        dropout=dropout,
        pooling=pooling,
        head_eps=head_eps,
        init_scale=init_scale,
    )

    return _backbones.load(model, pretrained, backbone)
