"""The loop-overhead comparison: main.train on clips in memory, and between two of its steps one of a bare PyTorch loop.

Both train the same network on the same uint8 clips, in one process and in turn, so that what else the machine does
meets both alike. One JSON line: the CPU seconds of each step, the first ones left out, and the ratio of their sums.

    python -m tests.benchmarks.training.bare_loop [tsn | videomae]

- `tsn`: ResNet-18, 4 clips of 8 x 112 x 112, SGD nesterov.
- `videomae`: ViT-S, 2 clips of 16 x 112 x 112, AdamW. Our side has the whole recipe on: RandAugment, erasing by noise,
  CutMix or mixup, label smoothing, drop path, layer-wise rates, EMA. The bare side normalises and takes its step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZE, CLASSES = 112, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: the options of the network, and the keys of the config beside those of every case."""

    method: str
    backbone: str
    clips: int
    frames: int
    warm_up: int
    steps: int
    config: str


SGD = """\
    model: {{type: tsn, backbone: resnet18, num_segments: 8, num_class: 8, dropout: 0.0, pretrained: False}}
    augmentation: {{input_size: 112, test_resize: 128}}
    momentum: 0.9
    weight_decay: 0.0001
    nesterov: True
"""
WHOLE_RECIPE = """\
    model:
        type: videomae
        backbone: vit3d_small
        num_segments: 16
        num_class: 8
        dropout: 0.0
        pretrained: False
        kwargs: {{drop_path: 0.1}}
    augmentation:
        input_size: 112
        test_resize: 128
        colorjitter: False
        randaugment: rand-m7-n4-mstd0.5-inc1
        random_erasing: [0.25, 0.02, 0.333, 0.3]
        random_erasing_mode: pixel
        mix_up: 0.8
        cutmix: 1.0
    optimizer: {{type: adamw, layer_decay: 0.75}}
    weight_decay: 0.05
    label_smooth: 0.1
    ema: 0.999
"""
CASES = {
    "tsn": Case("tsn", "resnet18", clips=4, frames=8, warm_up=4, steps=24, config=SGD),
    "videomae": Case("videomae", "vit3d_small", clips=2, frames=16, warm_up=2, steps=10, config=WHOLE_RECIPE),
}


def clips_and_labels(case: Case) -> tuple:
    """Eight fixed batches of random clips (B, T, H, W, C) uint8 and labels (B,)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (8, case.clips, case.frames, SIZE, SIZE, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return clips, torch.randint(0, CLASSES, (8, case.clips), generator=generator)


class Bare:
    """The loop that anybody would write, a step at a time."""

    def __init__(self, case: Case) -> None:
        import torch

        import methods

        torch.manual_seed(0)
        self.clips, self.labels = clips_and_labels(case)
        network = {"type": case.method, "backbone": case.backbone, "num_segments": case.frames}
        net: Any = methods.build(num_class=CLASSES, dropout=0.0, **network)
        self.net = net.train() if case.method == "videomae" else net.to(memory_format=torch.channels_last).train()
        learned = self.net.parameters()
        if case.method == "videomae":
            self.optimizer: Any = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.05, fused=True)
        else:
            self.optimizer = torch.optim.SGD(learned, lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
        self.mean = torch.tensor([0.485, 0.456, 0.406]) * 255
        self.std = torch.tensor([0.229, 0.224, 0.225]) * 255

    def step(self, number: int) -> None:
        import torch

        x = ((self.clips[number % 8] - self.mean) / self.std).permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
        loss = torch.nn.functional.cross_entropy(self.net(x), self.labels[number % 8])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()


class InMemory:
    """Stands where the loader stands, with decoded clips: what is measured is the loop, not the reading.

    When the loop asks for the next clips its step is over, and it is the bare loop's turn.
    """

    seconds_waiting = 0.0
    trouble = None

    def __init__(self, case: Case, cfg: Any, seconds: dict[str, list[float]]) -> None:
        from datasets.memcached.report import MemcachedTraffic
        from datasets.plan import ops

        self.case = case
        self.clips, self.labels = clips_and_labels(case)
        self.ops = ops.from_config(cfg)
        self.bare = Bare(case)
        self.seconds = seconds
        self.traffic = MemcachedTraffic(counts=False)

    @property
    def ledger(self) -> InMemory:
        return self

    service = ledger

    def take_events(self) -> list:
        return []

    def being_read(self) -> list:
        return []

    def notes(self) -> list:
        return []

    def copy_ahead(self) -> None:
        pass

    def drawn(self, positions: range) -> dict[str, Any]:
        """What the plan of each clip draws for the augmentations, as a batch has it."""
        import numpy as np
        import torch

        from datasets.plan import order

        return {
            name: torch.from_numpy(
                np.stack([op.resolve(order.uniforms(0, 0, p, op.block, op.uniforms)[None], SIZE) for p in positions])
            )
            for name, op in self.ops.items()
        }

    def __iter__(self):
        import torch

        from datasets.loading.train import Batch

        count = self.case.clips
        for step in range(self.case.warm_up + self.case.steps):
            positions = range(step * count, (step + 1) * count)
            began = time.process_time()
            self.bare.step(step)
            turn = time.process_time()
            yield (
                step,
                [
                    Batch(
                        clips=self.clips[step % 8],
                        labels=self.labels[step % 8],
                        weights=torch.ones(count),
                        samples=list(range(count)),
                        drawn=self.drawn(positions),
                        shards=(0,),
                        positions=list(positions),
                    )
                ],
            )
            if step >= self.case.warm_up:
                self.seconds["bare"].append(turn - began)
                self.seconds["ours"].append(time.process_time() - turn)


CONFIG = """\
common:
    data: {{reader: video, flip: false}}
    val_dense: False
    workers: 0
    batch_size: {clips}
    lr_scheduler: {{type: COSINE, base_lr: 0.0001, max_iter: {steps}}}
    val_freq: {steps}
    print_freq: 10
    train_root: {folder}
    train_source: {folder}/list.txt
    val_root: {folder}
    val_source: {folder}/list.txt
"""


def measure(case: Case) -> dict[str, list[float]]:
    """Train with clips in memory in place of the loader; return the CPU seconds of each step, ours and bare."""
    import main
    from datasets.loading import loader
    from utils import config
    from utils.engine import run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "list.txt").write_text("".join(f"video{i}.mp4 16 {i}\n" for i in range(CLASSES)))
        for i in range(CLASSES):  # looked for before the first step, and never opened: the loader is another
            (folder / f"video{i}.mp4").touch()
        steps = (
            case.warm_up + case.steps + 1
        )  # the loader ends one step before the end, so that nothing is validated or saved
        text = (CONFIG + case.config).format(folder=folder, clips=case.clips, steps=steps)
        (folder / "config.yaml").write_text(text)
        seconds: dict[str, list[float]] = {"bare": [], "ours": []}
        loader.train = lambda *_, **__: contextlib.nullcontext(InMemory(case, config.load(folder), seconds))
        run.TrainingRun.save = lambda self, name="": None  # what is measured is a step, not the end of the run
        main.train(folder)
    return seconds


if __name__ == "__main__":
    seconds = measure(CASES[sys.argv[1] if len(sys.argv) > 1 else "tsn"])
    print(json.dumps({"ours_over_bare": sum(seconds["ours"]) / sum(seconds["bare"]), "seconds": seconds}))
