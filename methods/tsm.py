"""TSM: temporal shift module (Lin, Gan and Han 2019, arXiv:1811.08383).

* TSN plus one operation that costs no arithmetic: before the first convolution of a residual block, 1/8 of the
  channels come from the next frame and 1/8 from the frame before. The shortcut gets the unshifted tensor ("residual
  shift", fig. 3b).
* T is fixed when the model is built: frames that lie next to each other must be neighbours in time.
* With 23 or more blocks in layer3 (ResNet-101, -152) only blocks with an even index shift, as in the authors' code.
* Try it first among the temporal models: it costs as much as a 2D network, uses its weights and sees motion.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods import _backbones
from methods._non_local import FramesNonLocal, add_non_local
from methods.tsn import TSN
from networks.mobilenet import InvertedResidual, MobileNetV2
from networks.mobileone import MobileOne, Unit
from networks.pooling import max_pool3d
from networks.resnet import BasicBlock, Bottleneck, ResNet

DIRECTIONS = ("tsm", "paddle")


def temporal_shift(x: Tensor, *, num_segments: int, shift_div: int = 8, direction: str = "tsm") -> Tensor:
    """Shift 1/shift_div of the channels one frame back in time and the next 1/shift_div one frame forward.

    Lin et al. 2019, arXiv:1811.08383, fig. 1b (offline shift). With fold = C // shift_div: channels [0, fold) of
    frame t come from frame t+1 and channels [fold, 2*fold) from frame t-1. The others stay, and gaps are zero.

    Args:
        x: (B*T, C, H, W), any memory format; the T frames of a clip are adjacent.
        num_segments: T.
        shift_div: 1/shift_div of the channels moves in each direction; at least 2.
        direction: "tsm" as above (the authors' code, MMAction2); "paddle" exchanges the two folds (PaddleVideo).

    Returns:
        A new tensor of the same shape and memory format; `x` is not changed.

    Raises:
        ValueError: B*T is not a multiple of T, C < shift_div (nothing would be shifted), or an option is wrong.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"shift_direction is {direction!r}; it must be one of {', '.join(DIRECTIONS)}")
    if shift_div < 2 or x.shape[1] < shift_div:
        raise ValueError(f"shift_div is {shift_div}; it must be at least 2 and at most the {x.shape[1]} channels")
    if x.shape[0] % num_segments:
        raise ValueError(f"{x.shape[0]} frames are not a multiple of num_segments = {num_segments}")

    shift = _shift_traced if torch.compiler.is_compiling() else _Shift.apply
    return shift(x, num_segments, x.shape[1] // shift_div, direction == "tsm")  # pyright: ignore[reportReturnType]


def _shift_traced(x: Tensor, num_segments: int, fold: int, next_first: bool) -> Tensor:
    """Shift for torch.compile and exporters, which handle slices and `cat` better than assignments."""
    clips = x.unflatten(0, (-1, num_segments))  # (B*T, C, H, W) -> (B, T, C, H, W)
    # the two folds and the rest, along C
    first, second, rest = clips.split((fold, fold, clips.shape[2] - 2 * fold), 2)
    still = (0, 0) * 3  # C, H, W
    from_next, from_last = (
        (*still, -1, 1),
        (*still, 1, -1),
    )  # add a frame of zeros at one end, drop one at the other

    if not next_first:
        from_next, from_last = from_last, from_next

    shifted = torch.cat([F.pad(first, from_next), F.pad(second, from_last), rest], 2)
    return shifted.flatten(0, 1)  # (B, T, C, H, W) -> (B*T, C, H, W)


class _Shift(torch.autograd.Function):
    """Shift with one allocation in each of forward and backward. The gradient is the shift in the other direction.

    It writes slices of a new tensor, because `torch.cat` over channels takes three times as long in channels-last
    memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_segments: int, fold: int, next_first: bool) -> Tensor:
        """Shift (B*T, C, H, W); see the class."""
        ctx.settings = (num_segments, fold, next_first)
        # same memory format as x
        out = torch.empty_like(x)
        source, target = x.unflatten(0, (-1, num_segments)), out.unflatten(0, (-1, num_segments))  # (B, T, C, H, W)

        first, second, rest = slice(0, fold), slice(fold, 2 * fold), slice(2 * fold, None)
        from_next, from_last = (first, second) if next_first else (second, first)
        # frame t from frame t + 1; the last frame has none, so it gets zeros, and likewise at the start
        target[:, :-1, from_next] = source[:, 1:, from_next]
        target[:, -1, from_next] = 0
        target[:, 1:, from_last] = source[:, :-1, from_last]
        target[:, 0, from_last] = 0
        target[:, :, rest] = source[:, :, rest]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        num_segments, fold, next_first = ctx.settings
        return _Shift.apply(grads[0], num_segments, fold, not next_first), None, None, None  # pyright: ignore[reportReturnType]


class TemporalShift(nn.Module):
    """Apply `temporal_shift` with its options, as a block's `branch_input`."""

    def __init__(self, num_segments: int, shift_div: int, direction: str) -> None:
        super().__init__()
        self.num_segments, self.shift_div, self.direction = num_segments, shift_div, direction
        self.weight_options = {"shift_direction": direction}

    def forward(self, x: Tensor) -> Tensor:
        """Map (B*T, C, H, W) to the same shape."""
        return temporal_shift(x, num_segments=self.num_segments, shift_div=self.shift_div, direction=self.direction)

    def extra_repr(self) -> str:
        """Return the options for print(model)."""
        return f"num_segments={self.num_segments}, shift_div={self.shift_div}, direction={self.direction}"


class TemporalPool(nn.Module):
    """Take the maximum over 3 neighbouring frames with a stride of 2: T -> (T + 1) // 2."""

    def __init__(self, num_segments: int) -> None:
        super().__init__()
        self.num_segments = num_segments

    def forward(self, x: Tensor) -> Tensor:
        """Map (B*T, C, H, W) to (B*((T + 1) // 2), C, H, W)."""
        clips = x.unflatten(0, (-1, self.num_segments)).transpose(1, 2)  # (B*T, C, H, W) -> (B, C, T, H, W)
        pooled = max_pool3d(clips, (3, 1, 1), (2, 1, 1), (1, 0, 0))
        return pooled.transpose(1, 2).flatten(0, 1)  # (B, C, T', H, W) -> (B*T', C, H, W)


class TSM(TSN):
    """TSN for a backbone with shifts. Its clips must have exactly `frames_per_clip` frames."""

    def forward(self, clips: Tensor) -> Tensor:
        """Map (B, C, T, H, W) to logits (B, K).

        Raises:
            ValueError: T is not the number that the shifts were built for.
        """
        if clips.shape[2] != self.frames_per_clip:
            raise ValueError(
                f"a clip has {clips.shape[2]} frames, this TSM was built for num_segments = {self.frames_per_clip}"
            )

        return super().forward(clips)


def insert_shift(
    backbone: nn.Module,
    *,
    num_segments: int,
    shift_div: int = 8,
    direction: str = "tsm",
    n_round: int | None = None,
    temporal_pool: bool = False,
) -> nn.Module:
    """Put a `TemporalShift` before the first convolution of the residual branches of a 2D backbone.

    * ResNet: blocks 0, n_round, 2*n_round, ... of every stage.
    * MobileNetV2: the blocks that expand and have a shortcut (10 of 17).
    * MobileOne: all units after the stem, before all of their branches (MMAction2).

    Args:
        backbone: ResNet, MobileNetV2 or MobileOne of `networks`; changed in place, no parameter is added or renamed.
        num_segments: T.
        shift_div, direction: see `temporal_shift`.
        n_round: None for the authors' rule: 2 if layer3 has 23 blocks or more, else 1.
        temporal_pool: `TemporalPool` before layer2 (ResNet only); later stages then see (T + 1) // 2 frames.

    Raises:
        ValueError: an unsupported backbone, or an option that this backbone does not support.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"shift_direction is {direction!r}; it must be one of {', '.join(DIRECTIONS)}")
    if n_round is not None and n_round < 1:
        raise ValueError(f"n_round is {n_round}; it must be at least 1")

    if isinstance(backbone, ResNet):
        _shift_resnet(backbone, num_segments, shift_div, direction, n_round, temporal_pool)
        return backbone

    places = _small_places(backbone)
    if places is None:
        raise ValueError(f"tsm does not support the backbone {type(backbone).__name__}")
    if temporal_pool or n_round not in (None, 1):
        name = "mobilenetv2" if isinstance(backbone, MobileNetV2) else "mobileone_s4"
        raise ValueError(f"temporal_pool and n_round are options of TSM on a ResNet, not on {name}")

    for place in places:
        place.branch_input = TemporalShift(num_segments, shift_div, direction)
    return backbone


def _shift_resnet(
    backbone: ResNet, num_segments: int, shift_div: int, direction: str, n_round: int | None, temporal_pool: bool
) -> None:
    """Shift in a ResNet, see `insert_shift`."""
    # the authors' rule for deep networks
    step = n_round if n_round is not None else (2 if len(backbone.layer3) >= 23 else 1)
    length = num_segments
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        if temporal_pool and stage is backbone.layer2:
            # the pool halves the number of frames before this stage, so its shifts use the new length
            backbone.before_layer2 = TemporalPool(length)
            length = (length + 1) // 2
        for block in list(stage)[::step]:
            assert isinstance(block, BasicBlock | Bottleneck)
            block.branch_input = TemporalShift(length, shift_div, direction)


def _small_places(backbone: nn.Module) -> list[InvertedResidual | Unit] | None:
    """Return the blocks of a MobileNetV2 or MobileOne that shift; None for any other network."""
    if isinstance(backbone, MobileNetV2):
        blocks = (block for block in backbone.features.children() if isinstance(block, InvertedResidual))
        return [block for block in blocks if block.expands and block.use_res_connect]

    if isinstance(backbone, MobileOne):  # not in the stem: its three channels are too few
        return [unit for unit in backbone.stages.modules() if isinstance(unit, Unit)]
    return None


def build(
    *,
    backbone: str,
    num_class: int,
    num_segments: int,
    dropout: float = 0.5,
    pretrained: bool | str = False,
    shift_div: int = 8,
    shift_direction: Literal["tsm", "paddle"] = "tsm",
    n_round: int | None = None,
    temporal_pool: bool = False,
    non_local: Literal["embedded_gaussian", "dot_product", "gaussian"] | None = None,
    fc_std: float = 0.001,
    partial_bn: bool = False,
    norm_eval: bool = False,
    fc_lr5: bool = True,
    **backbone_options: Any,
) -> TSM:
    """Build TSM on RGB frames (Lin et al. 2019, arXiv:1811.08383).

    ResNet-50 with 8 frames has 24,327,632 parameters and takes 32.9 GMAC.

    Args:
        backbone: resnet18 ... resnet152, mobilenetv2 or mobileone_s4.
        num_class: K.
        num_segments: T.
        dropout: probability before the classifier, applied in each frame (0.5; 0.8 for UCF101 and HMDB51).
        pretrained: see `methods.build`; weights of a TSN fit, since a shift has no parameters.
        shift_div: 1/shift_div of the channels is shifted in each direction (8 in the paper).
        shift_direction: "tsm", or "paddle" for weights trained in PaddleVideo (with shift_div = num_segments).
        n_round: shift every n-th block; None for the authors' rule (2 for ResNet-101 and -152, else 1).
        temporal_pool: halve the number of frames before layer2.
        non_local: non-local blocks after every second block of layer2 and layer3 of a ResNet, over the frames of a clip
            (+7.4 million parameters on ResNet-50 for the first two forms).
        fc_std: standard deviation of the classifier's initial weights.
        partial_bn: in training, freeze every BN layer except the first (see `TSN`).
        norm_eval: in training, do not update the statistics of any BN layer (see `TSN`).
        fc_lr5: with `policy: true`, learning rate x5 for the classifier's weight and x10 for its bias.
        backbone_options: options of the backbone, such as `t` of mobilenetv2.
    """
    network = insert_shift(
        _backbones.make(backbone, backbone_options),
        num_segments=num_segments,
        shift_div=shift_div,
        direction=shift_direction,
        n_round=n_round,
        temporal_pool=temporal_pool,
    )

    if non_local is not None:
        # layer2 and layer3 come after the temporal pool
        length = (num_segments + 1) // 2 if temporal_pool else num_segments
        add_non_local(network, first=0, make=lambda channels: FramesNonLocal(channels, non_local, length))

    model = TSM(
        network,
        num_class=num_class,
        num_segments=num_segments,
        dropout=dropout,
        consensus="logits",
        fc_std=fc_std,
        partial_bn=partial_bn,
        norm_eval=norm_eval,
        fc_lr5=fc_lr5,
    )

    return _backbones.load(model, pretrained, backbone)
