"""Conv2d and Conv3d do what torch's do: outputs and gradients, in every form that they choose, and memory formats."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.convolution import Conv2d, Conv3d, _MatrixProduct

# name: (in, out, kernel, stride, padding, groups, bias, input (T, H, W))
CASES = {
    "pointwise": (6, 4, (1, 1, 1), 1, 0, 1, False, (3, 4, 5)),
    "pointwise strided": (6, 4, (1, 1, 1), (1, 2, 2), 0, 1, True, (3, 4, 5)),
    "temporal, few channels": (6, 4, (3, 1, 1), 1, (1, 0, 0), 1, True, (4, 3, 2)),
    "temporal strided": (6, 4, (5, 1, 1), (4, 1, 1), (2, 0, 0), 1, False, (8, 3, 2)),
    "temporal, many channels": (256, 4, (3, 1, 1), 1, (1, 0, 0), 1, False, (4, 2, 2)),
    "temporal grouped": (8, 4, (3, 1, 1), 1, (1, 0, 0), 4, True, (4, 3, 2)),
    "pointwise grouped": (8, 4, (1, 1, 1), 1, 0, 2, False, (1, 3, 2)),
    "more channels than places": (5, 40, (1, 3, 3), (1, 2, 2), (0, 1, 1), 1, True, (2, 5, 6)),
    "in time and space": (3, 200, (3, 3, 3), (1, 2, 2), (1, 1, 1), 1, False, (3, 5, 5)),
    "more places than channels": (3, 4, (1, 3, 3), 1, (0, 1, 1), 1, False, (3, 6, 6)),
    "one frame, one pixel": (3, 4, (3, 1, 1), 1, (1, 0, 0), 1, False, (1, 1, 1)),
    "2D: many weights": (512, 512, (1, 1), 2, 0, 1, True, (5, 6)),
    "2D: few weights": (4, 8, (1, 1), 1, 0, 1, False, (5, 6)),
    "2D: more channels than places": (5, 80, (3, 3), 2, 1, 1, True, (5, 6)),
    "2D: more places than channels": (5, 8, (3, 3), 1, 1, 1, False, (5, 6)),
    "2D: grouped": (6, 600, (3, 3), 1, 1, 3, False, (5, 6)),
}
LEFT_TO_TORCH = {"more places than channels", "2D: few weights", "2D: more places than channels", "2D: grouped"}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def pair(case: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The plain layer, ours with the same weights, and an input with channels innermost."""
    channels, out, kernel, stride, padding, groups, bias, size = CASES[case]
    torch.manual_seed(1)
    options = {"stride": stride, "padding": padding, "groups": groups, "bias": bias}
    kinds = (nn.Conv3d, Conv3d) if len(size) == 3 else (nn.Conv2d, Conv2d)
    torch_layer, ours = (kind(channels, out, kernel, **options).double() for kind in kinds)
    ours.load_state_dict(torch_layer.state_dict())
    layout = FORMATS[2 + len(size)]
    ours.weight.data = ours.weight.data.contiguous(memory_format=layout)
    return torch_layer, ours, torch.randn(2, channels, *size).double().contiguous(memory_format=layout)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str) -> None:
    torch_layer, ours, x = pair(case)
    results = []
    for layer, clip in ((torch_layer, x.contiguous()), (ours, x)):
        clip = clip.clone(memory_format=torch.preserve_format).requires_grad_()
        out = layer(clip)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape))
        results.append([out, clip.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    out, grad, weight_grad = results[1][:3]
    for tensor in (out, grad, weight_grad) if case not in LEFT_TO_TORCH else ():  # what comes next finds its format
        assert tensor.is_contiguous(memory_format=FORMATS[tensor.dim()])


@pytest.mark.parametrize("case", CASES)
def test_other_memory_formats_and_no_gradient(case: str) -> None:
    torch_layer, ours, x = pair(case)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), torch_layer(x.contiguous()), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours(x.contiguous()), torch_layer(x.contiguous()), rtol=1e-10, atol=1e-12)


def test_frozen_parts_get_no_gradient() -> None:
    _, ours, x = pair("pointwise strided")
    ours.weight.requires_grad_(False)
    clip = x.clone(memory_format=torch.preserve_format).requires_grad_()
    ours(clip).sum().backward()
    assert ours.weight.grad is None
    assert ours.bias.grad is not None
    assert clip.grad is not None
    ours.weight.requires_grad_()
    ours(x).sum().backward()
    assert ours.weight.grad is not None


def test_autocast_and_tracing_see_a_plain_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the matrix product was used")

    _, ours, x = pair("pointwise")
    monkeypatch.setattr(_MatrixProduct, "apply", never)
    with pytest.raises(AssertionError, match="matrix product"):
        ours(x)
    ours, x = ours.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    program = torch.export.export(ours, (x,))
    assert any("conv3d" in str(node.target) for node in program.graph.nodes)
    assert ours(x.contiguous()).shape == (2, 4, 3, 4, 5)


@pytest.mark.parametrize(("layer", "shape"), [(Conv2d(3, 900, 5), (1, 3, 4, 4)), (Conv3d(3, 9, 5), (1, 3, 4, 4, 4))])
def test_an_input_that_is_too_small(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape).contiguous(memory_format=FORMATS[len(shape)])
    with pytest.raises(RuntimeError, match="[Kk]ernel size"):
        layer(x)
