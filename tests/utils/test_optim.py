"""Parameter groups, multipliers that act, clipping, and a resumed optimiser."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import methods
from utils import optim

COMMON = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}


class GroupNormLike(nn.BatchNorm2d):
    """Stands for utils.sync_bn's layer: any subclass of BatchNorm counts as one."""


class Small(nn.Module):
    fc_lr5 = True

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = GroupNormLike(4)
        self.deep = nn.Conv1d(4, 4, 1)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x)).flatten(2)  # (N, C, H, W) -> (N, C, H*W)
        return self.classifier(self.deep(x).mean(2))


def groups(model: nn.Module, **options: object) -> dict[str, tuple[float, float, set[str]]]:
    """{group: (lr multiplier, weight decay, names of its parameters)}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    sgd = optim.build(model, **COMMON, **options)
    return {g["name"]: (g["lr_mult"], g["weight_decay"], {names[p] for p in g["params"]}) for g in sgd.param_groups}


def test_plain() -> None:
    model = Small()
    assert groups(model) == {"all": (1.0, 1e-2, {name for name, _ in model.named_parameters()})}


def test_no_wd() -> None:
    assert groups(Small(), no_wd=True) == {
        "weight": (1.0, 1e-2, {"conv.weight", "deep.weight", "classifier.weight"}),
        "bias and bn": (1.0, 0.0, {"conv.bias", "bn.weight", "bn.bias", "deep.bias", "classifier.bias"}),
    }
    assert groups(Small(), no_wd=True, policy=True) == groups(Small(), no_wd=True)


def test_policy() -> None:
    expected = {
        "first conv weight": (1.0, 1e-2, {"conv.weight"}),
        "first conv bias": (2.0, 0.0, {"conv.bias"}),
        "weight": (1.0, 1e-2, {"deep.weight"}),
        "bias": (2.0, 0.0, {"deep.bias"}),
        "bn": (1.0, 0.0, {"bn.weight", "bn.bias"}),
        "classifier weight": (5.0, 1e-2, {"classifier.weight"}),
        "classifier bias": (10.0, 0.0, {"classifier.bias"}),
    }
    assert groups(Small(), policy=True) == expected
    without = groups(Small(), policy=True, fc_lr5=False)
    assert without["weight"][2] == {"deep.weight", "classifier.weight"}
    assert without["bias"] == (2.0, 0.0, {"deep.bias", "classifier.bias"})
    assert "classifier weight" not in without


def test_tsm_trains_its_classifier_faster_and_tsn_does_not() -> None:
    for method, faster in (("tsm", True), ("tsn", False)):
        with torch.device("meta"):
            model = methods.build(type=method, backbone="resnet18", num_class=5, num_segments=4)
        assert ("classifier weight" in groups(model, policy=True)) == faster


@pytest.mark.parametrize("options", [{}, {"no_wd": True}, {"policy": True}])
@pytest.mark.parametrize("backbone", ["resnet50", "mobilenetv2"])
def test_every_parameter_is_in_one_group(options: dict, backbone: str) -> None:
    with torch.device("meta"):
        model = methods.build(type="tsn", backbone=backbone, num_class=5, num_segments=4, partial_bn=True)
    listed = [p for g in optim.build(model, **COMMON, **options).param_groups for p in g["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {p for p in model.parameters() if p.requires_grad}


def test_multipliers_act() -> None:
    """One step by hand: p <- p - lr*mult * (1 + momentum) * (g + wd*mult * p), the first step of Nesterov SGD."""
    model = Small()
    sgd = optim.build(model, **COMMON, policy=True)
    optim.set_lr(sgd, 0.05)
    assert {g["name"]: g["lr"] for g in sgd.param_groups}["classifier bias"] == pytest.approx(0.5)
    before = copy.deepcopy(dict(model.named_parameters()))
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    sgd.step()
    for name, lr_mult, decay_mult in [("conv.weight", 1, 1), ("conv.bias", 2, 0), ("bn.weight", 1, 0)] + [
        ("classifier.weight", 5, 1),
        ("classifier.bias", 10, 0),
    ]:
        p, old = model.get_parameter(name), before[name].detach()
        assert p.grad is not None
        expected = old - 0.05 * lr_mult * 1.9 * (p.grad + 1e-2 * decay_mult * old)
        torch.testing.assert_close(p.detach(), expected)


def test_clipping_limits_the_common_norm() -> None:
    model = Small()
    sgd = optim.build(model, **COMMON)
    model(torch.randn(2, 3, 8, 8)).sum().mul(1e3).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    before = torch.cat([g.flatten() for g in gradients]).norm()
    assert optim.clip(sgd, 1.5).item() == pytest.approx(before.item(), rel=1e-4)
    assert torch.cat([g.flatten() for g in gradients]).norm().item() == pytest.approx(1.5, rel=1e-4)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_apply_with_a_loss_scale_is_the_same_step(max_norm: float | None) -> None:
    torch.manual_seed(0)
    first, x = Small(), torch.randn(2, 3, 8, 8)
    second = copy.deepcopy(first)
    for model, enabled in ((first, False), (second, True)):
        sgd = optim.build(model, **COMMON)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
        scaler.scale(model(x).square().sum()).backward()
        optim.apply(sgd, scaler, max_norm=max_norm)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("enabled", [False, True])
def test_measuring_the_norm_changes_no_bit(enabled: bool) -> None:
    torch.manual_seed(0)
    first, x = Small(), torch.randn(2, 3, 8, 8)
    second = copy.deepcopy(first)
    norms = []
    for model, measure in ((first, False), (second, True)):
        sgd = optim.build(model, **COMMON)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
        scaler.scale(model(x).square().sum()).backward()
        scale = scaler.get_scale() if enabled else 1.0
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm() / scale
        norms.append(optim.apply(sgd, scaler, measure=measure))
    assert norms[0] is None
    assert norms[1].item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))


def test_resume_goes_on_exactly_and_keeps_the_memory_format() -> None:
    """Momentum saved from a contiguous model, loaded for a channels-last one."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def steps(model: nn.Module, sgd: torch.optim.SGD, count: int) -> None:
        for _ in range(count):
            sgd.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            sgd.step()

    model = Small().double()
    sgd = optim.build(model, **COMMON, policy=True)
    steps(model, sgd, 2)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    resumed = optim.build(other, **COMMON, policy=True)
    resumed.load_state_dict(copy.deepcopy(sgd.state_dict()))
    for parameter, state in resumed.state.items():
        assert state["momentum_buffer"].stride() == parameter.stride()
    steps(model, sgd, 2)
    steps(other, resumed, 2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="no parameter"):
        optim.build(Small().requires_grad_(False), **COMMON)


