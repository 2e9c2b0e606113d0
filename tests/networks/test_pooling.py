"""Pooling in two dimensions gives the values and gradients of torch's pooling, bit for bit, ties included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from networks import pooling

CASES = [
    ((1, 3, 3), (1, 2, 2), (0, 1, 1), False),  # ResNet's stem
    ((1, 2, 2), (1, 2, 2), (0, 0, 0), False),  # non-local blocks
    ((3, 1, 1), (2, 1, 1), (1, 0, 0), False),  # TSM's temporal pooling
    ((4, 1, 1), (4, 1, 1), (0, 0, 0), True),  # TPN
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil"), CASES)
def test_same_bits_as_three_dimensional_pooling(kernel, stride, padding, ceil) -> None:
    torch.manual_seed(0)
    values = torch.randint(-2, 3, (2, 3, 6, 7, 9)).double()  # few values, so many ties
    x = values.contiguous(memory_format=torch.channels_last_3d)
    results = []
    for pool in (F.max_pool3d, pooling.in_two_dimensions):
        inputs = x.clone().requires_grad_()
        out = pool(inputs, kernel, stride, padding, ceil_mode=ceil)
        out.backward(torch.arange(out.numel(), dtype=torch.float64).view(out.shape))
        results.append((out.detach(), inputs.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][0].is_contiguous(memory_format=torch.channels_last_3d)


def test_a_kernel_over_time_and_space_is_no_case_of_it() -> None:
    with pytest.raises(ValueError, match="both time and space"):
        pooling.in_two_dimensions(torch.zeros(1, 1, 4, 4, 4), (2, 2, 2), (2, 2, 2))


def test_elsewhere_it_is_torchs_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert torch.equal(pooling.MaxPool2d(3, 2, 1)(x), F.max_pool2d(x, 3, 2, 1))
    y = torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(
        pooling.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))(y), F.max_pool3d(y, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    )
