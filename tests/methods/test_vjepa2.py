"""V-JEPA 2: published sizes, closed forms. Logits beside transformers': tests/benchmarks/methods/vit.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from methods.macs import count_macs, count_parameters
from methods.vjepa2 import AttentivePooler
from tests import models
from utils.errors import UserError

# encoder, pooler, classifier of 174 classes
PARAMETERS = {
    "large": (303_885_312, 49_336_320, 178_350),
    "huge": (631_648_000, None, None),
    "giant": (1_012_173_952, 93_249_024, None),
}


def published(size: str) -> models.Model:
    with torch.device("meta"):
        return models.build(type="vjepa2", backbone=f"vit3d_{size}", num_class=174, num_segments=16)


def small(**options: Any) -> models.Model:
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": 2, "heads": 2, "patch": 4, "num_class": 5, "num_segments": 4, "dropout": 0.0}
    return models.build(**{"type": "vjepa2", "backbone": "vit3d", **sizes, **options}).double()


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters(size: str) -> None:
    model = published(size)
    counts = (count_parameters(part) for part in (model.backbone, model.pooler, model.classifier))
    for count, published_count in zip(counts, PARAMETERS[size], strict=True):
        assert published_count in (count, None)


def test_multiplications() -> None:
    macs = count_macs(published("large").backbone, (1, 3, 16, 256, 256))
    assert macs / 1e9 == pytest.approx(827.9, rel=0.01)


def test_query_is_not_normalised_and_attention_has_no_output_projection() -> None:
    """Values that are their bias alone, and an MLP that gives nothing: the query plus that bias is left."""
    torch.manual_seed(0)
    pooler = AttentivePooler(12, heads=3, layers=1, eps=1e-6).double()
    nn.init.zeros_(pooler.cross.norm1.weight)
    nn.init.normal_(pooler.cross.kv.bias)
    nn.init.zeros_(pooler.cross.mlp.fc2.weight)
    nn.init.constant_(pooler.query_tokens, 100.0)
    out = pooler(torch.randn(2, 7, 12).double())
    assert out.shape == (2, 12)
    torch.testing.assert_close(out, (100 + pooler.cross.kv.bias[12:]).expand(2, -1), rtol=1e-12, atol=1e-12)


def test_every_token_counts_and_their_order_does_not() -> None:
    pooler = AttentivePooler(12, heads=3, layers=2, eps=1e-6).double()
    tokens = torch.randn(1, 7, 12).double()
    torch.testing.assert_close(pooler(tokens), pooler(tokens.flip(1)), rtol=1e-10, atol=1e-12)
    changed = tokens.clone()
    changed[0, 6, 0] += 1
    assert not torch.allclose(pooler(tokens), pooler(changed))


def test_last_weights_of_a_branch_shrink_with_depth() -> None:
    pooler = AttentivePooler(48, heads=3, layers=3, eps=1e-6)
    spread = [float(block.mlp.fc2.weight.detach().std()) for block in [*pooler.blocks, pooler.cross]]
    assert spread == pytest.approx([0.0176 / math.sqrt(2 * i) for i in (1, 2, 3, 4)], rel=0.15)


def test_order_of_frames_counts() -> None:
    model = small().eval()
    x = torch.randn(1, 3, 8, 8, 8).double()
    frames = x.unflatten(2, (4, 2)).flip(2).flatten(2, 3)  # whole tubelets change places
    assert not torch.allclose(model(x), model(frames))


def test_options_that_change_no_tensor_are_named() -> None:
    model = small(eps=1e-5, head_eps=1e-4, pooler_heads=3)
    named = {k: v for module in model.modules() for k, v in getattr(module, "weight_options", {}).items()}
    assert named == {"eps": "1e-05", "heads": "2", "head_eps": "0.0001", "pooler_heads": "3"}
    assert small().pooler.weight_options["pooler_heads"] == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooler_heads": 5}, "pooler_heads is 5; it must divide the width 192"),
        ({"pooler_layers": -1}, "pooler_layers is -1"),
        ({"num_segments": 0}, "num_segments is 0"),
        ({"backbone": "resnet18"}, "resnet18 is not a network for clips"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    good = {"type": "vjepa2", "backbone": "vit3d", "num_class": 5, "num_segments": 4}
    with pytest.raises(UserError, match=message):
        models.build(**(good | options))
