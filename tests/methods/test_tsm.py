"""TSM: the shift against the authors' table and its own definition, where it stands, and what it can tell apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from methods import tsm
from methods.tsm import TemporalPool, TemporalShift, temporal_shift
from tests import golden, models
from utils.errors import UserError


def build(**options: Any) -> models.Model:
    torch.manual_seed(0)
    arguments = {"type": "tsm", "backbone": "resnet18", "num_class": 5, "num_segments": 4}
    return models.build(**(arguments | options))


def shifted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, TemporalShift)]


def reference_shift(x: torch.Tensor, t: int, div: int, *, direction: str) -> torch.Tensor:
    """Element by element, straight from the definition."""
    out = torch.zeros_like(x)
    fold = x.shape[1] // div
    for row in range(x.shape[0]):
        for c in range(x.shape[1]):
            step = (1 if c < fold else -1 if c < 2 * fold else 0) * (1 if direction == "tsm" else -1)
            if 0 <= row % t + step < t:
                out[row, c] = x[row + step, c]
    return out


def test_shift_equals_the_authors_table() -> None:
    for row in golden.rows("temporal_shift"):
        n, t, c = row["n"], row["t"], row["c"]
        x = torch.arange(n * t * c, dtype=torch.float32).view(n * t, c, 1, 1)
        assert temporal_shift(x, num_segments=t, shift_div=row["div"]).flatten().tolist() == row["tsm"]


def test_shift_on_a_ramp_in_time() -> None:
    """x[t] = t + 1: the first fold holds t + 2, the second t, the rest t + 1; vacated places are 0."""
    x = torch.arange(1.0, 5.0).view(4, 1, 1, 1).expand(4, 8, 1, 1)
    out = temporal_shift(x, num_segments=4, shift_div=8)[:, :, 0, 0]
    assert out[:, 0].tolist() == [2, 3, 4, 0]
    assert out[:, 1].tolist() == [0, 1, 2, 3]
    assert (out[:, 2:] == x[:, 2:, 0, 0]).all()


@pytest.mark.parametrize("direction", ["tsm", "paddle"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("t", "channels", "div"), [(1, 8, 8), (3, 10, 4), (4, 16, 16), (2, 9, 2)])
def test_shift_equals_its_definition(
    direction: str, memory_format: torch.memory_format, t: int, channels: int, div: int
) -> None:
    x = torch.randn(2 * t, channels, 3, 2).contiguous(memory_format=memory_format)
    kept = x.clone()
    out = temporal_shift(x, num_segments=t, shift_div=div, direction=direction)
    assert torch.equal(out, reference_shift(x, t, div, direction=direction))
    assert out.is_contiguous(memory_format=memory_format)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("direction", ["tsm", "paddle"])
def test_shift_gradients(direction: str) -> None:
    x = torch.randn(6, 8, 2, 2, dtype=torch.float64, requires_grad=True)

    def shift(value: torch.Tensor) -> torch.Tensor:
        return temporal_shift(value, num_segments=3, shift_div=4, direction=direction)

    assert torch.autograd.gradcheck(shift, (x,))
    assert torch.autograd.gradgradcheck(shift, (x,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_segments": 4}, "6 frames are not a multiple of num_segments = 4"),
        ({"num_segments": 3, "shift_div": 16}, "at most the 8 channels"),
        ({"num_segments": 3, "shift_div": 1}, "at least 2"),
        ({"num_segments": 3, "direction": "up"}, "must be one of"),
    ],
)
def test_shift_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        temporal_shift(torch.zeros(6, 8, 1, 1), **options)


@pytest.mark.parametrize(
    ("backbone", "options", "count"),
    [
        ("resnet18", {}, 8),
        ("resnet50", {}, 16),
        ("resnet101", {}, 18),
        ("resnet101", {"n_round": 1}, 33),
        ("mobilenetv2", {}, 10),
        ("mobileone_s4", {}, 42),  # every unit behind the stem
    ],
)
def test_number_of_shifts(backbone: str, options: dict, count: int) -> None:
    with torch.device("meta"):
        assert len(shifted_names(build(backbone=backbone, **options))) == count


def test_places_of_the_shifts() -> None:
    with torch.device("meta"):
        mobile = shifted_names(build(backbone="mobilenetv2"))
        deep = shifted_names(build(backbone="resnet101"))
    assert [int(name.split(".")[2]) for name in mobile] == [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]
    assert all(int(name.split(".")[2]) % 2 == 0 for name in deep)


def test_shift_feeds_the_branch_and_not_the_shortcut() -> None:
    block = build().backbone.layer1[0].eval()
    x = torch.randn(4, 64, 8, 8)
    with torch.no_grad():
        y = block.relu(block.bn1(block.conv1(reference_shift(x, 4, 8, direction="tsm"))))
        expected = block.relu(block.bn2(block.conv2(y)) + x)
        torch.testing.assert_close(block(x), expected)


def test_same_keys_and_parameters_as_tsn() -> None:
    for backbone in ("resnet50", "mobilenetv2"):
        with torch.device("meta"):
            tsm = build(backbone=backbone, num_class=400).state_dict()
            tsn = build(backbone=backbone, num_class=400, type="tsn").state_dict()
        assert {key: value.shape for key, value in tsm.items()} == {key: value.shape for key, value in tsn.items()}


def test_order_matters_to_tsm_and_not_to_tsn() -> None:
    x = torch.randn(1, 3, 4, 32, 32)
    tsm, tsn = build().double().eval(), build(type="tsn").double().eval()
    with torch.inference_mode():
        for model, tells_apart in ((tsm, True), (tsn, False)):
            forward, backward = model(x.double()), model(x.double().flip(2))
            assert torch.allclose(forward, backward, rtol=1e-9, atol=1e-12) != tells_apart


@pytest.mark.parametrize("frames", [4, 5, 8])
def test_temporal_pool(frames: int) -> None:
    model = build(temporal_pool=True, num_segments=frames).eval()
    half = (frames + 1) // 2
    assert [m.num_segments for m in model.modules() if isinstance(m, TemporalShift)] == [frames] * 2 + [half] * 6
    seen = []
    model.backbone.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with torch.no_grad():
        assert model(torch.randn(2, 3, frames, 32, 32)).shape == (2, 5)
    assert seen == [2 * half]
    assert set(model.state_dict()) == set(build().state_dict())


def test_temporal_pool_takes_the_maximum_of_three() -> None:
    x = torch.tensor([3.0, 1.0, 2.0, 9.0, 0.0]).view(5, 1, 1, 1)
    assert TemporalPool(5)(x).flatten().tolist() == [3.0, 9.0, 9.0]


def test_a_clip_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="5 frames, this TSM was built for num_segments = 4"):
        build()(torch.zeros(1, 3, 5, 32, 32))


def test_options_that_mobilenet_cannot_have() -> None:
    with pytest.raises(UserError, match="not on mobilenetv2"):
        build(backbone="mobilenetv2", temporal_pool=True)
    with pytest.raises(UserError, match="not on mobileone_s4"):
        build(backbone="mobileone_s4", temporal_pool=True)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer does that
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_compiles_to_one_graph() -> None:
    """No graph break at the hand-written gradient."""
    out = torch.compile(build().eval(), backend="eager", fullgraph=True)(torch.randn(1, 3, 4, 32, 32))
    assert out.shape == (1, 5)


@pytest.mark.parametrize("direction", ["tsm", "paddle"])
def test_the_form_for_tracing_is_the_same_shift(direction: str) -> None:
    x = torch.randn(6, 11, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    results = []
    for shift in (tsm._Shift.apply, tsm._shift_traced):
        clip = x.clone().requires_grad_()
        out = shift(clip, 3, 2, direction == "tsm")
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape))
        results.append((out, clip.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
