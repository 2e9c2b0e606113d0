"""The order in which each rank would start its collectives, over a process group whose other ranks exist by name only.

    python -m tests.fake_cuda.order SHARDS GROUP RANKS [precise]

Runs two real training steps on the CPU as each rank in turn, and prints a JSON line per rank with the second step's
collectives: operation, shape, dtype and group.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Writes down each collective that is started."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Any]] = []
        self._groups: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            first = args[0]
            while isinstance(first, (list, tuple)):
                first = first[0]
            group = next(td.ProcessGroup.unbox(word) for word in args if isinstance(word, torch.ScriptObject))
            # Names of groups differ between processes; their order of appearance does not.
            number = self._groups.setdefault(group.group_name, len(self._groups))
            self.calls.append([func.overloadpacket.__name__, list(first.shape), str(first.dtype), number])
        return func(*args, **(kwargs or {}))


def as_rank(rank: int, ranks: int, total: int, group: int, *, precise: bool) -> list[list[Any]]:
    """What one rank starts."""
    td.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    log = Collectives()
    try:
        with tempfile.TemporaryDirectory() as folder, log:
            step(Path(folder), log, rank, ranks, total, group, precise=precise)
    finally:
        td.destroy_process_group()
    return log.calls


def step(folder: Path, log: Collectives, rank: int, ranks: int, total: int, group: int, *, precise: bool) -> None:
    import main
    from datasets.loading.train import Batch
    from tests import experiment
    from utils import config, dist, transforms
    from utils.engine import learner, precise_bn
    from utils.shards import ShardPlan

    sets = [f"model.kwargs.bn_group_size={group}", "batch_size=2", "ema=0.99", "clip_grad=10"]
    sets += ["augmentation.mix_up=0", "augmentation.colorjitter=null", "augmentation.random_erasing=null"]
    cfg = config.load(experiment.make(folder / "exp", folder), [f"common.{word}" for word in sets])
    world = dist.World(rank, ranks, rank, torch.device("cpu"), "gloo")
    shards = ShardPlan(total=total, batch_size=2, world=ranks, rank=rank, group_size=group)
    run_learner = learner.build(cfg, world, shards, None, lambda text: None)

    def batch(part: tuple[int, ...]) -> Batch:
        clips = torch.zeros(2 * len(part), 2, 32, 32, 3, dtype=torch.uint8)
        clips[::2] = 255  # a constant batch has no variance
        count = len(clips)
        return Batch(clips, torch.arange(count) % 8, torch.ones(count), [0] * count, {}, part, [0] * count)

    for number in range(2):
        log.calls.clear()
        main.train_step(run_learner, number, [batch(part) for part in shards.micro_batches], stop=False, save=False)
    if precise:
        clips = [transforms.normalise(batch(part).clips) for part in shards.micro_batches]
        precise_bn.averages(run_learner.net, [lambda net, x=x: net(x) for x in clips], world)
    run_learner.bn_stats.for_evaluation()
    run_learner.bn_stats.group_state()


if __name__ == "__main__":
    total, group, ranks = map(int, sys.argv[1:4])
    for rank in range(ranks):
        print(json.dumps(as_rank(rank, ranks, total, group, precise="precise" in sys.argv)), flush=True)
