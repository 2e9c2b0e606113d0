"""Parameter groups, multipliers that act, clipping, and a resumed optimiser."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import methods
from utils import optim
from utils.errors import UserError

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


def groups(model: nn.Module, **options: Any) -> dict[str, tuple[float, float, set[str]]]:
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

    def steps(model: nn.Module, sgd: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            sgd.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            sgd.step()

    model = Small().double()
    sgd = optim.build(model, **COMMON, policy=True)
    steps(model, sgd, 2)
    contiguous: Any = copy.deepcopy(model)  # torch does not declare `memory_format` alone
    other = contiguous.to(memory_format=torch.channels_last)
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
    by_group = {g["name"]: (g["lr"] / lr, g["weight_decay"] / COMMON["weight_decay"]) for g in sgd.param_groups}
    assert by_group["first conv weight"] == pytest.approx((1, 1))
    assert by_group["bn"] == pytest.approx((1, 0))
    assert lr == pytest.approx(0.0002)
    if method == "tsn":
        assert by_group["bias"] == pytest.approx((2, 0))
        assert "classifier weight" not in by_group
    else:
        assert by_group["classifier weight"] == pytest.approx((5, 1))
        assert by_group["classifier bias"] == pytest.approx((10, 0))


# ---------------------------------------------------------------- AdamW


def transformer(width: int, depth: int, classes: int) -> Any:
    """A small VideoMAE."""
    options = {"width": width, "depth": depth, "heads": 2, "mlp_ratio": 4.0, "dropout": 0.0}
    return methods.build(type="videomae", backbone="vit3d", num_class=classes, num_segments=4, **options)


RECIPE = {"type": "adamw", "lr": 1e-3, "weight_decay": 0.05}

# VideoMAE ViT-B on 400 classes, layer decay .75: layer -> rate / base rate, parameters with decay .05, and without.
# From run_class_finetuning.py and optim_factory.py: .75 ** (13 - layer); 1-D parameters and biases do not decay.
VIDEOMAE_B = {
    0: (0.023757264018058777, 1_179_648, 768),
    1: (0.03167635202407837, 7_077_888, 9_216),
    2: (0.04223513603210449, 7_077_888, 9_216),
    3: (0.056313514709472656, 7_077_888, 9_216),
    4: (0.07508468627929688, 7_077_888, 9_216),
    5: (0.1001129150390625, 7_077_888, 9_216),
    6: (0.13348388671875, 7_077_888, 9_216),
    7: (0.177978515625, 7_077_888, 9_216),
    8: (0.2373046875, 7_077_888, 9_216),
    9: (0.31640625, 7_077_888, 9_216),
    10: (0.421875, 7_077_888, 9_216),
    11: (0.5625, 7_077_888, 9_216),
    12: (0.75, 7_077_888, 9_216),
    13: (1.0, 307_200, 1_936),
}


def test_the_groups_of_videomae_base_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = methods.build(type="videomae", backbone="vit3d_base", num_class=400, num_segments=16)
    adamw = optim.build(model, **RECIPE, layer_decay=0.75)
    by_layer: dict[int, dict[float, tuple[float, int]]] = {}
    for group in adamw.param_groups:
        layer = int(group["name"].rpartition(" ")[2])
        count = sum(parameter.numel() for parameter in group["params"])
        by_layer.setdefault(layer, {})[group["weight_decay"]] = (group["lr"] / 1e-3, count)
    assert by_layer == {
        layer: {0.05: (pytest.approx(rate, rel=1e-12), decayed), 0.0: (pytest.approx(rate, rel=1e-12), undecayed)}
        for layer, (rate, decayed, undecayed) in VIDEOMAE_B.items()
    }
    assert sum(decayed + undecayed for _, decayed, undecayed in VIDEOMAE_B.values()) == 86_534_800

    optim.set_lr(adamw, 0.5)
    rates = {int(group["name"].rpartition(" ")[2]): group["lr"] for group in adamw.param_groups}
    assert rates == {layer: pytest.approx(0.5 * rate) for layer, (rate, *_) in VIDEOMAE_B.items()}


def test_positions_belong_to_the_patches_and_do_not_decay() -> None:
    model = transformer(8, 2, 5)
    model.backbone.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
    adamw = optim.build(model, **RECIPE, layer_decay=0.5)
    (group,) = [g for g in adamw.param_groups if any(p is model.backbone.pos_embed for p in g["params"])]
    assert (group["name"], group["weight_decay"]) == ("bias and norm, layer 0", 0.0)
    assert group["lr_mult"] == 0.5**3


def test_frozen_blocks_are_in_no_group() -> None:
    model = transformer(8, 3, 5)
    model.backbone.blocks[0].requires_grad_(False)
    names = {group["name"] for group in optim.build(model, **RECIPE, layer_decay=0.75).param_groups}
    assert names == {f"{kind}, layer {layer}" for kind in ("weight", "bias and norm") for layer in (0, 2, 3, 4)}


def test_layer_decay_multiplies_the_groups_of_sgd() -> None:
    groups_now = optim.build(transformer(8, 1, 5), lr=0.1, policy=True, layer_decay=0.5).param_groups
    assert {g["name"]: g["lr_mult"] for g in groups_now}["bias, layer 1"] == 2.0 * 0.5


def test_a_network_without_blocks_has_no_layers_to_decay_over() -> None:
    with pytest.raises(UserError, match="common.optimizer.layer_decay: this network is not a transformer"):
        optim.build(Small(), **RECIPE, layer_decay=0.75)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_adamw_steps_as_torchs_loop_does(layout: torch.memory_format) -> None:
    """Five steps in fp64, the rate changed in each, over groups with and without decay; ours is one kernel."""
    torch.manual_seed(0)
    model, x = transformer(8, 2, 5).double(), torch.randn(3, 3, 4, 32, 32, dtype=torch.float64)
    model.backbone.patch_embed.to(memory_format=layout)
    twin = copy.deepcopy(model)
    ours = optim.build(model, **RECIPE, layer_decay=0.75, betas=(0.8, 0.99), eps=1e-6)
    paired = dict(zip(model.parameters(), twin.parameters(), strict=True))
    theirs = torch.optim.AdamW(
        [{**g, "params": [paired[p] for p in g["params"]], "fused": None} for g in ours.param_groups],
        betas=(0.8, 0.99),
        eps=1e-6,
    )
    for step in range(5):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optim.set_lr(optimizer, 1e-2 / (1 + step))
            optimizer.zero_grad(set_to_none=True)
            net(x).square().mean().backward()
            optimizer.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


def test_adamw_takes_gradients_of_another_memory_format() -> None:
    torch.manual_seed(0)
    weights, gradient = torch.randn(6, 4, 3, 5, dtype=torch.float64), torch.randn(6, 4, 3, 5, dtype=torch.float64)
    steps = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Conv2d(4, 6, (3, 5), bias=False).double()
        model.weight.data = weights.clone()
        optimizer = optim.build(model, **RECIPE)
        for _ in range(2):
            model.weight.grad = gradient.clone(memory_format=layout)
            optimizer.step()
        steps.append(model.weight.detach())
    assert torch.equal(*steps)


def test_one_step_of_adamw_by_hand() -> None:
    """p <- p (1 - lr mult wd) - lr mult g / (|g| + eps): the first step, whose averages are unbiased."""
    torch.manual_seed(0)
    model = transformer(8, 1, 5).double()
    adamw = optim.build(model, **RECIPE, layer_decay=0.5)
    before = copy.deepcopy(dict(model.named_parameters()))
    model(torch.randn(2, 3, 2, 16, 16, dtype=torch.float64)).square().sum().backward()
    adamw.step()
    for name, mult, decay in [
        ("classifier.weight", 1.0, 0.05),
        ("fc_norm.weight", 1.0, 0.0),
        ("backbone.blocks.0.mlp.fc1.weight", 0.5, 0.05),
        ("backbone.blocks.0.attn.q_bias", 0.5, 0.0),
        ("backbone.patch_embed.weight", 0.25, 0.05),
    ]:
        p, old = model.get_parameter(name), before[name].detach()
        assert p.grad is not None
        expected = old * (1 - 1e-3 * mult * decay) - 1e-3 * mult * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


def test_adamw_resumes_exactly_in_another_memory_format() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            optimizer.step()

    model = transformer(8, 2, 5).double()
    adamw = optim.build(model, **RECIPE, layer_decay=0.75)
    steps(model, adamw, 2)
    saved = copy.deepcopy(adamw.state_dict())
    for group in saved["param_groups"]:
        group["fused"] = None  # as written before AdamW was one kernel on the CPU, too
    other = copy.deepcopy(model)
    other.backbone.patch_embed.to(memory_format=torch.channels_last_3d)
    resumed = optim.build(other, **RECIPE, layer_decay=0.75)
    resumed.load_state_dict(saved)
    assert all(group["fused"] for group in resumed.param_groups)
    for parameter, state in resumed.state.items():
        assert state["exp_avg"].stride() == state["exp_avg_sq"].stride() == parameter.stride()
        assert state["step"].item() == 2
    steps(model, adamw, 2)
    steps(other, resumed, 2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
