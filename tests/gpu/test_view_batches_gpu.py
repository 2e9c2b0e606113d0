"""Views at once on a GPU: found from its memory, halved when it runs out, the same scores."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils import view_batches

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device("cuda", 0)  # set_per_process_memory_fraction takes no device without a number


def test_memory_decides_and_running_out_of_it_does_not_stop(device: torch.device) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv3d(64, 8, 1)).to(device).eval()
    views = torch.randint(0, 256, (32, 8, 64, 64, 3), dtype=torch.uint8, device=device)

    def forward(clips: torch.Tensor) -> torch.Tensor:
        return net(clips.permute(0, 4, 1, 2, 3).float() / 255).mean((2, 3, 4))

    messages: list[str] = []
    with torch.inference_mode():
        expected = torch.cat([forward(view[None]) for view in views])
        free = view_batches.ViewBatcher(forward, device, say=messages.append)
        assert torch.allclose(free.run(lambda start, stop: views[start:stop], 32), expected, atol=1e-3)
        assert free.size == 32
        assert messages == []
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        used = torch.cuda.memory_reserved(device)
        try:  # a view takes some 24 MiB here, 32 views 750
            torch.cuda.set_per_process_memory_fraction((used + 300 * 2**20) / total, device)
            tight = view_batches.ViewBatcher(forward, device, size=32, say=messages.append)
            scores = tight.run(lambda start, stop: views[start:stop], 32)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert torch.allclose(scores, expected, atol=1e-3)
    assert tight.size < 32
    assert messages
    assert "memory ran out with 32 views at once" in messages[0]
