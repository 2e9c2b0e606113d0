"""Non-local block against its definition, pair by pair, and where TSM puts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from methods._non_local import MODES, FramesNonLocal, NonLocal
from tests import models
from utils.errors import UserError


def reference(block: NonLocal, x: torch.Tensor) -> torch.Tensor:
    """Every pair of positions, straight from the definition."""

    def project(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, nn.Identity):
            return y
        assert isinstance(layer, nn.Conv3d)
        assert layer.bias is not None
        return torch.einsum("ncthw,oc->nothw", y, layer.weight[:, :, 0, 0, 0]) + layer.bias.view(1, -1, 1, 1, 1)

    def pool(y: torch.Tensor) -> torch.Tensor:
        height, width = y.shape[3] // 2, y.shape[4] // 2
        return y[..., : 2 * height, : 2 * width].unflatten(4, (width, 2)).unflatten(3, (height, 2)).amax((4, 6))

    theta = project(block.theta, x)
    phi, g = (
        project(layer, pool(x)) if block.pool_first else pool(project(layer, x)) for layer in (block.phi, block.g)
    )
    y = torch.zeros(x.shape[0], g.shape[1], *x.shape[2:], dtype=x.dtype)
    places = [(t, i, j) for t in range(phi.shape[2]) for i in range(phi.shape[3]) for j in range(phi.shape[4])]
    for n, t, i, j in torch.cartesian_prod(*(torch.arange(x.shape[k]) for k in (0, 2, 3, 4))).tolist():
        f = torch.stack([theta[n, :, t, i, j] @ phi[(n, slice(None), *place)] for place in places])
        if block.mode == "dot_product":
            f = f / len(places)
        else:
            f = torch.softmax(f / (theta.shape[1] ** 0.5 if block.scaled else 1.0), 0)
        y[n, :, t, i, j] = sum(f[k] * g[(n, slice(None), *place)] for k, place in enumerate(places))
    z = torch.einsum("ndthw,cd->ncthw", y, block.out.weight[:, :, 0, 0, 0])
    assert block.bn.running_mean is not None
    assert block.bn.running_var is not None
    scale = (block.bn.weight / (block.bn.running_var + block.bn.eps).sqrt()).view(1, -1, 1, 1, 1)
    return x + (z - block.bn.running_mean.view(1, -1, 1, 1, 1)) * scale + block.bn.bias.view(1, -1, 1, 1, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("scaled", "pool_first"), [(False, False), (True, True)])
@pytest.mark.parametrize("size", [(4, 4), (5, 3)])
def test_against_the_definition(mode: str, scaled: bool, pool_first: bool, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = NonLocal(8, mode, scaled=scaled, pool_first=pool_first).double().eval()
    assert block.bn.running_mean is not None
    for parameter in (*block.parameters(), block.bn.running_mean):
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 8, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), reference(block, x), rtol=1e-10, atol=1e-10)


def test_starts_as_the_identity() -> None:
    x = torch.randn(1, 8, 2, 4, 4)
    with torch.no_grad():
        assert torch.equal(NonLocal(8)(x), x)


def test_over_the_frames_of_a_2d_network() -> None:
    torch.manual_seed(0)
    block = FramesNonLocal(8, "embedded_gaussian", 3).eval()
    nn.init.ones_(block.bn.weight)
    x = torch.randn(6, 8, 4, 4)
    with torch.no_grad():
        clips = x.unflatten(0, (2, 3)).transpose(1, 2)
        expected = NonLocal.forward(block, clips).transpose(1, 2).flatten(0, 1)
        assert torch.equal(block(x), expected)


def build(**options: Any) -> models.Model:
    arguments = {"type": "tsm", "backbone": "resnet50", "num_class": 400, "num_segments": 8}
    return models.build(**(arguments | options))


@pytest.mark.parametrize(
    ("mode", "params"),
    [("embedded_gaussian", 31_682_000), ("dot_product", 31_682_000), ("gaussian", 28_007_888)],
)
def test_published_parameter_counts_of_tsm(mode: str, params: int) -> None:
    with torch.device("meta"):
        model = build(non_local=mode)
    assert sum(p.numel() for p in model.parameters()) == params
    assert len(model.state_dict()) == 320 + 5 * (12 if mode != "gaussian" else 8)


def test_places_in_tsm() -> None:
    with torch.device("meta"):
        model = build(non_local="embedded_gaussian", temporal_pool=True)
        without = build()
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, NonLocal)}
    expected = [f"backbone.layer2.{i}_non_local" for i in (0, 2)] + [
        f"backbone.layer3.{i}_non_local" for i in (0, 2, 4)
    ]
    assert list(blocks) == expected
    assert {block.num_segments for block in blocks.values()} == {4}
    assert set(without.state_dict()) < set(model.state_dict())


def test_tsm_with_non_local_starts_as_tsm() -> None:
    torch.manual_seed(0)
    options = {"backbone": "resnet18", "num_class": 5, "num_segments": 4}
    without, more = build(**options).eval(), build(**options, non_local="dot_product").eval()
    more.load_state_dict(without.state_dict(), strict=False)
    x = torch.randn(1, 3, 4, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(more(x), without(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"non_local": "cosine"}, "non_local is 'cosine'"),
        ({"backbone": "mobilenetv2", "non_local": "gaussian"}, "of ResNets"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)
