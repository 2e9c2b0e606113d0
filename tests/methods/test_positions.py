from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from methods.positions import PositionScores, window_means
from methods.slowfast import SlowFast
from methods.slowonly import SlowOnly
from tests import models


def test_windows_of_a_map() -> None:
    maps = torch.randn(2, 3, 4, 8, 9, dtype=torch.float64)
    means = window_means(maps, 7)
    assert means.shape == (2, 6, 3)
    expected = [maps[:, :, :, y : y + 7, x : x + 7].mean((2, 3, 4)) for y in range(2) for x in range(3)]
    assert torch.allclose(means, torch.stack(expected, 1), atol=1e-12)
    assert torch.allclose(window_means(maps[..., :5, :5], 7)[:, 0], maps[..., :5, :5].mean((2, 3, 4)), atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), [("slowonly", {}), ("slowfast", {"alpha": 2, "slow_first": False})])
def test_a_softmax_at_every_position(kind: str, options: dict) -> None:
    torch.manual_seed(0)
    net = models.build(type=kind, backbone="resnet18", num_class=6, num_segments=4, **options).double().eval()
    clips = torch.randn(2, 3, 4, 96, 96, dtype=torch.float64)  # a map of 3x3
    with torch.inference_mode():
        assert isinstance(net, SlowFast | SlowOnly)
        logits = net.window_logits(clips, 2)
        assert logits.shape == (2, 4, 6)
        scores = PositionScores(net, 2)(clips)
        # The classifier as a convolution over the maps gives the same numbers, and their mean is the plain answer.
        maps = net.backbone.maps(clips) if kind == "slowfast" else (net.backbone(clips),)
        pooled = torch.cat([F.avg_pool2d(m.mean(2), 2, stride=1) for m in reversed(maps)], 1)
        weight = net.classifier.weight[:, :, None, None]
        convolved = F.conv2d(pooled, weight, net.classifier.bias).flatten(2).transpose(1, 2)
        assert torch.allclose(logits, convolved, atol=1e-10)
        assert torch.allclose(scores.exp(), convolved.softmax(2).mean(1), atol=1e-12)
        assert torch.allclose(scores.softmax(1), scores.exp(), atol=1e-12), "probabilities are their own softmax"
        whole = F.conv2d(torch.cat([m.mean(2) for m in reversed(maps)], 1), weight, net.classifier.bias)
        assert torch.allclose(whole.mean((2, 3)), net(clips), atol=1e-10)
