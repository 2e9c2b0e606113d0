"""ReLU6 that keeps one tensor: the bits of PyTorch's, and less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import mobilenet
from networks.relu6 import ReLU6

EDGES = [-1.0, -0.0, 0.0, 1e-38, 3.0, 6.0, 6.0000005, 100.0, float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_and_gradient_have_the_bits_of_pytorch(dtype: torch.dtype) -> None:
    results = []
    for relu in (ReLU6(), nn.ReLU6(inplace=True)):
        x = torch.tensor(EDGES, dtype=dtype, requires_grad=True)
        y = relu(x * 1)
        (y * torch.arange(1, len(EDGES) + 1)).sum().backward()
        assert x.grad is not None
        results.append([y.detach(), x.grad])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.view(bits)[~ours.isnan()], theirs.view(bits)[~theirs.isnan()])


def test_the_gradient_has_a_gradient() -> None:
    x = torch.tensor([-1.0, 0.5, 3.0, 5.5, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ReLU6()(x * 1) ** 3, [x])


def test_it_changes_its_input_with_and_without_a_gradient() -> None:
    for x in (torch.tensor([-1.0, 7.0]), torch.tensor([-1.0, 7.0], requires_grad=True) * 1):
        y = ReLU6()(x)
        assert y.data_ptr() == x.data_ptr()
        assert x.tolist() == [0.0, 6.0]


def kept_bytes(relu: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> int:
    """What MobileNetV2 keeps for the backward pass: bytes of the distinct storages."""
    monkeypatch.setattr(mobilenet, "ReLU6", relu)
    net = mobilenet.mobilenetv2(num_class=2).train()
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(2, 3, 64, 64))
    return sum(storages.values()) - sum(p.numel() * p.element_size() for p in net.parameters())


def test_the_network_keeps_two_tensors_a_layer_not_three(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfPyTorch(nn.ReLU6):
        def __init__(self) -> None:
            super().__init__(inplace=True)

    ours, theirs = kept_bytes(ReLU6, monkeypatch), kept_bytes(OfPyTorch, monkeypatch)
    assert ours < 0.75 * theirs, "PyTorch needs no copy any more: use its own"
