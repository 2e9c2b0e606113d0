"""What every file in methods/ keeps. New files are found by themselves and need no line here."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import methods
from methods._output import Output
from networks import BACKBONES
from tests import models
from utils import draws
from utils.config import model_options
from utils.engine.network import place
from utils.errors import UserError

FOLDER = Path(methods.__file__).parent
NO_MODELS = ("cam", "fetch", "macs", "folding", "positions")  # maps, a verb, a counter, two ways to evaluate a model
FILES = sorted(file.stem for file in FOLDER.glob("[!_]*.py") if file.stem not in NO_MODELS)
COMMON = {"backbone", "num_class", "num_segments", "dropout", "pretrained"}
T, K = 4, 7


@pytest.fixture(scope="module", params=FILES)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def backbone_of(method: str) -> str:
    """A small network of the kind that the method takes."""
    for name in ("resnet18", "vit3d"):
        with contextlib.suppress(UserError), torch.device("meta"):
            models.build(type=method, backbone=name, num_class=K, num_segments=T)
            return name
    raise AssertionError(f"{method} takes none of the small networks")


def small(method: str, **options: Any) -> models.Model:
    torch.manual_seed(0)
    return models.build(type=method, backbone=backbone_of(method), num_class=K, num_segments=T, **options)


def clips() -> torch.Tensor:
    return torch.randn(2, 3, T, 64, 64, generator=torch.Generator().manual_seed(1))


def losses_of(answer: torch.Tensor | Output) -> torch.Tensor:
    outputs = [answer.logits, answer.aux] if isinstance(answer, Output) else [answer]
    return sum((nn.functional.cross_entropy(logits, torch.tensor([1, 2])) for logits in outputs), torch.zeros(()))


def test_files_are_the_types(method: str) -> None:
    assert method in methods.names(), f"methods/{method}.py has no build()"
    assert "fetch" not in methods.names()


def test_signature_and_docstring(method: str) -> None:
    function = importlib.import_module(f"methods.{method}").build
    parameters = inspect.signature(function).parameters
    assert set(parameters) >= COMMON
    assert "arXiv" in (function.__doc__ or ""), "the docstring of build() names the paper"
    for name, parameter in parameters.items():
        assert parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
        if name not in COMMON and parameter.kind is parameter.KEYWORD_ONLY:
            assert parameter.default is not parameter.empty, f"option {name} has no default"
            assert f"{name}:" in function.__doc__ or f"{name}," in function.__doc__, f"option {name} is not documented"


def test_knows_no_config(method: str) -> None:
    text = (FOLDER / f"{method}.py").read_text(encoding="utf-8")
    assert "utils.config" not in text
    assert "cfg" not in text


def test_clips_become_logits_and_gradients_reach_every_parameter(method: str) -> None:
    model = small(method)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and not norm.weight.any():
            nn.init.ones_(norm.weight)  # a branch whose last scale starts at zero hides what is before it
    answer = model(clips())
    outputs = [answer.logits, answer.aux] if isinstance(answer, Output) else [answer]
    for logits in outputs:
        assert logits.shape == (2, K)
        assert logits.dtype == torch.float32
    losses_of(answer).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"no gradient reaches {name}"
            assert parameter.grad.abs().sum() > 0, f"the gradient of {name} is zero"


def test_gradients_lie_in_memory_as_the_weights_do(method: str) -> None:
    """Data parallel training averages both in one buffer: other strides cost a copy a step, and PyTorch warns."""
    network = "resnet50" if backbone_of(method) == "resnet18" else backbone_of(method)
    net = models.build(type=method, backbone=network, num_class=K, num_segments=T)
    net = place(net, torch.device("cpu"), "fp32")
    other = set()
    for name, parameter in ((name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad):
        # At the hook: what autograd keeps in `grad` has been put in order by then.
        parameter.register_hook(
            lambda grad, name=name, strides=parameter.stride(): other.add(name) if grad.stride() != strides else None
        )
    losses_of(net(clips().permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3))).backward()
    assert not other


def test_attributes(method: str) -> None:
    model = small(method)
    assert isinstance(model.classifier, nn.Linear)
    assert model.classifier.out_features == K
    assert model.frames_per_clip == T
    assert isinstance(model.backbone, nn.Module)
    assert model.training


def test_state_dict_round_trip(method: str) -> None:
    first = small(method)
    second = models.build(type=method, backbone=backbone_of(method), num_class=K, num_segments=T)
    first(clips())  # moves the running statistics
    second.load_state_dict(first.state_dict())
    first.eval()
    second.eval()
    with torch.inference_mode():
        assert torch.equal(first(clips()), second(clips()))


DRAWS = {"dropout": 0.5, "drop_path": 0.5, "attention_dropout": 0.3}


def test_training_draws_from_no_global_generator(method: str) -> None:
    """A training step has the same bits whatever others draw from torch's own generators, and with checkpointing."""
    known = {*model_options.options(method, backbone_of(method)), "dropout"}
    drawn = {key: value for key, value in DRAWS.items() if key in known}
    forms = [drawn, drawn | {"checkpointing": True}] if "checkpointing" in known else [drawn]
    gradients = []
    for seed, options in itertools.product((1, 2), forms):
        model = small(method, **options)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with draws.rng_scope(3, 5, (0, 1), 1):
            answer = model(clips())
            losses_of(answer).backward()
        assert torch.equal(torch.get_rng_state(), before), "the step drew from the global generator"
        logits = answer.logits if isinstance(answer, Output) else answer
        gradients.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in gradients[1:]:
        assert all(torch.equal(first, second) for first, second in zip(gradients[0], other, strict=True))


