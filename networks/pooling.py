"""Take maxima with the same gradients in every run, if deterministic algorithms are requested on a GPU.

CUDA has no deterministic backward pass of `max_pool3d`, and that of `max_pool2d` in channels-last adds with atomics
without a warning. So a kernel that covers either time or space is pooled in two dimensions, in the default layout,
whose backward pass is deterministic. In all other cases these are torch's own functions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Three = tuple[int, int, int]


class MaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d`, deterministic on request; see the module docstring."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the maxima: (N, C, H, W) -> (N, C, H', W')."""
        if not _must_be_exact(input):
            return F.max_pool2d(input, self.kernel_size, self.stride, self.padding)

        # The default layout for the kernel, then channels-last again for the layers that follow.
        pooled = F.max_pool2d(input.contiguous(), self.kernel_size, self.stride, self.padding)
        return pooled.contiguous(memory_format=torch.channels_last)


class MaxPool3d(nn.MaxPool3d):
    """`nn.MaxPool3d` with a kernel that covers either time or space; see the module docstring."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the maxima: (B, C, T, H, W) -> (B, C, T', H', W')."""
        return max_pool3d(input, self.kernel_size, self.stride, self.padding)  # pyright: ignore[reportArgumentType]


def max_pool3d(
    x: Tensor, kernel: Three, stride: Three, padding: Three = (0, 0, 0), *, ceil_mode: bool = False
) -> Tensor:
    """Return the maxima of a kernel that covers either time or space: (B, C, T, H, W) -> (B, C, T', H', W')."""
    if not _must_be_exact(x):
        return F.max_pool3d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    return in_two_dimensions(x, kernel, stride, padding, ceil_mode=ceil_mode)


def in_two_dimensions(
    x: Tensor, kernel: Three, stride: Three, padding: Three = (0, 0, 0), *, ceil_mode: bool = False
) -> Tensor:
    """Return the same values and gradients by `max_pool2d` in the default layout; the result is channels-last.

    Raises:
        ValueError: the kernel covers both time and space.
    """
    time, height, width = kernel

    if time == 1:
        frames = x.transpose(1, 2).flatten(0, 1).contiguous()  # (B, C, T, H, W) -> (B*T, C, H, W)
        pooled = F.max_pool2d(frames, (height, width), stride[1:], padding[1:], ceil_mode=ceil_mode)
        out = pooled.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)  # -> (B, C, T, H', W')
    elif (height, width) == (1, 1) and stride[1:] == (1, 1):
        columns = x.flatten(3).contiguous()  # (B, C, T, H, W) -> (B, C, T, H*W)
        pooled = F.max_pool2d(columns, (time, 1), (stride[0], 1), (padding[0], 0), ceil_mode=ceil_mode)
        out = pooled.unflatten(3, x.shape[3:])  # -> (B, C, T', H, W)
    else:
        raise ValueError(f"a kernel of {kernel} covers both time and space")

    return out.contiguous(memory_format=torch.channels_last_3d)


def _must_be_exact(x: Tensor) -> bool:
    return x.is_cuda and torch.are_deterministic_algorithms_enabled()
