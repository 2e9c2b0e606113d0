"""The loop-overhead comparison: main.train on clips in memory, and between two of its steps one of a bare PyTorch loop.

Both train TSN ResNet-18 on the same uint8 clips, 4 x 8 x 112 x 112, with SGD nesterov, in one process and in turn, so
that what else the machine does meets both alike. One JSON line: the CPU seconds of each step, the first ones left out,
and the ratio of their sums.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from pathlib import Path

CLIPS, FRAMES, SIZE, CLASSES = 4, 8, 112, 8
WARM_UP, STEPS = 4, 24


def clips_and_labels() -> tuple:
    """Eight fixed batches of random clips (B, T, H, W, C) uint8 and labels (B,)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (8, CLIPS, FRAMES, SIZE, SIZE, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return clips, torch.randint(0, CLASSES, (8, CLIPS), generator=generator)


class Bare:
    """The loop that anybody would write, a step at a time."""

    def __init__(self) -> None:
        import torch

        import methods

        torch.manual_seed(0)
        self.clips, self.labels = clips_and_labels()
        net = methods.build(type="tsn", backbone="resnet18", num_class=CLASSES, num_segments=FRAMES, dropout=0.0)
        self.net = net.to(memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
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

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        from datasets.memcached.report import Traffic

        self.clips, self.labels = clips_and_labels()
        self.bare = Bare()
        self.seconds = seconds
        self.traffic = Traffic(counts=False)

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

    def __iter__(self):
        import torch

        from datasets.loading.train import Batch

        for step in range(WARM_UP + STEPS):
            began = time.process_time()
            self.bare.step(step)
            turn = time.process_time()
            yield (
                step,
                [
                    Batch(
                        clips=self.clips[step % 8],
                        labels=self.labels[step % 8],
                        weights=torch.ones(CLIPS),
                        samples=list(range(CLIPS)),
                        drawn={},
                        shards=(0,),
                        positions=list(range(step * CLIPS, (step + 1) * CLIPS)),
                    )
                ],
            )
            if step >= WARM_UP:
                self.seconds["bare"].append(turn - began)
                self.seconds["ours"].append(time.process_time() - turn)


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


def measure() -> dict[str, list[float]]:
    """Train with clips in memory in place of the loader; return the CPU seconds of each step, ours and bare."""
    import main
    from datasets.loading import loader
    from utils.engine import run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "list.txt").write_text("".join(f"video{i}.mp4 16 {i}\n" for i in range(CLASSES)))
        for i in range(CLASSES):  # looked for before the first step, and never opened: the loader is another
            (folder / f"video{i}.mp4").touch()
        steps = WARM_UP + STEPS + 1  # the loader ends one step before the end, so that nothing is validated or saved
        text = CONFIG.format(folder=folder, clips=CLIPS, frames=FRAMES, size=SIZE, classes=CLASSES, steps=steps)
        (folder / "config.yaml").write_text(text)
        seconds: dict[str, list[float]] = {"bare": [], "ours": []}
        loader.train = lambda *_, **__: contextlib.nullcontext(InMemory(seconds))
        run.Run.save = lambda self, name="": None  # what is measured is a step, not the end of the run
        main.train(folder)
    return seconds


if __name__ == "__main__":
    found = measure()
    print(json.dumps({"ours_over_bare": sum(found["ours"]) / sum(found["bare"]), "seconds": found}))
