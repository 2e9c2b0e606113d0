"""Class-activation maps against finite differences, and attention rollout against the matrices multiplied out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from methods import cam
from methods.probe import Probe
from tests import models
from utils.errors import UserError

STEP = 1e-6  # of a central difference in float64


class Toy(nn.Module):
    """Two convolutions and a classifier that is not linear in the map; smooth, so that differences converge."""

    def __init__(self, *, frames_as_batch: bool) -> None:
        super().__init__()
        self.frames_as_batch = frames_as_batch
        conv = nn.Conv2d if frames_as_batch else nn.Conv3d
        self.first, self.second = conv(3, 5, 3, padding=1), conv(5, 4, 3, stride=2, padding=1)
        self.classifier = nn.Linear(4, 3)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 3)."""
        x = clips.transpose(1, 2).flatten(0, 1) if self.frames_as_batch else clips
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        if self.frames_as_batch:
            x = x.unflatten(0, (len(clips), -1)).transpose(1, 2)
        return self.classifier((x + x**3).mean((2, 3, 4)))


def by_differences(net: nn.Module, clip: Tensor, number: int, layer: str) -> np.ndarray:
    """Grad-CAM from its definition, with no gradient: the mean gradient of channel k is the change of the logit when
    all Z places of it rise by a small step, divided by the step and by Z.
    """
    size: list[int] = []

    def logit(channel: int, step: float) -> tuple[float, Tensor]:
        kept: list[Tensor] = []

        def raise_channel(_: nn.Module, __: object, output: Tensor) -> Tensor:
            kept.append(output.clone())
            output = output.clone()
            output[:, channel] += step
            size[:] = [output[:, channel].numel()]
            return output

        handle = net.get_submodule(layer).register_forward_hook(raise_channel)
        with torch.no_grad():
            logit_of_number = float(net(clip)[0, number])
        handle.remove()
        return logit_of_number, kept[0]

    _, output = logit(0, 0.0)
    activation = output.transpose(0, 1) if output.dim() == 4 else output[0]  # (A, T', h, w)
    weights = [(logit(k, STEP)[0] - logit(k, -STEP)[0]) / (2 * STEP) / size[0] for k in range(len(activation))]
    return np.maximum(np.tensordot(weights, activation.numpy(), 1), 0)


def clip_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("frames_as_batch", [True, False])
@pytest.mark.parametrize("layer", ["first", "second"])
def test_grad_cam_is_its_definition(frames_as_batch: bool, layer: str) -> None:
    torch.manual_seed(0)
    net, clip = Toy(frames_as_batch=frames_as_batch).double().eval(), clip_of(1, 3, 4, 10, 8)
    class_maps = cam.grad_cam(net, clip, [0, 1, 2], layer)
    assert torch.equal(class_maps.logits, net(clip)[0].detach())
    assert float(class_maps.values.max()) > 0
    for number in range(3):
        expected = by_differences(net, clip, number, layer)
        np.testing.assert_allclose(class_maps.values[number].numpy(), expected, rtol=1e-6, atol=1e-9)


def by_one_difference(net: nn.Module, clip: Tensor, number: int, layer: str, cell: tuple[int, int, int]) -> float:
    """The same for one cell of a large network, from two passes: each channel rises by its own value in the cell, so
    the logit changes by the sum over the channels of Z * weight * value: Z times the map before its ReLU.
    """

    def logit(step: float) -> float:
        def rise(_: nn.Module, __: object, output: Tensor) -> Tensor:
            frames = output.dim() == 4
            places[:] = [output[:, 0].numel()]
            t, y, x = cell
            values = output[t, :, y, x] if frames else output[0, :, t, y, x]
            return output + step * values.reshape((1, -1, 1, 1) if frames else (1, -1, 1, 1, 1))

        handle = net.get_submodule(layer).register_forward_hook(rise)
        with torch.no_grad():
            logit_of_number = float(net(clip)[0, number])
        handle.remove()
        return logit_of_number

    places: list[int] = []
    change = logit(STEP) - logit(-STEP)
    return max(change / (2 * STEP) / places[0], 0.0)


@pytest.mark.parametrize(("kind", "options"), [("tsm", {}), ("slowonly", {}), ("slowfast", {"alpha": 2}), ("tpn", {})])
def test_grad_cam_of_the_methods_is_its_definition(kind: str, options: dict) -> None:
    torch.manual_seed(0)
    net = models.build(type=kind, backbone="resnet18", num_class=3, num_segments=4, **options)
    net, clip = net.double().eval(), clip_of(1, 3, 4, 32, 32)
    layer = cam.choose_layer(net, clip)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    class_map = cam.grad_cam(net, clip, [1], layer).values[0]
    assert min(class_map.shape[-2:]) == 4
    t, y, x = map(int, np.unravel_index(int(class_map.argmax()), class_map.shape))
    for cell in ((t, y, x), (0, 0, 0), (1, 2, 3)):
        expected = by_one_difference(net, clip, 1, layer, cell)
        np.testing.assert_allclose(float(class_map[cell]), expected, rtol=1e-3, atol=1e-4 * float(class_map.max()))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_layer_is_the_last_one_with_enough_cells() -> None:
    net = models.build(type="tsm", backbone="resnet18", num_class=3, num_segments=2).eval()
    for side, layer in ((224, "layer4"), (112, "layer4"), (56, "layer3"), (32, "layer2")):
        assert cam.choose_layer(net, torch.zeros(1, 3, 2, side, side)) == f"backbone.{layer}"