def test_evaluation_is_deterministic_and_per_clip(method: str) -> None:
    model = small(method).eval()
    with torch.inference_mode():
        both = model(clips())
        assert torch.equal(both, model(clips()))
        one = model(clips()[1:])
    torch.testing.assert_close(one[0], both[1], rtol=1e-4, atol=1e-6)


def test_any_memory_format_gives_the_same(method: str) -> None:
    """Training hands over a permuted (B, T, H, W, C) tensor."""
    model = small(method).double().eval()
    x = clips().double()
    permuted = x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert permuted.stride() != x.stride()
    with torch.inference_mode():
        torch.testing.assert_close(model(permuted), model(x), rtol=1e-9, atol=1e-12)


def test_seed_decides_the_weights(method: str) -> None:
    first, second = small(method).state_dict(), small(method).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"type": "tsmm"}, r"model.type: no method called 'tsmm' \(did you mean tsm\?\); choose one of .*tsm.*tsn"),
        ({"type": "fetch"}, "no method called 'fetch'"),
        ({"type": "../main"}, "no method called"),
        ({"backbone": "resnet5"}, r"model.backbone: .*did you mean resnet50?.*mobilenetv2"),
        ({"shift_dib": 4}, r"model.kwargs.shift_dib: .*did you mean shift_div\?"),
        ({"t": 6}, r"model.kwargs.t: tsm with resnet18 has no such option"),
        ({"backbone": "mobilenetv2", "t": 0}, r"t \(expansion factor\) is 0"),
        ({"shift_direction": "left"}, "must be one of tsm, paddle"),
        ({"num_segments": 0}, "num_segments is 0"),
        ({"n_round": 0}, "n_round is 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    good = {"type": "tsm", "backbone": "resnet18", "num_class": K, "num_segments": T}
    with pytest.raises(UserError, match=message):
        models.build(**(good | arguments))


def test_config_reads_the_same_names_from_the_source() -> None:
    """utils/config parses the files without torch; what it allows must be what can be built."""
    assert set(model_options.methods()) == set(methods.names())
    assert set(model_options.backbones()) == set(BACKBONES)
    for method in methods.names():
        for backbone in BACKBONES:
            function = importlib.import_module(f"methods.{method}").build
            parameters = list(inspect.signature(function).parameters.values())
            if any(p.kind is p.VAR_KEYWORD for p in parameters):
                parameters += inspect.signature(BACKBONES[backbone]).parameters.values()
            expected = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - COMMON
            assert set(model_options.options(method, backbone)) == expected


def test_backbone_options_reach_the_backbone() -> None:
    model = models.build(type="tsn", backbone="mobilenetv2", num_class=K, num_segments=T, t=3)
    assert model.backbone.features[2].conv[0][0].out_channels == 3 * 16
