"""A new augmentation is two new files and its keys: in a copy of the repository its draws reach the device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.copies import ROOT, copy_repository, run_in

PLAN = '''\
"""Invert the colours of some frames (`augmentation.invert`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from utils.config import Config


@dataclass(frozen=True)
class Invert:
    """Rows: (F, 1) bool, True inverts the frame."""

    probability: float
    per_frame: ClassVar[bool] = True
    block: ClassVar[int] = 99
    uniforms: ClassVar[int] = 1
    neutral: ClassVar[np.ndarray] = np.zeros(1, bool)

    def resolve(self, u: NDArray[np.float64], side: int) -> NDArray[np.bool_]:
        """See `Op`."""
        return u < self.probability


def from_config(cfg: Config) -> Invert | None:
    """See the package."""
    return Invert(cfg.augmentation.invert) if cfg.augmentation.invert else None
'''
APPLY = '''\
"""Invert the colours of some frames."""

from __future__ import annotations

from torch import Tensor

from utils.ops import UNIT, Colour, check_sets

STAGE = UNIT


def apply(clips: Tensor, drawn: Tensor, colour: Colour) -> Tensor:
    """1 - value where the row is True, (B, T, 1) bool."""
    check_sets("invert", drawn, clips)
    chosen = drawn.to(clips.device)[..., None, None]  # (B, T, 1, 1, 1)
    return chosen * (1 - clips) + ~chosen * clips
'''
KEY = '    invert: float = key("probability of inverting a frame; 0 = off", default=0.0, ge=0, le=1)\n'
SETS = {
    "model.backbone": "mobilenetv2", "model.num_segments": 4, "model.pretrained": False, "batch_size": 2, "workers": 1,
    "augmentation.input_size": 32, "augmentation.test_resize": 36, "augmentation.colorjitter": "[0.2, 0.2, 0.2, 0.1]",
    "lr_scheduler.max_iter": 2, "lr_scheduler.warmup_steps": 1, "val_freq": 2, "print_freq": 1, "data.flip": True,
    "data.flip_labels": "null",
}  # fmt: skip
SCRIPT = """\
import json, sys
import torch
from datasets.loading import loader
from utils import config, transforms
from utils.dist import World
from utils.shards import ShardPlan

found = []
for invert in (0, 0.5):
    cfg = config.load(sys.argv[1], [*sys.argv[2:], f"augmentation.invert={invert}"])
    with loader.train(cfg, World(), ShardPlan(total=1, batch_size=2, world=1, rank=0, group_size=1)) as clips:
        batches = [batch for _, (batch,) in clips]
    assert all(batch.clips.any() for batch in batches)
    found.append([{name: rows.tolist() for name, rows in batch.drawn.items()} for batch in batches])
rows = {"invert": torch.tensor([[[True], [False]]])}
clips = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(1, 2, 4, 4, 3)
changed, plain = (transforms.augment(clips, drawn, mean=(0, 0, 0), std=(1, 1, 1)) for drawn in (rows, None))
torch.testing.assert_close(changed[:, :, 0], 1 - plain[:, :, 0])
torch.testing.assert_close(changed[:, :, 1], plain[:, :, 1])
print(json.dumps(found))
"""


def test_a_new_augmentation_is_two_files_and_its_keys(tmp_path: Path) -> None:
    copy = copy_repository(tmp_path / "zoetrope")
    (copy / "datasets/plan/ops/invert.py").write_text(PLAN)
    (copy / "utils/ops/invert.py").write_text(APPLY)
    schema = copy / "utils/config/schema.py"
    text = schema.read_text()
    assert text.count("    mix_up:") == 1
    schema.write_text(text.replace("    mix_up:", f"{KEY}    mix_up:"))
    changed = subprocess.run(
        ["diff", "-rq", ROOT / "datasets", copy / "datasets"], capture_output=True, text=True, check=False
    )
    assert [line for line in changed.stdout.splitlines() if "pycache" not in line] == [
        f"Only in {copy}/datasets/plan/ops: invert.py"
    ]

    run_in(copy, sys.executable, "main.py", "demo-data", "--train", "8", "--val", "8", "--workers", "2")
    exp = "exps/demo_exps/tsm_resnet18/motion8"
    words = [f"{key}={value}" for key, value in SETS.items()]
    without, with_it = json.loads(run_in(copy, sys.executable, "-c", SCRIPT, exp, *words).splitlines()[-1])

    assert [list(batch) for batch in with_it] == [["flip", "colorjitter", "invert"]] * 2
    drawn = [frame for batch in with_it for clip in batch["invert"] for (frame,) in clip]
    assert len(drawn) == 2 * 2 * 4
    assert {True, False} == set(drawn)
    for batch in with_it:
        del batch["invert"]
    assert with_it == without, "the draws of the others are as they were"

    sets = [part for word in (*words, "augmentation.invert=0.5") for part in ("--set", word)]
    assert "run: finished iteration=2 " in run_in(copy, sys.executable, "main.py", "train", exp, *sets)