@pytest.mark.parametrize("backbone", ["mobilenetv2", "mobileone_s4", "densenet161"])
def test_small_and_dense_backbones_have_layers(backbone: str) -> None:
    net, clip = (
        models.build(type="tsn", backbone=backbone, num_class=3, num_segments=2).eval(),
        clip_of(1, 3, 2, 64, 64),
    )
    class_maps = cam.grad_cam(net, clip.float(), [0], cam.choose_layer(net, clip.float()))
    assert min(class_maps.values.shape[-2:]) == 4


def test_a_layer_without_a_map_is_refused() -> None:
    net, clip = Toy(frames_as_batch=False).eval(), torch.zeros(1, 3, 2, 8, 8)
    with pytest.raises(UserError, match="--cam-layer classifier: no map over frames"):
        cam.grad_cam(net, clip, [0], "classifier")
    with pytest.raises(UserError, match=r"--cam-layer secnd: no such layer \(did you mean second\?\)"):
        cam.grad_cam(net, clip, [0], "secnd")
    with pytest.raises(UserError, match="name a convolution's with --cam-layer"):
        cam.choose_layer(net, clip)


class Recorder(nn.Module):
    """Takes the place of the dropout on attention weights, and keeps them."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, weights: Tensor) -> Tensor:
        """(B, heads, N, N) -> the same."""
        self.kept.append(weights.detach().mean(1)[0])
        return weights


def transformer(kind: str, **options: Any) -> models.Model:
    torch.manual_seed(1)
    small: dict = {"width": 24, "depth": 3, "heads": 2, "patch": 8, "tubelet": 2}
    net = models.build(type=kind, backbone="vit3d", num_class=3, num_segments=4, dropout=0.0, **small | options)
    for parameter in net.parameters():  # far from uniform attention
        parameter.data.mul_(15) if parameter.dim() > 1 else parameter.data.normal_(0, 0.3)
    return net.double()


@pytest.mark.parametrize(("kind", "options"), [("videomae", {}), ("videomae", {"pooling": "first"}), ("vjepa2", {})])
def test_rollout_is_the_product_of_the_matrices(kind: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    net, clip = transformer(kind, **options), clip_of(1, 3, 4, 16, 24)
    monkeypatch.setattr(cam, "_ROWS", 5)
    shares, logits = cam.attention_rollout(net.eval(), clip)
    assert shares.shape == (2, 2, 3)
    assert torch.allclose(logits, net(clip)[0], rtol=1e-12)
    assert abs(float(shares.sum()) - 1) < 1e-12

    # The network's own path that drops attention weights shows each matrix as the network uses it.
    kept: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, cam.Attention):
            module.attention_drop = Recorder(kept)
    with torch.no_grad():
        net.train()(clip)
    product = torch.eye(12, dtype=torch.float64)
    for weights in kept:
        product = (0.5 * weights + 0.5 * torch.eye(12)) @ product
    assert len(kept) == (6 if kind == "vjepa2" else 3)
    reads = product.mean(0) if not options else product[0]
    if kind == "vjepa2":
        pooler = net.pooler
        with torch.no_grad():
            tokens = net.backbone(clip)
            for block in pooler.blocks:
                tokens = block(tokens)
            q, k, _ = pooler.cross.project(pooler.query_tokens, tokens)
            query = ((q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0, 0]
        reads = query @ product
    assert torch.allclose(shares.flatten(), reads, rtol=1e-9)
    assert float(reads.max() / reads.min()) > 1.1  # not the uniform map, which every error would pass


def test_rollout_of_a_probe_reads_its_best_head() -> None:
    net = transformer("probe", head="attentive", lr_mults=(1.0, 2.0)).eval()
    assert isinstance(net, Probe)
    net.choose(1)
    shares, logits = cam.attention_rollout(net, clip := clip_of(1, 3, 4, 16, 16))
    assert shares.shape == (2, 2, 2)
    assert torch.allclose(logits, net(clip)[0])


def test_upsampling_puts_a_cell_where_it_lies() -> None:
    values = torch.zeros(2, 4, 4)
    values[1, 2, 0] = 1
    large = cam.upsample(values, (8, 56, 56))
    t, y, x = np.unravel_index(int(large.argmax()), large.shape)
    assert (t // 4, y // 14, x // 14) == (1, 2, 0)
