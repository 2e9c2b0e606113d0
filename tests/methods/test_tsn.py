"""TSN: consensus, dropout per frame or per clip, partial BN, any number of frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import models
from utils import draws
from utils.errors import UserError

K = 5


def build(**options: Any) -> models.Model:
    torch.manual_seed(0)
    arguments = {"type": "tsn", "backbone": "resnet18", "num_class": K, "num_segments": 3}
    return models.build(**(arguments | options))


def mean_of(norm: nn.BatchNorm2d) -> torch.Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def clips(frames: int = 3) -> torch.Tensor:
    return torch.randn(2, 3, frames, 32, 32, generator=torch.Generator().manual_seed(1))


def test_score_is_the_mean_over_frames_in_any_order() -> None:
    model = build().double().eval()
    x = clips().double()
    with torch.inference_mode():
        frames = torch.stack([model.classifier(model.backbone(x[:, :, t])) for t in range(3)])
        torch.testing.assert_close(model(x), frames.mean(0))
        torch.testing.assert_close(model(x.flip(2)), model(x))


def test_more_frames_at_evaluation() -> None:
    model = build().eval()
    with torch.inference_mode():
        assert model(clips(frames=7)).shape == (2, K)


def test_both_orders_of_consensus_agree_in_evaluation_only() -> None:
    logits, features = build(consensus="logits").double(), build(consensus="features").double()
    x = clips().double()
    with torch.no_grad():
        torch.manual_seed(3)
        first = logits(x)
        torch.manual_seed(3)
        assert not torch.allclose(first, features(x))
        logits.eval()
        features.eval()
        features.load_state_dict(logits.state_dict())
        torch.testing.assert_close(logits(x), features(x))


@pytest.mark.parametrize(("consensus", "rows"), [("logits", (2, 3, 512)), ("features", (2, 512))])
def test_dropout_draws_per_frame_or_per_clip(consensus: str, rows: tuple[int, ...]) -> None:
    model = build(consensus=consensus)
    seen = []
    model.dropout.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    with draws.rng_scope(seed=1, step=0, shards=(0, 1), rows_per_shard=1):
        first = model(clips())
    with draws.rng_scope(seed=1, step=0, shards=(0, 1), rows_per_shard=1):
        assert torch.equal(first, model(clips()))
    assert seen == [rows, rows]


def test_no_dropout_layer_for_zero() -> None:
    assert isinstance(build(dropout=0).dropout, nn.Identity)
    assert build(dropout=0.8).dropout.p == 0.8


def test_classifier_initialisation() -> None:
    for std in (0.001, 0.01):
        classifier = build(fc_std=std, num_class=400).classifier
        assert classifier.weight.std().item() == pytest.approx(std, rel=0.02)
        assert not classifier.bias.any()
    assert build(num_class=400).classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)


def test_partial_bn_freezes_all_but_the_first() -> None:
    model = build(partial_bn=True)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [mean_of(norm).clone() for norm in norms]
    model.eval()
    model.train()
    model(clips()).sum().backward()
    assert not torch.equal(mean_of(norms[0]), before[0])
    assert norms[0].weight.grad is not None
    for norm, mean in zip(norms[1:], before[1:], strict=True):
        assert torch.equal(mean_of(norm), mean)
        assert norm.weight.grad is None
        assert norm.bias.grad is None
    assert all(norm.weight.requires_grad for norm in build().modules() if isinstance(norm, nn.BatchNorm2d))


def test_half_precision_scores_are_averaged_in_float32() -> None:
    model = build().eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(clips()).dtype == torch.float32


def test_frames_are_a_view_of_the_permuted_clip() -> None:
    """The training path's memory order reaches the first convolution as channels_last without a copy."""
    model = build().eval()
    x = torch.randn(2, 3, 32, 32, 3).permute(0, 4, 1, 2, 3)  # (B, T, H, W, C) in memory
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    assert seen[0].data_ptr() == x.data_ptr()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in build(backbone=name, num_class=400).parameters())
            for name in ("resnet50", "resnet101", "mobilenetv2")
        }
    assert counts == {"resnet50": 24_327_632, "resnet101": 43_319_760, "mobilenetv2": 2_736_272}


def test_unknown_consensus() -> None:
    with pytest.raises(UserError, match="consensus is 'max'"):
        build(consensus="max")


@pytest.mark.parametrize("method", ["tsn", "tsm"])
def test_norm_eval_keeps_the_statistics_and_trains_scale_and_shift(method: str) -> None:
    """MMAction2's norm_eval: in training the network answers as in evaluation, and all its parameters learn."""
    torch.manual_seed(0)
    model = models.build(type=method, backbone="resnet18", num_class=5, num_segments=3, dropout=0, norm_eval=True)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        mean_of(norm).normal_()
    before = [mean_of(norm).clone() for norm in norms]
    model.eval()
    with torch.no_grad():
        expected = model(clips())
    model.train()
    outputs = model(clips())
    torch.testing.assert_close(outputs, expected)
    outputs.sum().backward()
    for norm, mean in zip(norms, before, strict=True):
        assert torch.equal(mean_of(norm), mean)
        assert norm.weight.grad is not None
    assert model.classifier.training
