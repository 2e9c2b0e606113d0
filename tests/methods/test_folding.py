from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import methods
from methods import folding

MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("tsn", "resnet18", {}),
    ("tsn", "mobilenetv2", {}),
    ("tsm", "resnet50", {"non_local": "dot_product"}),
    ("pptsn", "resnet18_vd", {}),
    ("pptsm", "resnet18_vd", {}),
    ("slowonly", "resnet18", {"zero_init_residual": False}),
    ("slowfast", "resnet18", {"alpha": 2, "lateral_norm": True, "zero_init_residual": False}),
    ("tpn", "resnet18", {"zero_init_residual": False}),
    ("tpn", "resnet18", {"base": "tsm"}),
]


def trained(kind: str, backbone: str, options: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A network whose BN layers have statistics, scales and shifts of their own."""
    torch.manual_seed(0)
    net = methods.build(type=kind, backbone=backbone, num_class=5, num_segments=4, **options).to(dtype)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return net.eval()


@pytest.mark.parametrize(("kind", "backbone", "options"), MODELS)
def test_folding_changes_no_answer(kind: str, backbone: str, options: dict[str, Any]) -> None:
    net = trained(kind, backbone, options, torch.float64)
    clips = torch.randn(2, 3, 4, 48, 48, dtype=torch.float64)
    with torch.inference_mode():
        before = net(clips)
        norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
        count = folding.fold(net)
        after = net(clips)
    left = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    assert left == norms - count
    assert left <= (5 if options.get("non_local") else 0), "only the non-local blocks' own norms stay"
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()


def test_float32_and_memory_format() -> None:
    net = trained("slowonly", "resnet18", {"zero_init_residual": False}, torch.float32)
    for parameter in net.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    clips = torch.randn(2, 3, 4, 48, 48)
    with torch.inference_mode():
        before = net(clips)
        assert folding.fold(net) == 20
        after = net(clips)
    assert (after.softmax(1) - before.softmax(1)).abs().max() <= 1e-5
    kernel = net.get_submodule("backbone.layer1.0.conv1").weight
    assert isinstance(kernel, nn.Parameter)
    assert kernel.is_contiguous(memory_format=torch.channels_last_3d)


class ReadTwice(nn.Module):
    """The output of conv1 is used beside bn1: folding would be wrong here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.fc = nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.Linear(8, 4)
        nn.init.uniform_(self.bn1.weight, 0.2, 3)
        nn.init.normal_(self.bn1.bias)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) -> (B, 4)."""
        maps = self.conv1(clips)
        return self.fc((maps + self.bn1(maps)).mean((2, 3, 4)))


def test_an_evaluation_keeps_a_network_that_cannot_be_folded(capsys: pytest.CaptureFixture[str]) -> None:
    from anal_tools.evaluate.network import fold_bn

    torch.manual_seed(1)
    net, untouched = ReadTwice().eval(), ReadTwice().eval()
    assert fold_bn(net, (1, 3, 4, 16, 16), lambda: untouched) is untouched
    assert "the network stays as it was trained" in capsys.readouterr().out
    good = trained("tsn", "resnet18", {}, torch.float32)
    assert fold_bn(good, (1, 3, 4, 32, 32), ReadTwice) is good
    assert not any(isinstance(module, nn.BatchNorm2d) for module in good.modules())
