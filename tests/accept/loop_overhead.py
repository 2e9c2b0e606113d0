"""One side of the loop-overhead comparison: `ours` runs main.train on clips in memory, `bare` a plain PyTorch loop.

Both train TSN ResNet-18 on the same uint8 clips, 4 x 8 x 112 x 112, with SGD nesterov; both print one JSON line with
the CPU seconds of a step, the first steps left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

CLIPS, FRAMES, SIZE, CLASSES = 4, 8, 112, 8
WARM_UP, STEPS = 4, 24


def clips_and_labels() -> tuple:
    """Eight fixed batches of random clips (B, T, H, W, C) uint8 and labels (B,)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (8, CLIPS, FRAMES, SIZE, SIZE, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return clips, torch.randint(0, CLASSES, (8, CLIPS), generator=generator)


def bare() -> float:
    """The loop that anybody would write; returns CPU seconds per step."""
    import torch

    import methods

    torch.manual_seed(0)
    clips, labels = clips_and_labels()
    net = methods.build(type="tsn", backbone="resnet18", num_class=CLASSES, num_segments=FRAMES, dropout=0.0)
    net = net.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    mean = torch.tensor([0.485, 0.456, 0.406]) * 255
    std = torch.tensor([0.229, 0.224, 0.225]) * 255
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            started = time.process_time()
        x = ((clips[step % 8] - mean) / std).permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
        loss = torch.nn.functional.cross_entropy(net(x), labels[step % 8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return (time.process_time() - started) / STEPS


class InMemory:
    """Stands where the loader stands, with decoded clips: what is measured is the loop, not the reading."""

    seconds_waiting = 0.0

    def __init__(self, started: list[float]) -> None:
        self.clips, self.labels = clips_and_labels()
        self.started = started

    @property
    def ledger(self) -> InMemory:
        return self

    def take_events(self) -> list:
        return []

    def being_read(self) -> list:
        return []

    def __iter__(self):
        import torch

        from datasets.loader import Batch

        for step in range(WARM_UP + STEPS):
            if step == WARM_UP:
                self.started.append(time.process_time())
            yield (
                step,
                [
                    Batch(
                        clips=self.clips[step % 8],
                        labels=self.labels[step % 8],
                        weights=torch.ones(CLIPS),
                        samples=list(range(CLIPS)),
                        flip=torch.zeros(CLIPS, dtype=torch.bool),
                        jitter=None,
                        erase=None,
                        shards=(0,),
                        positions=list(range(step * CLIPS, (step + 1) * CLIPS)),
                    )
                ],
            )
        self.started.append(time.process_time())


CONFIG = """\
common:
    model: {{type: tsn, backbone: resnet18, num_segments: {frames}, num_class: {classes}, dropout: 0.0,
            pretrained: False}}
    augmentation: {{input_size: {size}, test_resize: 128}}
    data: {{reader: video, flip: false}}
    val_dense: False
    workers: 0
    batch_size: {clips}
    lr_scheduler: {{type: COSINE, base_lr: 0.01, max_iter: {steps}}}
    momentum: 0.9
    weight_decay: 0.0001
    nesterov: True
    val_freq: {steps}
    print_freq: 10
    train_root: {folder}
    train_source: {folder}/list.txt
    val_root: {folder}
    val_source: {folder}/list.txt
"""


def ours() -> float:
    """main.train on an experiment folder, its loader replaced by clips in memory; returns CPU seconds per step."""
    import main
    import utils.run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "list.txt").write_text("".join(f"video{i}.mp4 16 {i}\n" for i in range(CLASSES)))
        steps = WARM_UP + STEPS + 1  # the loader ends one step before the end, so that nothing is validated or saved
        text = CONFIG.format(folder=folder, clips=CLIPS, frames=FRAMES, size=SIZE, classes=CLASSES, steps=steps)
        (folder / "config.yaml").write_text(text)
        started: list[float] = []
        main.train_loader = lambda run: InMemory(started)
        utils.run.Run.save = lambda self, name: None  # what is measured is a step, not the end of the run
        main.train(folder)
    return (started[1] - started[0]) / STEPS


if __name__ == "__main__":
    seconds = {"bare": bare, "ours": ours}[sys.argv[1]]()
    print(json.dumps({"side": sys.argv[1], "cpu_seconds_per_step": seconds}))