def test_no_wd_on_batch_norm_only() -> None:
    """PySlowFast: BN.WEIGHT_DECAY 0; biases keep their decay."""
    assert groups(Small(), no_wd="bn") == {
        "weight and bias": (
            1.0,
            1e-2,
            {"conv.weight", "conv.bias", "deep.weight", "deep.bias", "classifier.weight", "classifier.bias"},
        ),
        "bn": (1.0, 0.0, {"bn.weight", "bn.bias"}),
    }


def test_two_models_share_the_groups() -> None:
    """Mutual learning: the first convolution and the classifier of each are what they are."""
    first, second = Small(), Small()
    sgd = optim.build(first, second, **COMMON, policy=True)
    sizes = {group["name"]: len(group["params"]) for group in sgd.param_groups}
    assert (sizes["first conv weight"], sizes["classifier bias"], sizes["bn"]) == (2, 2, 4)


@pytest.mark.parametrize("method", ["tsm", "tsn", "pptsm", "pptsn"])
def test_policy_multiplies_the_rate_of_the_schedule_on_the_published_networks(method: str) -> None:
    """RGB: first convolution x1, biases x2 and BN x1 without decay; classifier x5, x10 where the recipe says."""
    from utils.lr_schedule import lr_at

    backbone = "resnet18" if method.startswith("ts") else "resnet50_vd"
    with torch.device("meta"):
        model = methods.build(type=method, backbone=backbone, num_class=5, num_segments=4)
    sgd = optim.build(model, **COMMON, policy=True)
    lr = lr_at(50, type="STEP", base_lr=0.02, max_iter=100, lr_steps=[20, 40], lr_mults=[0.1, 0.1])
    optim.set_lr(sgd, lr)
    found = {g["name"]: (g["lr"] / lr, g["weight_decay"] / COMMON["weight_decay"]) for g in sgd.param_groups}
    assert found["first conv weight"] == pytest.approx((1, 1))
    assert found["bn"] == pytest.approx((1, 0))
    assert lr == pytest.approx(0.0002)
    if method == "tsn":
        assert found["bias"] == pytest.approx((2, 0))
        assert "classifier weight" not in found
    else:
        assert found["classifier weight"] == pytest.approx((5, 1))
        assert found["classifier bias"] == pytest.approx((10, 0))
