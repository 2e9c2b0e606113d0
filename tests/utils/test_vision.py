"""torchvision is imported beside the build of torch at hand, with or without its compiled operators."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils import vision

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_networks_and_transforms_work_beside_this_build_of_torch() -> None:
    models = vision.load("torchvision.models")
    functional = vision.load("torchvision.transforms.functional")
    vision.load("torchvision.models.video")
    net = models.resnet18(num_classes=3).eval()
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert functional.hflip(torch.tensor([[[1.0, 2.0]]])).tolist() == [[[2.0, 1.0]]]


def test_operators_are_declared_only_where_they_cannot_be_loaded() -> None:
    shown = run(
        "import torch\n"
        "from utils import vision\n"
        "vision.load()\n"
        "import torchvision.extension\n"
        "assert vision.has_compiled_operators() == torchvision.extension._has_ops()\n"
        "boxes, scores = torch.tensor([[0., 0., 1., 1.]]), torch.tensor([1.])\n"
        "try:\n"
        "    print(torch.ops.torchvision.nms(boxes, scores, .5).tolist())\n"
        "except NotImplementedError:\n"
        "    print('declared')\n"
        "print(vision.has_compiled_operators())\n"
    )
    assert shown.split() in (["[0]", "True"], ["declared", "False"])


def test_a_schema_that_somebody_else_declared_is_no_error() -> None:
    run(
        "import torch\n"
        "other = torch.library.Library('torchvision', 'FRAGMENT')\n"
        "from utils import vision\n"
        "if not vision.has_compiled_operators():\n"
        "    other.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "vision.load()\n"
    )


def test_a_missing_torchvision_is_an_import_error() -> None:
    with pytest.raises(ImportError):
        vision.load("torchvision.no_such_module")
