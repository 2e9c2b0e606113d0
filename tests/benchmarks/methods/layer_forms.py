"""CPU milliseconds of single convolutions in several forms, forward + backward: the figures of docs/performance.md.

python -m tests.benchmarks.methods.layer_forms [SIDE]

One thread, batch 2, feature maps of clips with this side (default 96).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks.convolution import Conv3d, _MatrixProduct

# name: (channels in, out, kernel, stride, groups, frames, the clip's side over the map's)
LAYERS = {
    "Slow res2 1x1x1": (256, 64, (1, 1, 1), (1, 1, 1), 1, 8, 4),
    "Slow res3 1x3x3": (128, 128, (1, 3, 3), (1, 1, 1), 1, 8, 8),
    "Slow res3 shortcut": (256, 512, (1, 1, 1), (1, 2, 2), 1, 8, 4),
    "Slow res4 3x1x1": (1024, 256, (3, 1, 1), (1, 1, 1), 1, 8, 16),
    "Slow res5 3x1x1": (2048, 512, (3, 1, 1), (1, 1, 1), 1, 8, 32),
    "Slow res5 1x3x3": (512, 512, (1, 3, 3), (1, 1, 1), 1, 8, 32),
    "Slow res5 1x1x1": (512, 2048, (1, 1, 1), (1, 1, 1), 1, 8, 32),
    "Fast res2 3x1x1": (32, 8, (3, 1, 1), (1, 1, 1), 1, 32, 4),
    "Fast res4 3x1x1": (128, 32, (3, 1, 1), (1, 1, 1), 1, 32, 16),
    "Fast res2 1x3x3": (8, 8, (1, 3, 3), (1, 1, 1), 1, 32, 4),
    "lateral 5x1x1": (32, 64, (5, 1, 1), (4, 1, 1), 1, 32, 4),
    "TPN spatial 1x3x3": (1024, 2048, (1, 3, 3), (1, 2, 2), 1, 8, 16),
    "TPN temporal 3x1x1": (2048, 1024, (3, 1, 1), (1, 1, 1), 32, 8, 32),
}


def frames(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """(1, h, w) as a 2D convolution of every frame."""
    y = F.conv2d(x.transpose(1, 2).flatten(0, 1), conv.weight[:, :, 0], None, conv.stride[1:], conv.padding[1:])
    return y.unflatten(0, (len(x), -1)).transpose(1, 2)


def over_time(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """(k, 1, 1) as a 2D convolution of images T x (H*W)."""
    assert not isinstance(conv.padding, str)
    stride, padding = (conv.stride[0], 1), (conv.padding[0], 0)
    return F.conv2d(x.flatten(3), conv.weight[..., 0], None, stride, padding, 1, conv.groups).unflatten(3, x.shape[3:])


def product(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Rows of what the kernel sees, times a matrix."""
    return _MatrixProduct.apply(x, conv.weight, None, conv.stride, conv.padding)


def milliseconds(form: Callable[[nn.Conv3d, Tensor], Tensor], conv: nn.Conv3d, x: Tensor) -> float:
    """The fastest of six passes, CPU time."""
    x, best = x.detach().requires_grad_(), float("inf")
    grad = torch.randn_like(form(conv, x))
    for _ in range(6):
        began = time.process_time()
        form(conv, x).backward(grad)
        best = min(best, time.process_time() - began)
        x.grad = conv.weight.grad = None
    return 1000 * best


def main(side: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    columns = ("channels first", "channels last", "frames", "over time", "product", "ours")
    print(f"{'layer':<20}" + "".join(f"{name:>16}" for name in columns))
    for name, (channels, out, kernel, stride, groups, length, scale) in LAYERS.items():
        depth, height, width = kernel
        padding = (depth // 2, height // 2, width // 2)
        torch_layer, ours = (
            kind(channels, out, kernel, stride, padding, groups=groups, bias=False) for kind in (nn.Conv3d, Conv3d)
        )
        x = torch.randn(2, channels, length, side // scale, side // scale)
        row = {"channels first": milliseconds(lambda conv, x: conv(x), torch_layer, x)}
        x = x.contiguous(memory_format=torch.channels_last_3d)
        for conv in (torch_layer, ours):
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
        row["channels last"] = milliseconds(lambda conv, x: conv(x), torch_layer, x)
        if kernel[0] == 1 and groups == 1:
            row["frames"] = milliseconds(frames, torch_layer, x)
        if kernel[1:] == (1, 1) and stride[1:] == (1, 1):
            row["over time"] = milliseconds(over_time, torch_layer, x)
        if groups == 1:
            row["product"] = milliseconds(product, torch_layer, x)
        row["ours"] = milliseconds(lambda conv, x: conv(x), ours, x)
        print(f"{name:<20}" + "".join(f"{row[c]:>16.1f}" if c in row else f"{'':>16}" for c in columns), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 96)
