"""Probe: train small heads on a frozen encoder, many in one pass (Assran et al. 2025, arXiv:2506.09985, section 4).

* The encoder never learns and stays in evaluation mode; each head reads its tokens. An attentive head is V-JEPA 2's
  pooler with a linear classifier. A linear head is a layer norm of the mean token with a linear classifier.
* A grid of learning rates and weight decays is trained in one pass, with one head for each pair. The encoder runs once
  per clip, whatever the number of heads. All heads start from the same weights and get the same dropout masks, so each
  head learns what a separate run would.
* Validation scores every head and notes the best one; evaluation, prediction and export use that one.
* `encoder: images` takes a 2D network, such as one with ImageNet weights: a token is the pooled feature of a frame.
* Choose it to measure what an encoder has learned, or if training the whole encoder is too expensive.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from methods import _backbones
from methods._heads import class_scores, new_dropout
from methods._transformers import new_head
from methods.videomae import VideoMAE
from methods.vjepa2 import VJEPA2, AttentivePooler
from networks.vit3d import VisionTransformer3D

KINDS = ("attentive", "linear")
ENCODERS = ("vjepa2", "videomae", "images")
IMAGE_HEADS = 16  # of an attentive head on a 2D network


class Head(nn.Module):
    """Apply features of a clip, dropout and a linear classifier.

    Args:
        features: tokens (B, N, D), or their mean (B, D), -> (B, D).
        classifier: (B, D) -> (B, K).
    """

    def __init__(self, features: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.features, self.classifier = features, classifier

    def forward(self, tokens: Tensor, dropout: nn.Module) -> Tensor:
        """Map (B, N, D) or (B, D) to (B, K)."""
        return class_scores(self.classifier, dropout(self.features(tokens)))


class Probe(nn.Module):
    """Train one head for each pair of the grid on a frozen encoder.

    Args:
        backbone: (B, 3, T, H, W) -> tokens (B, N, D), or of images, (B*T, 3, H, W) -> (B*T, D); it is frozen here.
        head: the first head; the others are copies.
        kind: "attentive" or "linear".
        num_segments: T.
        dropout: probability before the classifiers.
        lr_mults: factors of the learning rate.
        decays: weight decays; empty for that of the run.

    Attributes:
        frames_per_clip: T.
        grid: (factor of the learning rate, weight decay or None) of each head.
        best: number of the head that evaluation uses; a buffer, so that files keep it.
    """

    best: Tensor
    weights_without: tuple[str, ...] = ()

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        *,
        kind: str,
        num_segments: int,
        dropout: float,
        lr_mults: Sequence[float] = (1.0,),
        decays: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if num_segments < 1:
            raise ValueError(f"num_segments is {num_segments}; it must be at least 1")
        # no gradient and no update of statistics ever reaches the encoder
        self.backbone = backbone.requires_grad_(False).eval()
        self.kind = kind
        self.grid = list(itertools.product(lr_mults, decays or (None,)))

        self.dropout = new_dropout(dropout)
        # copies, so that all heads start from the same weights
        self.heads = nn.ModuleList([head, *(copy.deepcopy(head) for _ in self.grid[1:])])
        self.register_buffer("best", torch.zeros((), dtype=torch.int64))

        # a Python number too: reading the buffer would wait for the GPU in each forward pass
        self._best, self._shows_all = 0, False
        self.register_load_state_dict_post_hook(Probe._note_best)
        self.frames_per_clip = num_segments

    @property
    def classifier(self) -> nn.Linear:
        """The classifier of the best head."""
        return self.heads[self._best].classifier  # pyright: ignore[reportReturnType]

    def forward(self, clips: Tensor) -> Tensor:
        """Return the class scores of B clips.

        Args:
            clips: (B, C, T, H, W), float, normalised.

        Returns:
            Logits (B, K) of the best head. In training with several heads those of all heads, (heads, B, K); within
            `all_heads` (B, heads, K).
        """
        with torch.no_grad():
            tokens = self.tokens(clips)

        if self.kind == "linear":
            tokens = tokens.mean(1)  # once for all heads

        if len(self.heads) == 1 or not (self.training or self._shows_all):
            return self.heads[self._best](tokens, self.dropout)
        # evaluation splits and joins scores along the batch, so that it must be the first axis
        return torch.stack([head(tokens, self.dropout) for head in self.heads], 0 if self.training else 1)

    def tokens(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, N, D); N is T for a network of images."""
        if isinstance(self.backbone, VisionTransformer3D):
            return self.backbone(clips)
        frames = clips.transpose(1, 2).flatten(0, 1)  # (B, C, T, H, W) -> (B*T, C, H, W)
        return self.backbone(frames).unflatten(0, (clips.shape[0], -1))  # (B*T, D) -> (B, T, D)

    def train(self, mode: bool = True) -> Probe:
        """Set the heads to training or evaluation mode; the encoder stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def choose(self, number: int) -> None:
        """Select the head that evaluation uses."""
        self.best.fill_(number)
        self._best = number

    @contextlib.contextmanager
    def all_heads(self) -> Iterator[None]:
        """Return the logits of all heads in evaluation, within the context."""
        self._shows_all = True
        try:
            yield
        finally:
            self._shows_all = False

    def own_rates(self) -> dict[nn.Parameter, tuple[int, float, float | None]]:
        """Return (head, factor of the learning rate, weight decay) of each parameter, for `utils.optim`."""
        return {
            parameter: (number, *self.grid[number])
            for number, head in enumerate(self.heads)
            for parameter in head.parameters()
        }

    def alone(self) -> nn.Module:
        """Return the encoder with the best head: a V-JEPA 2 or a VideoMAE if it has that form, else a probe."""
        head = self.heads[self._best]
        assert isinstance(head, Head)

        dropout = getattr(self.dropout, "p", 0.0)
        shared = {"num_class": head.classifier.out_features, "num_segments": self.frames_per_clip, "dropout": dropout}
        network = self.backbone
        # exporters and other tools support these two forms
        vit = network if isinstance(network, VisionTransformer3D) else None
        if vit is not None and isinstance(head.features, AttentivePooler) and vit.positions == "rotary":
            model: nn.Module = VJEPA2(vit, head.features, init_scale=1.0, **shared)
        elif vit is not None and isinstance(head.features, nn.LayerNorm) and vit.positions == "sinusoid":
            eps = head.features.eps
            model = VideoMAE(vit, pooling="mean", head_eps=eps, init_scale=1.0, **shared)
            model.fc_norm = head.features
        else:
            return Probe(network, head, kind=self.kind, num_segments=self.frames_per_clip, dropout=dropout)

        model.classifier = head.classifier
        return model

    def _note_best(self, *_: object) -> None:
        # after a load the buffer has the file's number
        number = int(self.best)
        if not 0 <= number < len(self.heads):
            raise RuntimeError(f"best is {number}, and there are {len(self.heads)} heads")
        self._best = number


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.0,
    pretrained: bool | str = False,
    encoder: Literal["vjepa2", "videomae", "images"] = "vjepa2",
    head: Literal["attentive", "linear"] = "attentive",
    lr_mults: tuple[float, ...] = (1.0,),
    decays: tuple[float, ...] = (),
    patch: int = 16,
    tubelet: int = 2,
    eps: float = 1e-6,
    head_eps: float = 1e-6,
    pooler_layers: int = 3,
    pooler_heads: int | None = None,
    init_scale: float = 1.0,
    **backbone_options: Any,
) -> Probe:
    """Build heads on a frozen encoder, as V-JEPA 2 is evaluated (Assran et al. 2025, arXiv:2506.09985, section 4).

    Args:
        backbone: vit3d_small, vit3d_base, vit3d_large, vit3d_huge, vit3d_giant or vit3d; with `encoder: images` a 2D
            network, such as mobilenetv2.
        num_class: K.
        num_segments: T, a multiple of `tubelet`; with `encoder: images` any number.
        dropout: probability before the classifiers.
        pretrained: weights of the encoder, see `methods.build`; heads in the file are left out.
        encoder: method whose network `backbone` is: "vjepa2", "videomae", or "images", a 2D network that sees each
            frame alone.
        head: "attentive": V-JEPA 2's pooler and a linear classifier; "linear": a layer norm of the mean token and a
            linear classifier.
        lr_mults: factors of the learning rate; one head is trained for each pair of a factor and a decay.
        decays: weight decays; empty for the run's `weight_decay`. The paper's grid at `base_lr: 0.001` has the factors
            [5, 3, 1, 0.3, 0.1] and the decays [0.01, 0.1, 0.4, 0.8].
        patch: side of a patch in pixels.
        tubelet: frames of a patch.
        eps: epsilon of the encoder's layer norms.
        head_eps: epsilon of the heads' layer norms.
        pooler_layers: blocks of self-attention of an attentive head before its query.
        pooler_heads: attention heads of an attentive head; null for the encoder's number (images: 16).
        init_scale: factor on the classifiers' initial weights, whose standard deviation is .02.
        backbone_options: width, depth, heads and mlp_ratio of `vit3d`, or options of the 2D network.
    """
    for name, value, known in (("encoder", encoder, ENCODERS), ("head", head, KINDS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if not lr_mults or min(lr_mults) <= 0 or min(decays, default=0) < 0:
        raise ValueError("lr_mults must be one or more numbers above 0, and decays numbers of at least 0")
    if encoder == "images":
        network = _backbones.make(backbone, backbone_options)
        without, own_heads = (), IMAGE_HEADS
    else:
        # Build the whole method for its backbone; its options then have the same meaning and checks.
        source = importlib.import_module(f"methods.{encoder}").build(
            backbone=backbone,
            num_class=num_class,
            num_segments=num_segments,
            patch=patch,
            tubelet=tubelet,
            eps=eps,
            **backbone_options,
        )
        network = source.backbone
        without, own_heads = getattr(source, "weights_without", ()), network.heads

    width = _backbones.feature_dim(network)
    if head == "attentive":
        heads = own_heads if pooler_heads is None else pooler_heads
        features: nn.Module = AttentivePooler(width, heads=heads, layers=pooler_layers, eps=head_eps)
    else:
        features = nn.LayerNorm(width, eps=head_eps)

    model = Probe(
        network,
        Head(features, new_head(width, num_class, init_scale)),
        kind=head,
        num_segments=num_segments,
        dropout=dropout,
        lr_mults=lr_mults,
        decays=decays,
    )

    # names that this method's encoder does not need are not mismatches
    model.weights_without = without
    _backbones.load(model, pretrained, backbone, encoder_only=True)
    if pretrained:
        model.pretrained_note = f"frozen encoder: {model.pretrained_note}; new heads: {len(model.heads)}"  # pyright: ignore[reportArgumentType]
    return model
