"""Convolve on a CPU by matrix products, or by 2D convolutions, where these are faster.

PyTorch chooses its CPU kernels for image networks on many threads. With one thread and small batches every 3D kernel
that is 1 x 1 in space goes through im2col with copies into a different memory format, and layers with more weights than
places spend their time rearranging weights. docs/performance.md has the figures. On other devices, in other memory
formats, under autocast and in compiled graphs, these classes are `nn.Conv2d` and `nn.Conv3d` and nothing else.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FEW_CHANNELS = 256  # with fewer, oneDNN's 2D convolution beats a matrix product for temporal kernels
_MANY_WEIGHTS = 2**18  # of a pointwise 2D kernel: from here on a matrix product is faster
Numbers = tuple[int, ...]


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` with zero padding: the same parameters, names and results (up to rounding), but faster on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: (N, in_channels, H, W) -> (N, out_channels, H', W')."""
        # A pointwise kernel is a matrix product already; with fewer places than channels the weights dominate.
        if _may_rearrange(self, input, torch.channels_last) and (
            (self.kernel_size == (1, 1) and self.weight.numel() >= _MANY_WEIGHTS)
            or 0 < _places(self, input) <= self.out_channels
        ):
            return _multiply(self, input)
        return super().forward(input)


class Conv3d(nn.Conv3d):
    """The same for `nn.Conv3d`; kernels that are 1 x 1 in space never use PyTorch's choice."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve: (B, in_channels, T, H, W) -> (B, out_channels, T', H', W')."""
        if not _may_rearrange(self, input, torch.channels_last_3d, grouped=True):
            return super().forward(input)

        time, *space = self.kernel_size
        # The spatial kernel, stride and padding do nothing: only time is left.
        still = (*space, *self.stride[1:], *self.padding[1:]) == (1, 1, 1, 1, 0, 0)
        if still and (self.groups > 1 or (self.in_channels < _FEW_CHANNELS and time > 1)):
            return self._over_time(input)

        if self.groups == 1 and (space == [1, 1] or 0 < _places(self, input) <= self.out_channels):
            return _multiply(self, input)

        return super().forward(input)

    def _over_time(self, x: Tensor) -> Tensor:
        """Apply a kernel (k, 1, 1) as the 2D kernel (k, 1) of images T x (H*W)."""
        stride, padding = (self.stride[0], 1), (int(self.padding[0]), 0)
        images = x.flatten(3)  # (B, C, T, H, W) -> (B, C, T, H*W)
        y = F.conv2d(images, self.weight.flatten(3), self.bias, stride, padding, 1, self.groups)
        return y.unflatten(3, x.shape[3:])  # (B, O, T', H*W) -> (B, O, T', H, W)


def _may_rearrange(
    conv: nn.Conv2d | nn.Conv3d, x: Tensor, memory_format: torch.memory_format, *, grouped: bool = False
) -> bool:
    """Return True on a CPU with channels innermost, where the views below are free, if kernels are ours to choose."""
    return (
        x.device.type == "cpu"
        and x.is_contiguous(memory_format=memory_format)
        and x.dtype == conv.weight.dtype
        and (grouped or conv.groups == 1)
        and not isinstance(conv.padding, str)
        and set(conv.dilation) == {1}
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _places(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> int:
    """Return the number of output places over the whole batch: rows of the matrix product."""
    places = x.shape[0]
    for side, kernel, stride, padding in zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, strict=True):
        places *= (side + 2 * int(padding) - kernel) // stride + 1
    return places


def _multiply(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    return _MatrixProduct.apply(x, conv.weight, conv.bias, conv.stride, conv.padding)  # pyright: ignore[reportReturnType]


class _MatrixProduct(torch.autograd.Function):
    """Gathers the kernel's view of each place into a row and multiplies; the backward pass does the same.

    The backward pass gathers the rows again: stored, they would take the memory of the input times the kernel's places.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Numbers, padding: Numbers) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = (stride, padding)
        rows, _, _ = _gather(x, weight, stride, padding)
        return F.linear(rows, _innermost(weight).flatten(1), bias).movedim(-1, 1)  # (N, ..., O) -> (N, O, ...)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator hides the parameters' names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Return the gradients of input, weight and bias that are needed."""
        x, weight = ctx.saved_tensors
        stride, padding = ctx.settings
        rows, parts, padded = _gather(x, weight, stride, padding)
        kernel = _innermost(weight)
        grad = _innermost(grads[0]).flatten(0, -2)  # (places, O)

        grad_x = grad_weight = grad_bias = None
        # Each gradient only if it is needed: frozen layers and the first layer save a product.
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ rows.flatten(0, -2)).view(kernel.shape).movedim(-1, 1)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        if ctx.needs_input_grad[0]:
            grad_x = _scatter((grad @ kernel.flatten(1)).view(rows.shape), parts, padded, padding)

        return grad_x, grad_weight, grad_bias, None, None


def _innermost(x: Tensor) -> Tensor:
    """Move channels to the end, (N, C, ...) -> (N, ..., C): a view, contiguous if channels are innermost in memory."""
    return x.movedim(1, -1)


def _gather(
    x: Tensor, weight: Tensor, stride: Numbers, padding: Numbers
) -> tuple[Tensor, list[tuple[slice, ...]], Numbers]:
    """Return the kernel's view of each place (N, ..., kernel*C), its parts in the padded input, and that shape."""
    z = _innermost(x)

    if any(padding):  # F.pad wants the last axis first, and the channels are last
        z = F.pad(z, (0, 0, *(p for padded in reversed(padding) for p in (padded, padded))))

    kernel = weight.shape[2:]
    places = [(side - k) // s + 1 for side, k, s in zip(z.shape[1:-1], kernel, stride, strict=True)]

    # One strided slice of the input per place of the kernel, as many as there are outputs.
    parts = [
        (slice(None), *(slice(o, o + (n - 1) * s + 1, s) for o, n, s in zip(offset, places, stride, strict=True)))
        for offset in itertools.product(*map(range, kernel))
    ]

    rows = z[parts[0]].contiguous() if len(parts) == 1 else torch.cat([z[part] for part in parts], -1)
    return rows, parts, tuple(z.shape)


def _scatter(rows: Tensor, parts: list[tuple[slice, ...]], padded: Numbers, padding: Numbers) -> Tensor:
    """Transpose `_gather`: add each place's row to the places of the input that it came from."""
    if len(parts) == 1 and rows.shape == padded:  # a 1x1 kernel without stride: nothing overlaps
        z = rows
    else:
        z, channels = rows.new_zeros(padded), padded[-1]
        for index, part in enumerate(parts):
            z[part] += rows[..., index * channels : (index + 1) * channels]

    inner = (slice(p, side - p) for p, side in zip(padding, padded[1:-1], strict=True))  # without the padding
    return z[(slice(None), *inner)].movedim(-1, 1)  # (N, ..., C) -> (N, C, ...)
