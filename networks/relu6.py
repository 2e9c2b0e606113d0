"""ReLU6 in place that keeps one tensor for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F


class ReLU6(nn.ReLU6):
    """`nn.ReLU6(inplace=True)`, without the copy of its input that PyTorch makes for the backward pass.

    min(max(x, 0), 6) (Krizhevsky 2010, "Convolutional deep belief networks on CIFAR-10"). The gradient passes where the
    input is inside 0..6, and just there the output is inside too. So the output is enough, and the next convolution
    keeps that anyway. The bits are the same. Nothing may write into the output before the backward pass.
    """

    def __init__(self) -> None:
        super().__init__(inplace=True)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name of the base class
        """Change the input in place, and return it."""
        # A compiler fuses the activation into its neighbours, and an exporter needs a plain operator
        if torch.compiler.is_compiling() or not input.requires_grad:
            return super().forward(input)
        return _ReLU6.apply(input)  # pyright: ignore[reportReturnType]


class _ReLU6(torch.autograd.Function):
    """See `ReLU6`."""

    @staticmethod
    def forward(ctx: BackwardCFunction, x: Tensor) -> Tensor:
        """Change x in place."""
        out = F.relu6(x, inplace=True)
        ctx.mark_dirty(out)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: BackwardCFunction, *grads: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], out, 0.0, 6.0)
