"""Five SGD steps on seeded noise give the losses of golden_losses.json. After an intended change write them again:

PYTHONPATH=. python tests/methods/test_golden_losses.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from methods._output import Output
from tests import models
from utils import optim
from utils.engine.network import place

GOLDEN = Path(__file__).with_name("golden_losses.json")
CASES = {
    "tsn-resnet18": {"type": "tsn", "backbone": "resnet18"},
    "tsm-resnet18": {"type": "tsm", "backbone": "resnet18"},
    "tsn-mobilenetv2": {"type": "tsn", "backbone": "mobilenetv2"},
    "tsm-mobilenetv2": {"type": "tsm", "backbone": "mobilenetv2"},
    "tsm-resnet18-non-local": {"type": "tsm", "backbone": "resnet18", "non_local": "embedded_gaussian"},
    "slowonly-resnet18": {"type": "slowonly", "backbone": "resnet18"},
    "slowfast-resnet18": {"type": "slowfast", "backbone": "resnet18", "alpha": 2},
    "tpn-slowonly-resnet18": {"type": "tpn", "backbone": "resnet18"},
    "tpn-tsm-resnet18": {"type": "tpn", "backbone": "resnet18", "base": "tsm"},
    "pptsn-resnet18": {"type": "pptsn", "backbone": "resnet18"},
    "pptsm-resnet18": {"type": "pptsm", "backbone": "resnet18"},
    "probe-vit3d": {"type": "probe", "backbone": "vit3d", "width": 48, "depth": 1, "init_scale": 20.0},
    "videomae-vit3d": {"type": "videomae", "backbone": "vit3d", "width": 48, "depth": 3, "init_scale": 20.0},
    "vjepa2-vit3d": {"type": "vjepa2", "backbone": "vit3d", "width": 48, "depth": 2, "init_scale": 20.0},
}


def five_losses(case: str) -> list[float]:
    """In float64, without dropout: rounding and the kernels of a machine do not show at 1e-4."""
    torch.manual_seed(0)
    head = {} if "init_scale" in CASES[case] else {"fc_std": 0.1}
    model = models.build(**CASES[case], **head, num_class=6, num_segments=4, dropout=0.0)
    model = place(model, torch.device("cpu"), "fp64")  # in the memory format of training
    sgd = optim.build(model, lr=0.002, momentum=0.9, weight_decay=5e-4, nesterov=True, policy=True)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(5):
        clips = torch.randn(3, 3, 4, 48, 48, generator=generator).double()
        clips = clips.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
        out, labels = model(clips), torch.tensor([0, 3, 5])
        if isinstance(out, Output):
            loss = nn.functional.cross_entropy(out.logits, labels)
            loss = loss + out.aux_weight * nn.functional.cross_entropy(out.aux, labels)
        else:
            loss = nn.functional.cross_entropy(out, labels)
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses


SLOW = ("slowonly-resnet18", "slowfast-resnet18", "tpn-slowonly-resnet18")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_losses_are_what_they_were(case: str) -> None:
    assert five_losses(case) == pytest.approx(json.loads(GOLDEN.read_text())[case], rel=1e-4)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({case: five_losses(case) for case in CASES}, indent=1) + "\n")
    print(GOLDEN.read_text())
