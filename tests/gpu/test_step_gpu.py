"""A training step on a GPU: compiled, under bf16, with CUDA graphs; our convolutions there are torch's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import main
from networks.convolution import Conv2d, Conv3d
from tests import experiment, models
from utils.engine.network import autocast, compiled, place

pytestmark = pytest.mark.gpu
METHODS = {
    "tsn": {},
    "tsm": {},
    "slowonly": {},
    "slowfast": {"num_segments": 8, "alpha": 4},
    "tpn": {},
    "pptsn": {},
    "pptsm": {},
    "videomae": {"backbone": "vit3d", "depth": 2},
    "vjepa2": {"backbone": "vit3d", "depth": 2, "pooler_layers": 1},
}


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # inductor, for float32 without TF32
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_compiled_steps_give_the_losses_of_eager_ones(name: str, mode: bool | str) -> None:
    """Three SGD steps in fp32: compiled with and without CUDA graphs, against eager."""
    losses = []
    for setting in (False, mode):
        torch.manual_seed(0)
        options = {"type": name, "backbone": "resnet18", "num_class": 5, "num_segments": 4, "dropout": 0.0}
        device = torch.device("cuda", 0)
        built = models.build(**options | METHODS[name])
        net = place(built, device, "fp32")
        model = compiled(net, setting, device, print)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        frames = built.frames_per_clip
        clips = torch.randn(4, frames, 64, 64, 3, device=device).permute(0, 4, 1, 2, 3)
        mine = []
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            answer = model(clips)
            logits = answer if isinstance(answer, torch.Tensor) else answer.logits
            value = nn.functional.cross_entropy(logits, torch.arange(4, device=device))
            value.backward()
            optimizer.step()
            mine.append(value.item())
        losses.append(mine)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize("layer", [Conv2d(64, 512, 1), Conv3d(64, 8, (3, 1, 1), padding=(1, 0, 0)), Conv3d(8, 64, 1)])
def test_convolutions_are_torchs_own(layer: nn.Conv2d | nn.Conv3d) -> None:
    three = isinstance(layer, nn.Conv3d)
    layout = torch.channels_last_3d if three else torch.channels_last
    kind: Any = nn.Conv3d if three else nn.Conv2d
    torch_layer = kind(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
    torch_layer.load_state_dict(layer.state_dict())
    shape = (2, layer.in_channels, 4, 8, 8) if three else (2, layer.in_channels, 8, 8)
    x = torch.randn(shape, device="cuda").contiguous(memory_format=layout)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        torch.testing.assert_close(layer.cuda()(x), torch_layer.cuda()(x), rtol=0, atol=0)


def test_bf16_follows_fp32() -> None:
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    built = models.build(type="tsm", backbone="resnet18", num_class=5, num_segments=4)
    net = place(built, device, "bf16").eval()
    nn.init.normal_(built.classifier.weight, std=0.1)
    clips = torch.randn(2, 4, 64, 64, 3, device=device).permute(0, 4, 1, 2, 3)
    with torch.inference_mode():
        expected = net(clips)
        with autocast("bf16", device):
            got = net(clips)
    assert got.dtype == torch.float32  # the mean over the frames is computed in it
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_benchmark_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exp = experiment.make(tmp_path / "exp", tmp_path)
    for words in ((), ("--plain",), ("--amp", "bf16", "--compile")):
        assert main.main(["benchmark", "step", str(exp), "--json", "--iters", "2", *words]) == 0
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert figures["device"] != "cpu"
        assert figures["peak_memory_mb"] > 0
        assert 0 < figures["mfu"] < 1
