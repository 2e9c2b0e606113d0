"""VideoMAE: published sizes, closed forms. Logits beside transformers': tests/benchmarks/methods/vit.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.macs import count_macs, count_parameters
from tests import models
from utils.errors import UserError

PARAMETERS = {"small": 22_033_936, "base": 86_534_800, "large": 304_270_736, "huge": 632_119_440}
GMACS = {"small": 56.9, "base": 180.3, "large": 596.8}  # 16 x 224 x 224, Tong et al. 2022 and MMAction2


def published(size: str, **options: Any) -> models.Model:
    with torch.device("meta"):
        return models.build(type="videomae", backbone=f"vit3d_{size}", num_class=400, num_segments=16, **options)


def small(**options: Any) -> models.Model:
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": 2, "heads": 2, "patch": 4, "num_class": 5, "num_segments": 4, "dropout": 0.0}
    return models.build(**{"type": "videomae", "backbone": "vit3d", **sizes, **options}).double()


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters(size: str) -> None:
    assert count_parameters(published(size)) == PARAMETERS[size]


@pytest.mark.parametrize("size", GMACS)
def test_multiplications(size: str) -> None:
    assert count_macs(published(size), (1, 3, 16, 224, 224)) / 1e9 == pytest.approx(GMACS[size], rel=0.01)


def test_names_are_those_of_the_authors_file() -> None:
    """`modeling_finetune.py` with backbone. before, and classifier for head."""
    names = set(published("small").state_dict())
    block = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias"}
    block |= {"attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"}
    block |= {f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}
    rest = {"backbone.patch_embed.weight", "backbone.patch_embed.bias", "fc_norm.weight", "fc_norm.bias"}
    rest |= {"classifier.weight", "classifier.bias"}
    assert names == rest | {f"backbone.blocks.{n}.{name}" for n in range(12) for name in block}
    first = set(published("small", pooling="first").state_dict())
    assert first ^ names == {"fc_norm.weight", "fc_norm.bias", "backbone.norm.weight", "backbone.norm.bias"}


def test_head_pools_and_normalises() -> None:
    net, x = small(head_eps=0.5).eval(), torch.randn(2, 3, 4, 8, 8).double()
    mean = net.backbone(x).mean(1)
    centred = mean - mean.mean(1, keepdim=True)
    features = centred / (centred.square().mean(1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(net(x), net.classifier(features), rtol=1e-10, atol=1e-12)
    first = small(pooling="first").eval()
    assert torch.equal(first(x), first.classifier(first.backbone(x)[:, 0]))


def test_options_that_change_no_tensor_are_named() -> None:
    def named(**options: object) -> dict[str, str]:
        return {k: v for module in small(**options).modules() for k, v in getattr(module, "weight_options", {}).items()}

    assert named(eps=1e-12, head_eps=1e-5) == {"eps": "1e-12", "head_eps": "1e-05", "heads": "2", "pooling": "mean"}
    assert named(pooling="first") == {"eps": "1e-06", "heads": "2", "pooling": "first"}


def test_init_scale_is_a_factor_of_the_head() -> None:
    large, tiny = small().classifier.weight, small(init_scale=0.001).classifier.weight
    torch.testing.assert_close(tiny, large * 0.001)
    assert published("base").classifier.weight.shape == (400, 768)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet50"}, r"model.backbone: resnet50 is not a network for clips.*vit3d_small"),
        ({"type": "tsn", "backbone": "vit3d_small"}, r"vit3d_small is not a network for images.*resnet18"),
        ({"type": "slowonly", "backbone": "vit3d_small"}, "no 3D form of 'vit3d_small'"),
        ({"pooling": "max"}, "must be one of mean, first"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"freeze": 13}, "freeze is 13; there are 12 blocks"),
        ({"pretrained": True}, "no published weights are known for vit3d_small"),
        ({"drop_paht": 0.1}, "model.kwargs.drop_paht: .*did you mean drop_path"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    good = {"type": "videomae", "backbone": "vit3d_small", "num_class": 5, "num_segments": 4}
    with pytest.raises(UserError, match=message), torch.device("meta"):
        models.build(**(good | options))
