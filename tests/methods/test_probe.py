"""Probes: many heads in one pass learn what each of them would alone, and one of them answers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import networks
from methods.probe import Probe
from methods.videomae import VideoMAE
from methods.vjepa2 import VJEPA2
from tests import models
from utils import draws, optim
from utils.errors import UserError
from utils.loss import training_loss

RATES, DECAYS = (1.0, 0.1), (0.01, 0.8)


def probe(**options: object) -> Probe:
    torch.manual_seed(0)
    sizes = {"width": 24, "depth": 2, "heads": 2, "patch": 4, "num_class": 5, "num_segments": 4, "pooler_layers": 1}
    model = models.build(**{"type": "probe", "backbone": "vit3d", "dropout": 0.3, **sizes, **options}).double()
    assert isinstance(model, Probe)
    return model


def clips(seed: int = 1) -> torch.Tensor:
    return torch.randn(4, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double()


def losses(model: Probe, kind: str, rate: float, steps: int = 6) -> list[torch.Tensor]:
    """The loss of each head in each of a few clipped steps."""
    optimizer = optim.build(model, lr=rate, type=kind, weight_decay=0.3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses_of = []
    for step in range(steps):
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with draws.rng_scope(3, step, (0, 1), 2):
            answer = model(clips(step))
            loss, _ = training_loss(answer, torch.tensor([0, 1, 2, 3]), label_smooth=0.1, lam=0.7)
        loss.sum().backward()
        optim.apply(optimizer, scaler, max_norm=0.5)
        losses_of.append(loss.detach().reshape(-1))
    return losses_of


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("head", ["attentive", "linear"])
def test_heads_in_one_pass_learn_what_each_does_alone(kind: str, head: str) -> None:
    rate = 0.01 if kind == "adamw" else 0.5
    together = torch.stack(losses(probe(head=head, lr_mults=RATES, decays=DECAYS), kind, rate), 1)  # (heads, steps)
    for of_head, (factor, decay) in zip(together, itertools.product(RATES, DECAYS), strict=True):
        alone = torch.cat(losses(probe(head=head, decays=(decay,)), kind, rate * factor))
        torch.testing.assert_close(of_head, alone, rtol=1e-12, atol=0)
    assert len({f"{float(value):.9f}" for value in together[:, -1]}) == 4, "rates and decays make a difference"


def test_groups_have_the_rates_and_decays_of_their_head() -> None:
    model = probe(head="linear", lr_mults=(3.0,), decays=(0.1, 0.4))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optim.build(model, lr=0.01, type="adamw", weight_decay=0.3).param_groups
    groups_of = {
        (group["name"], group["lr"], group["weight_decay"], *sorted(names[p] for p in group["params"]))
        for group in groups
    }
    expected = set()
    for n, decay in enumerate((0.1, 0.4)):
        expected.add((f"weight, head {n}", 0.03, decay, f"heads.{n}.classifier.weight"))
        norms = [f"heads.{n}.{name}" for name in ("classifier.bias", "features.bias", "features.weight")]
        expected.add((f"bias and norm, head {n}", 0.03, 0.0, *norms))
    assert groups_of == expected
    default_groups = optim.build(probe(), lr=0.01, type="adamw", weight_decay=0.3).param_groups
    assert {group["weight_decay"] for group in default_groups} == {0.3, 0.0}


def test_the_encoder_is_frozen() -> None:
    model = probe(encoder="videomae").train()
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    assert not any(module.training for module in model.backbone.modules())
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    losses(model, "adamw", 0.1, steps=2)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("encoder", "head", "kind"),
    [
        ("vjepa2", "attentive", VJEPA2),
        ("videomae", "linear", VideoMAE),
        ("vjepa2", "linear", Probe),
        ("videomae", "attentive", Probe),
    ],
)
def test_the_best_head_answers_and_leaves_alone(encoder: str, head: str, kind: type[nn.Module]) -> None:
    model = probe(encoder=encoder, head=head, lr_mults=(1.0, 10.0, 100.0))
    losses(model, "adamw", 0.01, steps=3)  # heads differ
    model.eval()
    with torch.no_grad(), model.all_heads():
        every = model(clips())  # (B, heads, K)
    assert every.shape == (4, 3, 5)
    model.choose(2)
    with torch.no_grad():
        best = model(clips())
    assert torch.equal(best, every[:, 2])
    assert not torch.allclose(best, every[:, 0])
    again = probe(encoder=encoder, head=head, lr_mults=(1.0, 10.0, 100.0)).eval()
    again.load_state_dict(model.state_dict())
    alone = model.alone().eval()
    assert isinstance(alone, kind)
    with torch.no_grad():
        assert torch.equal(again(clips()), best)
        assert torch.equal(alone(clips()), best)
    assert len({key.split(".")[1] for key in alone.state_dict() if key.startswith("heads.")}) <= 1


def test_a_file_that_names_no_head_is_refused() -> None:
    state = probe(lr_mults=(1.0, 2.0)).state_dict() | {"best": torch.tensor(2)}
    with pytest.raises(RuntimeError, match="best is 2, and there are 2 heads"):
        probe(lr_mults=(1.0, 2.0)).load_state_dict(state)


def test_weights_of_a_whole_model_fill_the_encoder(tmp_path) -> None:  # noqa: ANN001
    sizes = {"width": 24, "depth": 2, "heads": 2, "patch": 4, "num_segments": 4}
    source = models.build(type="videomae", backbone="vit3d", num_class=9, **sizes)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = probe(encoder="videomae", pretrained=str(tmp_path / "weights.pth")).float()
    expected = source.backbone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.backbone.state_dict().items())
    assert str(model.pretrained_note).startswith("frozen encoder: weights from ")


@pytest.mark.parametrize("head", ["attentive", "linear"])
def test_a_network_of_images_gives_a_token_for_each_frame(head: str, tmp_path) -> None:  # noqa: ANN001
    torch.manual_seed(1)
    image = networks.BACKBONES["mobilenetv2"](num_class=1000)
    torch.save(image.state_dict(), tmp_path / "imagenet.pth")
    model = models.build(
        type="probe", backbone="mobilenetv2", encoder="images", head=head, num_class=5, num_segments=4,
        pretrained=str(tmp_path / "imagenet.pth"), pooler_layers=1,
    ).train()  # fmt: skip
    assert model.pretrained_note.startswith("frozen encoder: weights from ")
    assert isinstance(model, Probe)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())

    inputs = torch.randn(2, 3, 4, 32, 32)
    bare = networks.BACKBONES["mobilenetv2"]().eval()
    bare.load_state_dict({key: value for key, value in image.state_dict().items() if "classifier" not in key})
    with torch.no_grad():
        expected = torch.stack([bare(inputs[:, :, i]) for i in range(4)], 1)  # (B, T, D)
        torch.testing.assert_close(model.tokens(inputs), expected)
        alone = model.alone().eval()
        assert isinstance(alone, Probe)
        assert torch.equal(alone(inputs), model.eval()(inputs))
    model.train()(inputs).sum().backward()
    assert model.classifier.weight.grad is not None
    assert all(torch.equal(a, b) for a, b in zip(model.backbone.buffers(), bare.buffers(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "tsm"}, "must be one of vjepa2, videomae, images"),
        ({"head": "mlp"}, "must be one of attentive, linear"),
        ({"lr_mults": (1.0, 0.0)}, "numbers above 0"),
        ({"decays": (-0.1,)}, "numbers of at least 0"),
        ({"pooler_heads": 5}, "must divide the width 24"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe(**options)
