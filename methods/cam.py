"""Show where a network looked: maps over the frames of one clip.

* `grad_cam`, for convolutional networks: Selvaraju et al. 2017, arXiv:1610.02391, section 3, equations 1 and 2.
* `attention_rollout`, for the transformers of networks/vit3d.py: Abnar and Zuidema 2020, arXiv:2005.00928, section 3.

Both are functions of a network in evaluation mode and a clip, and change neither. A map is coarse: (T', h, w) cells of
a layer, or tokens. `upsample` brings it to the size of the frames.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.vjepa2 import CrossAttention
from networks.vit3d import Attention, VisionTransformer3D
from utils.errors import UserError, did_you_mean

CELLS = 4  # least number of cells along the short side of a map, if a layer of the network has that many
_ROWS = 512  # rows of an attention matrix that are in memory at a time

#: An attention layer and the inputs of its forward pass.
Projected: TypeAlias = tuple[Attention | CrossAttention, tuple[Tensor, ...]]


def is_transformer(net: nn.Module) -> bool:
    """Return True for a network whose maps come from its attention."""
    return any(isinstance(module, VisionTransformer3D) for module in net.modules())


def stages(net: nn.Module) -> list[str]:
    """Return the names of the layers with useful maps, first to last: the stages of a backbone that we know.

    For SlowFast these are the stages of the Slow pathway, which has most of the channels. Other networks have none.
    """
    names = [name for name, _ in net.named_modules()]
    # the four stages of a ResNet
    for place in ("backbone.", "backbone.slow."):
        stage_names = [f"{place}layer{i}" for i in range(1, 5) if f"{place}layer{i}" in names]
        if stage_names:
            return stage_names

    # the units of MobileNetV2 and MobileOne: children of one container
    for place in ("backbone.features.", "backbone.stages."):
        stage_names = [name for name in names if name.startswith(place) and "." not in name[len(place) :]]
        if stage_names:
            return stage_names
    return []


def choose_layer(net: nn.Module, clip: Tensor) -> str:
    """Return the last stage whose map of this clip has at least CELLS cells along its short side.

    The last stage is the most specific to the class, and section 3 of the paper uses it. On small frames it has one or
    two cells, which cannot show a place. If no stage has CELLS cells, return the first one with the most cells.

    Args:
        net: in evaluation mode.
        clip: (1, C, T, H, W), the input of `net`.

    Raises:
        UserError: the network has no known stages.
    """
    names = stages(net)
    if not names:
        raise UserError(
            f"no maps: the layers of {type(net).__name__} are not known; name a convolution's with --cam-layer "
            f"({_some_layers(net)})"
        )

    # One forward pass shows the size of each stage's map for clips of this size.
    with torch.no_grad(), contextlib.ExitStack() as stack:
        kept = {name: stack.enter_context(_output_of(net, name)) for name in names}
        net(clip)

    sides = {name: min(one[-1].shape[-2:]) for name, one in kept.items() if one and one[-1].dim() in (4, 5)}
    enough = [name for name, side in sides.items() if side >= CELLS]
    return enough[-1] if enough else max(sides, key=lambda name: sides[name])


def check_layer(net: nn.Module, name: str) -> None:
    """Refuse a name that no layer of the network has (UserError)."""
    known = [one for one, _ in net.named_modules() if one]
    if name not in known:
        raise UserError(f"--cam-layer {name}: no such layer{did_you_mean(name, known)} ({_some_layers(net)})")


def _some_layers(net: nn.Module) -> str:
    convolutions = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    return "it has " + ", ".join(convolutions[-3:]) if convolutions else "it has no convolution"


@dataclass(frozen=True)
class ClassMaps:
    """Hold the maps of one clip for some classes.

    Attributes:
        values: (M, T', h, w) float, at least 0, in units of the logit per unit of the layer.
        logits: (K,) of the same forward pass.
    """

    values: Tensor
    logits: Tensor = field(repr=False)


def grad_cam(net: nn.Module, clip: Tensor, classes: Sequence[int], layer: str) -> ClassMaps:
    """Return the class-activation maps of a clip (Selvaraju et al. 2017, arXiv:1610.02391, section 3).

    Equation 1: the weight of channel k for class c is the mean over all Z places of the gradient of the logit y^c with
    respect to the activation A^k. Equation 2: the map is ReLU(sum_k weight_k * A^k). The places of a clip are in space
    and time, so a channel has one weight for all frames.

    Args:
        net: in evaluation mode; with float64 weights and clip the arithmetic is float64.
        clip: (1, C, T, H, W), normalised.
        classes: M classes.
        layer: name of a module whose output is (T', A, h, w), frames as a batch, or (1, A, T', h, w).

    Raises:
        UserError: no such layer, or its output is not a map.
    """
    check_layer(net, layer)
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    try:
        # Without parameters that learn, autograd records only the layers after this one.
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad(), _output_of(net, layer, leaf=True) as kept:
            logits = net(clip)  # (1, K)

        if len(kept) != 1 or kept[0].dim() not in (4, 5) or min(kept[0].shape[-2:]) < 1:
            what = f"its output is {tuple(kept[0].shape)}" if kept else "this clip does not reach it"
            raise UserError(f"--cam-layer {layer}: no map over frames ({what})")

        maps = []
        for number in classes:
            # `retain_graph`: the next class needs the same graph
            gradient = _as_map(torch.autograd.grad(logits[0, number], kept[0], retain_graph=True)[0])
            weights = gradient.mean((1, 2, 3))  # (A, T', h, w) -> (A,)
            maps.append(torch.einsum("a,athw->thw", weights, _as_map(kept[0].detach())).relu())
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    return ClassMaps(torch.stack(maps), logits[0].detach())


def _as_map(output: Tensor) -> Tensor:
    """Map (T', A, h, w) or (1, A, T', h, w) to (A, T', h, w)."""
    return output.transpose(0, 1) if output.dim() == 4 else output[0]


@contextlib.contextmanager
def _output_of(net: nn.Module, name: str, *, leaf: bool = False) -> Iterator[list[Tensor]]:
    """Keep the outputs of a layer within the context, as leaves, to take gradients with respect to them.

    The network continues with a copy, because a later layer may write into its input.
    """
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: object) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        kept.append(output.detach().requires_grad_() if leaf else output.detach())
        return kept[-1].clone()

    handle = net.get_submodule(name).register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@torch.no_grad()
def attention_rollout(net: nn.Module, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's share in the logits (Abnar and Zuidema 2020, arXiv:2005.00928, section 3).

    The attention of a layer, averaged over its heads, and the residual connection make the matrix 0.5 W + 0.5 I. The
    product of these matrices over all layers gives the share of each input token in each output token. The head reads
    the output tokens by their mean, by the first one, or by the query of an attentive pooler, whose blocks are layers
    too. There is one map for all classes, because the method does not depend on the class.

    The product starts at the head, as a vector times one matrix at a time, and rows of a matrix are computed when they
    are used. So memory grows with the number of tokens, not with its square.

    Args:
        net: with one `VisionTransformer3D`, in evaluation mode.
        clip: (1, C, T, H, W), normalised.

    Returns:
        Shares (t, h, w) that sum to 1, and the logits (K,).
    """
    # Keep the inputs of all attention layers, in the order of the forward pass.
    layers: list[Projected] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        assert isinstance(module, Attention | CrossAttention)
        layers.append((module, inputs))

    attentions = [module for module in net.modules() if isinstance(module, Attention | CrossAttention)]
    handles = [module.register_forward_hook(keep) for module in attentions]
    try:
        logits = net(clip)[0]
    finally:
        for handle in handles:
            handle.remove()

    (transformer,) = (module for module in net.modules() if isinstance(module, VisionTransformer3D))
    if clip.shape[2] < transformer.patch_embed.kernel_size[0]:  # the forward pass repeats an image in the same way
        clip = clip.repeat(1, 1, transformer.patch_embed.kernel_size[0], 1, 1)
    grid = transformer.patch_embed.grid(clip)

    # how the head reads the tokens
    share = clip.new_zeros(grid[0] * grid[1] * grid[2])  # (N,)
    if getattr(net, "pooling", "mean") == "first":
        share[0] = 1
    else:
        share += 1 / len(share)

    # Backwards through the layers, from the head to the input.
    for module, inputs in reversed(layers):
        if isinstance(module, CrossAttention):
            queries = inputs[0].shape[1]
            # a pooler has no residual path from tokens to queries; its queries count equally
            share = _attended(module, inputs, clip.new_full((queries,), 1 / queries))
        else:
            share = 0.5 * share + 0.5 * _attended(module, inputs, share)
    return share.reshape(grid), logits


def _attended(module: Attention | CrossAttention, inputs: tuple[Tensor, ...], share: Tensor) -> Tensor:
    """Return share @ W: (Q,) of the queries -> (N,) of the tokens; W is the mean of the heads' attention (Q, N)."""
    q, k, _ = module.project(*inputs)  # pyright: ignore[reportArgumentType]  the inputs of its own forward pass
    q, k = q[0] * q.shape[-1] ** -0.5, k[0]  # (heads, Q or N, D/heads)
    attended = share.new_zeros(k.shape[1])
    # in blocks of rows, so that the Q x N matrix is never in memory
    for rows in torch.arange(q.shape[1], device=q.device).split(_ROWS):
        weights = (q[:, rows] @ k.transpose(1, 2)).softmax(-1)  # (heads, rows, N)
        attended += torch.einsum("r,hrn->n", share[rows], weights.to(share.dtype)) / len(q)
    return attended


def upsample(values: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Bring a map to the frames by linear interpolation between the centres of its cells.

    Args:
        values: (T', h, w).
        size: T, H, W.
    """
    return F.interpolate(values[None, None], size, mode="trilinear", align_corners=False)[0, 0]
