"""On a CPU transfers are the identity; what they do for a GPU is tested in tests/fake_cuda and tests/gpu."""

from __future__ import annotations

from typing import Any

import torch

from utils import transfer

CPU = torch.device("cpu")


def test_nothing_is_copied_on_a_cpu() -> None:
    tensor = torch.arange(3)
    assert transfer.to_device(tensor, CPU) is tensor
    assert transfer.Readback(tensor).read() is tensor


def test_a_collective_is_waited_for() -> None:
    waited = []

    class Work:
        def wait(self) -> None:
            waited.append(True)

    work: Any = Work()
    readback = transfer.Readback(torch.ones(1), work)
    assert waited == []
    readback.read()
    assert waited == [True]


def test_a_constant_is_made_once_and_is_no_inference_tensor() -> None:
    transfer.constant.cache_clear()
    with torch.inference_mode():
        first = transfer.constant((1.0, 2.0), torch.float32, CPU)
    assert not first.is_inference()
    assert transfer.constant((1.0, 2.0), torch.float32, CPU) is first
    assert transfer.constant((1.0, 2.0), torch.float64, CPU).dtype == torch.float64
