"""`model.pretrained`: published files, state dicts, checkpoints, experiment folders; all that must fit, or a list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from methods import fetch
from networks import BACKBONES
from tests import models
from utils import checkpoint, files
from utils.errors import UserError


def build(pretrained: bool | str = False, **options: Any) -> models.Model:
    arguments = {"type": "tsn", "backbone": "resnet18", "num_class": 5, "num_segments": 3, "pretrained": pretrained}
    return models.build(**(arguments | options))


@pytest.fixture
def image_weights() -> dict[str, torch.Tensor]:
    """As the old published files: torchvision's names, 1000 classes, no num_batches_tracked."""
    torch.manual_seed(5)
    state = BACKBONES["resnet18"](num_class=1000).state_dict()
    return {key: value for key, value in state.items() if "num_batches_tracked" not in key}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fetch, "FOLDER", tmp_path / "pretrained")
    (tmp_path / "pretrained").mkdir()
    return tmp_path / "pretrained"


def published(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, state: dict, **how: Any) -> Path:
    """Write a published file, whose name carries the first digits of its sha256."""
    torch.save(state, folder / "new", **how)
    file = folder / f"{name}-{files.sha256(folder / 'new')[:8]}.pth"
    (folder / "new").rename(file)
    monkeypatch.setitem(fetch.FILES, name, file.name)
    return file


def same_backbone(model: models.Model, state: dict[str, torch.Tensor]) -> bool:
    backbone_state = model.backbone.state_dict()
    return all(torch.equal(backbone_state[key], value) for key, value in state.items() if not key.startswith("fc."))


@pytest.mark.parametrize("method", ["tsn", "tsm"])
@pytest.mark.parametrize("zipped", [True, False])  # published files have the older of torch's two formats
def test_true_reads_the_published_file(
    folder: Path, image_weights: dict, method: str, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = published(folder, monkeypatch, "resnet18", image_weights, _use_new_zipfile_serialization=zipped)
    model = build(True, type=method)
    assert same_backbone(model, image_weights)
    assert file.name in model.pretrained_note
    assert "its classifier is left out" in model.pretrained_note
    assert model.classifier.out_features == 5


def test_mobilenet_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    stored = BACKBONES["mobilenetv2"](num_class=1000).state_dict()
    published(folder, monkeypatch, "mobilenetv2", stored)
    model = build(True, backbone="mobilenetv2")
    assert torch.equal(model.backbone.features[3].conv[2].weight, stored["features.3.conv.2.weight"])
    with pytest.raises(UserError, match=r"does not fit: a different shape: backbone.features.2.conv.0.0.weight"):
        build(True, backbone="mobilenetv2", t=3)


def test_missing_file_says_what_to_do(folder: Path) -> None:
    message = r"pretrained/resnet50-19c8e357.pth is missing; .*python main.py fetch resnet50"
    with pytest.raises(UserError, match=message):
        build(True, backbone="resnet50")


def test_false_leaves_no_note() -> None:
    assert build().pretrained_note == ""


def test_path_of_a_state_dict(tmp_path: Path, image_weights: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({f"module.{key}": value for key, value in image_weights.items()}, tmp_path / "mine.pth")
    assert same_backbone(build(str(tmp_path / "mine.pth")), image_weights)
    monkeypatch.chdir(tmp_path)
    assert same_backbone(build("mine.pth"), image_weights)


def test_experiment_folder_prefers_the_best(tmp_path: Path) -> None:
    torch.manual_seed(1)
    latest, best = build(), build()
    torch.save({"model": latest.state_dict(), "step": 7}, tmp_path / checkpoint.LATEST)
    state = build(str(tmp_path)).state_dict()
    assert all(torch.equal(state[key], value) for key, value in latest.state_dict().items())
    torch.save({"model": best.state_dict(), "step": 3}, tmp_path / checkpoint.BEST)
    model = build(str(tmp_path), type="tsm")  # a shift has no parameters: weights of a TSN fit
    assert all(torch.equal(model.state_dict()[key], value) for key, value in best.state_dict().items())
    assert "left out" not in model.pretrained_note


def test_classifier_of_another_size_is_left_out_and_reported(tmp_path: Path) -> None:
    torch.manual_seed(1)
    earlier = build(num_class=9)
    torch.save({"model": earlier.state_dict()}, tmp_path / "old.pth.tar")
    model = build(str(tmp_path / "old.pth.tar"))
    assert same_backbone(model, earlier.backbone.state_dict())
    assert model.pretrained_note.endswith("; its classifier of 9 classes is left out")


def test_keys_that_do_not_match_are_listed(tmp_path: Path, image_weights: dict) -> None:
    file = tmp_path / "odd.pth"
    image_weights["layer9.weight"] = image_weights.pop("layer1.0.conv1.weight")
    torch.save(image_weights, file)
    with pytest.raises(UserError) as caught:
        build(str(file))
    assert "missing in the file: backbone.layer1.0.conv1.weight" in str(caught.value)
    assert "not in the model: backbone.layer9.weight" in str(caught.value)
    with pytest.raises(UserError, match=r"a different shape: .*\.\.\. \d+ in all"):
        build(str(file), backbone="resnet50")


class Code:
    """What a pickle from the outside could hold."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole weights file"),
        (b"PK\x03\x04 cut off", "not a whole weights file"),
        (b"some text", "not a whole weights file"),
        ({"model": Code()}, "more than tensors"),
        ({"epoch": 3}, "holds no state dict"),
        ([torch.zeros(2)], "holds no state dict"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "bad.pth"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(UserError, match=message):
        build(str(file))


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        build(str(tmp_path / "none"))
    with pytest.raises(UserError, match="holds neither ckpt_best.pth.tar nor ckpt.pth.tar"):
        build(str(tmp_path))


def test_readme_names_every_file(repo_root: Path) -> None:
    text = (repo_root / "pretrained" / "README.md").read_text(encoding="utf-8")
    for name, file in fetch.FILES.items():
        assert f"| {name} | `{file}` |" in text
