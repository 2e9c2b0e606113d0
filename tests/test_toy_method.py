"""A new method is one new file: in a copy of the repository `list`, the contract tests and train.sh find it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.copies import copy_repository, run_in
from tests.docs_code import program

TOY = '''\
"""Toy: one picture, the weighted mean of the frames, through a 2D network (Doe 2026, arXiv:0000.00000)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods import _backbones
from methods._heads import new_classifier, new_dropout


class Toy(nn.Module):
    """Learned weights of the frames, one image, a classifier."""

    def __init__(self, backbone: nn.Module, num_class: int, num_segments: int, dropout: float, late: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.weights = nn.Parameter(torch.linspace(1, late, num_segments) / num_segments)
        self.dropout = new_dropout(dropout)
        self.classifier = new_classifier(_backbones.feature_dim(backbone), num_class, 0.01)
        self.frames_per_clip = num_segments

    def forward(self, clips: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, K)."""
        image = (clips * self.weights.view(-1, 1, 1)).sum(2)
        return self.classifier(self.dropout(self.backbone(image)))


def build(
    *, backbone: str, num_class: int, num_segments: int, dropout: float = 0.5, pretrained: bool | str = False,
    late: float = 2.0,
) -> Toy:
    """A mean of frames (Doe 2026, arXiv:0000.00000).

    Args:
        late: how much the last frame counts over the first, at the start.
    """
    model = Toy(_backbones.make(backbone, {}), num_class, num_segments, dropout, late)
    return _backbones.load(model, pretrained, backbone)
'''
SETS = {
    "model.type": "toy",
    "model.kwargs.late": 3,
    "model.num_segments": 2,
    "augmentation.input_size": 32,
    "augmentation.test_resize": 36,
    "batch_size": 2,
    "workers": 1,
    "lr_scheduler.max_iter": 2,
    "lr_scheduler.warmup_steps": 1,
    "val_freq": 2,
    "print_freq": 1,
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files, the toy method, the method of the docs, nothing else, with this environment as .venv."""
    target = copy_repository(tmp_path_factory.mktemp("copy") / "zoetrope")
    (target / "methods" / "toy.py").write_text(TOY)
    (target / "methods" / "mymodel.py").write_text(program("docs/add_a_model.md", "methods/mymodel.py"))
    return target


@pytest.fixture(scope="module")
def experiment(copy: Path, motion_videos: Path) -> Path:
    """An experiment that uses it: an existing one with other values, as a sweep writes them."""
    source = "exps/demo_exps/tsn_resnet18/motion8"
    data = {
        "train_root": motion_videos,
        "val_root": motion_videos,
        "train_source": motion_videos / "lists/train.txt",
        "val_source": motion_videos / "lists/val.txt",
        "data.class_names": motion_videos / "lists/classInd.txt",
    }
    sets = [word for key, value in (SETS | data).items() for word in ("--set", f"{key}={value}")]
    text = run_in(copy, sys.executable, "main.py", "config", source, *sets)
    exp = copy / "exps/toy_exps/toy_resnet18/tiny"
    run_in(copy, sys.executable, "main.py", "new", str(exp), "--from", source)
    (exp / "config.yaml").write_text(text)
    return exp


def test_list_shows_it_with_its_cost(copy: Path, experiment: Path) -> None:
    out = run_in(copy, sys.executable, "main.py", "list", "exps/toy_exps")
    row = next(line for line in out.splitlines() if line.startswith("exps/toy_exps/toy_resnet18/tiny"))
    assert re.search(r"toy resnet18 .* 2 +32 .* 11\.18 +0\.04\b", row), row


def test_contract_tests_find_it(copy: Path) -> None:
    out = run_in(
        copy,
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        "toy or mymodel or same_names",
        "tests/methods/test_contract.py",
    )
    passed = re.search(r"(\d+) passed", out)
    assert passed, out
    assert int(passed[1]) >= 20, out


def test_train_sh_trains_it(experiment: Path, copy: Path) -> None:
    run_in(copy, str(experiment / "train.sh"), "local", "1")
    text = (experiment / "log.txt").read_text()
    assert "Iter: [2/2]" in text
    assert "total_num = 23" in text
    assert (experiment / "ckpt.pth.tar").is_file()
