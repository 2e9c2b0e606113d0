"""convert, and foreign files given to eval and predict directly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import main
from anal_tools.evaluate.results import Results
from tests import experiment, models, weights
from tests.datasets.videos import write_video
from utils import checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_video(root / "a.mp4", "libx264", 20)
    (root / "lists").mkdir()
    for name in ("train", "val"):
        (root / "lists" / f"{name}.txt").write_text("a.mp4 3\n")
    return root


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSN with torchvision's names."""
    torch.manual_seed(11)
    model = models.build(type="tsn", backbone="resnet18", num_class=8, num_segments=2)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    names = {key.replace("backbone.", "").replace("classifier.", "fc."): t for key, t in model.state_dict().items()}
    file = tmp_path_factory.mktemp("foreign") / "tsn.pth"
    torch.save(names, file)
    return file


def run(*argv: object) -> int:
    return main.main([str(word) for word in argv])


@pytest.mark.system
def test_converted_and_direct_give_the_same(
    data: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = experiment.make(tmp_path / "exp", data)
    out = tmp_path / "ours.pth.tar"
    assert run("convert", foreign, "--config", exp, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "names of torchvision_timm" in shown
    assert "loaded               122" in shown
    assert "num_class  8" in shown
    for number, file in enumerate((foreign, out)):
        assert run("eval", exp, "--checkpoint", file, "--name", f"r{number}") == 0
    first, second = (Results.load(exp, f"r{number}").logits for number in range(2))
    assert (first == second).all()
    assert run("predict", out, data / "a.mp4", "--out", tmp_path / "p", "--logits") == 0
    assert run("predict", exp, data / "a.mp4", "--checkpoint", foreign, "--out", tmp_path / "q", "--logits") == 0
    one, two = (json.loads((tmp_path / name / "infer.json").read_text())["videos"] for name in "pq")
    assert one == two
    assert models.build(type="tsn", backbone="resnet18", num_class=8, num_segments=2, pretrained=str(out))


def test_other_classes_get_a_new_classifier_and_the_report_says_so(
    data: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = experiment.make(tmp_path / "exp", data)
    files = [tmp_path / "a.pth.tar", tmp_path / "b.pth.tar"]
    for out in files:
        assert run("convert", foreign, "--config", exp, "--out", out, "--set", "model.num_class=5") == 0
    shown = capsys.readouterr().out
    assert "newly initialised      2  classifier.weight, classifier.bias" in shown
    assert "the classifier is new: 5 classes" in shown
    first, second = (checkpoint.load(out)["model"] for out in files)
    assert all(torch.equal(first[key], second[key]) for key in first)  # the seed decides
    assert run("eval", exp, "--checkpoint", foreign, "--set", "model.num_class=5") == 2
    assert "classifier.weight" in capsys.readouterr().err


def test_what_does_not_fit_is_an_error_and_nothing_is_written(
    data: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exp = experiment.make(tmp_path / "exp", data)
    out = tmp_path / "ours.pth.tar"
    assert run("convert", foreign, "--config", exp, "--out", out, "--set", "model.backbone=resnet34") == 2
    message = capsys.readouterr().err
    assert "missing: backbone.layer1.2.conv1.weight" in message
    assert "the file shows backbone: resnet18, num_class: 8" in message
    assert not out.exists()
    assert run("convert", foreign, "--config", exp) == 2
    out.write_text("mine")
    assert run("convert", foreign, "--config", exp, "--out", out) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_without_a_config_it_says_what_the_file_is(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", foreign) == 0
    shown = capsys.readouterr().out
    assert "        backbone: resnet18\n        num_class: 8\n" in shown
    assert "not shown by any tensor: type, the number of frames" in shown


def test_predict_says_what_a_foreign_file_lacks(
    data: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", foreign, data / "a.mp4", "--out", tmp_path) == 2
    assert "holds no config; name its experiment folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_state_dict_of_ours_is_a_checkpoint_too(data: Path, tmp_path: Path) -> None:
    exp = weights.make(tmp_path / "exp", data)
    state = checkpoint.load(exp / checkpoint.BEST)["model"]
    torch.save(state, tmp_path / "plain.pth")
    assert run("eval", exp) == 0
    assert run("eval", exp, "--checkpoint", tmp_path / "plain.pth") == 0
    assert (Results.load(exp, "best").logits == Results.load(exp, "plain").logits).all()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("layer1.0.bn1.weight", torch.full((64,), torch.inf), "NaN or infinity in: backbone.layer1.0.bn1.weight"),
        ("fc.weight", torch.tensor(1.0), "classifier.weight () for (8, 512)"),
        ("fc.bias", torch.zeros(8, dtype=torch.complex64), "complex numbers in fc.bias"),
    ],
)
def test_tensors_that_are_no_weights_are_named(
    data: Path,
    foreign: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: torch.Tensor,
    expected: str,
) -> None:
    torch.save({**torch.load(foreign, weights_only=True), name: value}, tmp_path / "odd.pth")
    exp = experiment.make(tmp_path / "exp", data)
    assert run("convert", tmp_path / "odd.pth", "--config", exp, "--out", tmp_path / "ours.pth.tar") == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "ours.pth.tar").exists()
    assert run("convert", tmp_path / "odd.pth") in (0, 2)  # and no traceback
