"""Define the vision transformer over space and time: (B, 3, T, H, W) in, tokens (B, N, D) out.

* Pre-norm blocks (Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.1) on tubelets (Arnab et al. 2021,
  arXiv:2103.15691, section 3.2). A few options distinguish VideoMAE, VideoMAE v2 and V-JEPA 2.
* N = t*h*w tokens of a grid (T / tubelet, H / patch, W / patch), in the order time, row, column.
* State-dict names are those of the original files: `patch_embed`, `blocks.N.{norm1,attn,norm2,mlp}`, `norm`.
* Slots (`nn.Identity`, no state-dict key): `drop_path1` and `drop_path2` of a block get what its two branches add to
  the residual stream, `attn.attention_drop` gets the attention weights. Methods put layers with random draws there.
* The residual stream is at least float32, even under autocast.
"""

from __future__ import annotations

import contextvars
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Rotary = tuple[Tensor, ...]  # factors of a channel and of its neighbour, each (N, C)


class PatchEmbed(nn.Conv3d):
    """A convolution whose stride is its kernel, as one matrix product of the tubelets."""

    def __init__(self, dim: int, patch: int, tubelet: int) -> None:
        super().__init__(3, dim, (tubelet, patch, patch), (tubelet, patch, patch))

    def grid(self, clips: Tensor) -> tuple[int, int, int]:
        """Return the tokens of (B, 3, T, H, W) along time, rows and columns.

        Raises:
            ValueError: a side is not a multiple of the kernel's side.
        """
        counts = []
        for axis, side, kernel in zip("THW", clips.shape[2:], self.kernel_size, strict=True):
            if side % kernel or not side:
                raise ValueError(f"a clip has {axis} = {side}; the network needs a multiple of {kernel}")
            counts.append(side // kernel)

        return counts[0], counts[1], counts[2]

    def forward(self, input: Tensor) -> Tensor:
        """Return the tokens of clips: (B, 3, T, H, W) -> (B, N, D)."""
        t, h, w = self.grid(input)
        # Clips and weights have channels innermost in training: then the weight is a view, and copied runs stay long.
        x = input.permute(0, 2, 3, 4, 1)  # (B, 3, T, H, W) -> (B, T, H, W, 3)
        # -> (B, t, tubelet, h, patch, w, patch, 3)
        x = x.unflatten(3, (w, -1)).unflatten(2, (h, -1)).unflatten(1, (t, -1))
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).flatten(1, 3)  # -> (B, t*h*w, tubelet*patch*patch*3)
        return F.linear(x, self.weight.permute(0, 2, 3, 4, 1).flatten(1), self.bias)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for q, k and v.

    Args:
        dim: D.
        heads: number of heads; divides D.
        qkv_bias: "all"; "qv": no bias for the keys, as `q_bias` and `v_bias`; "none".
    """

    def __init__(self, dim: int, heads: int, qkv_bias: str) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias == "all")
        # VideoMAE's files store two biases: a bias of the keys changes all logits of a query alike and has no effect.
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.proj = nn.Linear(dim, dim)
        self.attention_drop: nn.Module = nn.Identity()

    def project(self, x: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of (B, N, D), each (B, heads, N, D/heads); `rotary` rotates the first two."""
        bias = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))

        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, D/heads)

        if rotary is None:
            q, k, v = qkv.unbind(2)
        else:
            (q, k), v = rotate(qkv[:, :, :2], *rotary).unbind(2), qkv[:, :, 2]

        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, N, D/heads)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Apply self-attention: (B, N, D) -> (B, N, D)."""
        q, k, v = self.project(x, rotary)

        # Dropped weights must exist as a tensor; the fused kernel never forms them.
        if self.training and not isinstance(self.attention_drop, nn.Identity):
            weights = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, heads, N, N)
            y = self.attention_drop(weights.softmax(-1)).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)

        return self.proj(y.transpose(1, 2).flatten(2))  # (B, heads, N, D/heads) -> (B, N, D)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU in between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers: (..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, hidden: int, *, qkv_bias: str, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.drop_path1: nn.Module = nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden)
        self.drop_path2: nn.Module = nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """Apply the block: (B, N, D) -> (B, N, D)."""
        x = x + self.drop_path1(self.attn(self.norm1(x), rotary))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class VisionTransformer3D(nn.Module):
    """Tubelets, positions and pre-norm blocks, without pooling and without classifier.

    Args:
        width: D.
        depth: number of blocks.
        heads: attention heads; divides D.
        mlp_ratio: hidden channels of a block's MLP over D.
        patch: side of a patch in pixels.
        tubelet: frames of a patch. A clip with fewer frames is repeated that many times.
        positions: "sinusoid": a fixed table is added to the tokens; "rotary": queries and keys are rotated.
        qkv_bias: see `Attention`.
        eps: epsilon of all layer norms.
        final_norm: a layer norm after the last block.
        checkpointing: keep only the input of each block for the backward pass and compute the rest again.
        freeze: number of blocks that, with the patch embedding, do not learn and stay in evaluation mode; 0 for none.

    Attributes:
        feature_dim: D.
        depth: number of blocks.

    Raises:
        ValueError: an option has a value that does not fit.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        patch: int = 16,
        tubelet: int = 2,
        positions: Literal["sinusoid", "rotary"] = "sinusoid",
        qkv_bias: Literal["qv", "all", "none"] = "qv",
        eps: float = 1e-6,
        final_norm: bool = False,
        checkpointing: bool = False,
        freeze: int = 0,
    ) -> None:
        super().__init__()
        # Options come from a user's config: name each mistake.
        for name, value in {"width": width, "depth": depth, "heads": heads, "patch": patch, "tubelet": tubelet}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the {heads} heads")

        for name, value, known in (
            ("positions", positions, ("sinusoid", "rotary")),
            ("qkv_bias", qkv_bias, ("qv", "all", "none")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")

        if round(width * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio is {mlp_ratio}; it leaves no channel of {width}")
        if not 0 <= freeze <= depth:
            raise ValueError(f"freeze is {freeze}; there are {depth} blocks to freeze")

        # The network itself.
        self.feature_dim, self.depth, self.heads = width, depth, heads
        self.positions, self.checkpointing, self.freeze = positions, checkpointing, freeze
        self.weight_options = {"eps": str(eps), "heads": str(heads)}  # not visible in the shapes of the weights

        self.patch_embed = PatchEmbed(width, patch, tubelet)
        self.blocks = nn.ModuleList(
            Block(width, heads, round(width * mlp_ratio), qkv_bias=qkv_bias, eps=eps) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=eps) if final_norm else nn.Identity()
        self._table: tuple[object, tuple[Tensor, ...]] = (None, ())  # key and positions of the last grid

        initialise(self)
        for module in self._frozen():
            module.requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        """Return the tokens of clips: (B, 3, T, H, W) -> (B, N, D).

        Raises:
            ValueError: T, H or W is not a multiple of the patch's side.
        """
        tubelet = self.patch_embed.kernel_size[0]
        if clips.shape[2] < tubelet:  # an image: repeat it to one tubelet
            clips = clips.repeat(1, 1, tubelet, 1, 1)

        x = self.patch_embed(clips)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # rounding errors would add up over the blocks

        tables = self._positions(x, self.patch_embed.grid(clips))
        rotary = tables if self.positions == "rotary" else None
        if rotary is None:
            x = x + tables[0]

        for block in self.blocks:
            x = self._checkpointed(block, x, rotary) if self.checkpointing and x.requires_grad else block(x, rotary)

        return self.norm(x)

    def _checkpointed(self, block: nn.Module, x: Tensor, rotary: Rotary | None) -> Tensor:
        """Run a block that computes its inner values again in the backward pass, with the same random draws."""
        if torch.compiler.is_compiling():
            return checkpoint(block, x, rotary, use_reentrant=False)  # pyright: ignore[reportReturnType]
        # Draws depend on a context variable, and the backward pass may run in a thread that does not have it.
        context = contextvars.copy_context()
        return checkpoint(context.run, block, x, rotary, use_reentrant=False)  # pyright: ignore[reportReturnType]

    def _positions(self, x: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, ...]:
        """Return the tables of a grid: (N, D) to add, or those for `rotate`. The tables of the last grid are kept."""
        key = (grid, x.dtype, x.device)
        if self._table[0] == key:
            return self._table[1]

        # Built outside of inference mode, since a later training step may use the same tables.
        with torch.inference_mode(False), torch.no_grad():
            if self.positions == "sinusoid":
                tables = (sinusoid(math.prod(grid), self.feature_dim, x.device).to(x.dtype),)
            else:
                tables = rotary_tables(grid, self.feature_dim // self.heads, x)

        if not torch.compiler.is_compiling():  # a cache would be a side effect in a compiled graph
            self._table = (key, tables)

        return tables

    def _frozen(self) -> list[nn.Module]:
        return [self.patch_embed, *self.blocks[: self.freeze]] if self.freeze else []

    def train(self, mode: bool = True) -> VisionTransformer3D:
        """Set training or evaluation mode; frozen blocks stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self


def sinusoid(count: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Return the fixed positions of VideoMAE: (count, dim), computed in float64, rounded to float32.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5, over the index n of the flattened tokens: channel j has the
    sine (j even) or cosine (j odd) of n / 10000^(2*(j//2)/dim).
    """
    index = torch.arange(count, dtype=torch.float64, device=device)[:, None]
    channel = torch.arange(dim, dtype=torch.float64, device=device)
    angle = index / 10000 ** (2 * (channel // 2) / dim)  # (count, dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def rotary_tables(grid: tuple[int, int, int], head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of V-JEPA 2's rotary positions (Assran et al. 2025, arXiv:2506.09985, section 2.1).

    The channels of a head are [time, row, column, rest]: D = 2*((head_dim//3)//2) for each axis; the rest is not
    rotated. Rates w_i = 10000^(-i/(D/2)). The published weights were trained with rates that are tiled over an axis,
    [w_0 ... w_last, w_0 ... w_last], while neighbouring channels form a pair. So the two channels of a pair have
    different angles, and this is not a rotation. The code keeps it because the weights need it.

    Args:
        grid: tokens along time, rows and columns.
        head_dim: channels of a head.
        like: defines device and dtype; the angles are at least float32.

    Returns:
        Factors of a channel and of its neighbour, each (N, C): C is head_dim, or one less if that is odd.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    dim = 2 * (head_dim // 3 // 2)
    rest = head_dim // 2 * 2 - 3 * dim

    # Without a channel to spare for an axis (head_dim below 6) there are no angles.
    rates = 10000.0 ** -(torch.arange(dim // 2, dtype=dtype, device=like.device) / (dim / 2)) if dim else None
    places = torch.cartesian_prod(*(torch.arange(side, dtype=dtype, device=like.device) for side in grid))  # (N, 3)
    angles = [places[:, axis, None] * rates.repeat(2) for axis in range(3)] if rates is not None else []
    angle = torch.cat([*angles, places.new_zeros(len(places), rest)], 1)  # (N, C)
    # The neighbour's factor: -sin for the first channel of a pair, +sin for the second.

    sign = torch.tensor([-1.0, 1.0], dtype=dtype, device=like.device).repeat(angle.shape[1] // 2)
    return angle.cos(), angle.sin() * sign


def rotate(x: Tensor, factors: Tensor, other: Tensor) -> Tensor:
    """Multiply channels by `factors` and add their neighbour times `other`: (B, N, ..., head_dim) -> the same shape."""
    channels = factors.shape[1]
    shape = (len(factors), *[1] * (x.dim() - 3), channels)  # (N, 1, ..., C), broadcast over batch and heads
    turned = x if channels == x.shape[-1] else x[..., :channels]
    neighbours = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # the two channels of each pair exchanged
    y = (turned * factors.view(shape) + neighbours * other.view(shape)).to(x.dtype)
    return y if channels == x.shape[-1] else torch.cat((y, x[..., channels:]), -1)


def initialise(network: nn.Module) -> None:
    """Give linear layers weights N(0, .02) and biases 0, with the same draws in every version of torch."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def vit3d_small(**options: Any) -> VisionTransformer3D:
    """Build ViT-S: 12 blocks of width 384; `options` are those of `VisionTransformer3D`."""
    return VisionTransformer3D(width=384, depth=12, heads=6, **options)


def vit3d_base(**options: Any) -> VisionTransformer3D:
    """Build ViT-B: 12 blocks of width 768."""
    return VisionTransformer3D(width=768, depth=12, heads=12, **options)


def vit3d_large(**options: Any) -> VisionTransformer3D:
    """Build ViT-L: 24 blocks of width 1024."""
    return VisionTransformer3D(width=1024, depth=24, heads=16, **options)


def vit3d_huge(**options: Any) -> VisionTransformer3D:
    """Build ViT-H: 32 blocks of width 1280."""
    return VisionTransformer3D(width=1280, depth=32, heads=16, **options)


def vit3d_giant(**options: Any) -> VisionTransformer3D:
    """Build ViT-g: 40 blocks of width 1408, whose MLPs have 6,144 hidden channels."""
    return VisionTransformer3D(width=1408, depth=40, heads=22, mlp_ratio=48 / 11, **options)


def vit3d(
    *, width: int = 192, depth: int = 6, heads: int = 3, mlp_ratio: float = 4.0, **options: Any
) -> VisionTransformer3D:
    """Build a network of any size; by default 6 blocks of width 192."""
    return VisionTransformer3D(width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio, **options)
