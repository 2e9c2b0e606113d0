"""A rank of two that share one GPU (NCCL refuses that, gloo does not), for the row `two` of one_gpu.py.

python tests/gpu/two_ranks.py RANK SIZE DEVICE FOLDER SCALE

Each rank prints the losses of four steps; then rank 1 raises, while rank 0 begins the fifth.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
STEPS = 4


def verb(rank: int, size: int, device_name: str, folder: Path, scale: str) -> int:
    """Train as one of the ranks; print the losses."""
    import contextlib

    import torch
    import torch.distributed as td

    from utils import dist, errors

    torch.set_num_threads(1)
    device = torch.device(device_name)
    with contextlib.ExitStack() as stack:
        if size > 1:
            store = td.FileStore(str(folder / "store"), size)  # pyright: ignore[reportPrivateImportUsage]
            td.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
            stack.push(dist.leave)
        world = dist.World(rank, size, 0, device, "gloo" if size > 1 else None)
        with dist.contact(world):
            for losses in train(world, folder / f"exp{rank}", scale):
                if len(losses) == STEPS:
                    print(json.dumps(losses), flush=True)
                    if rank == 1:
                        raise RuntimeError("a planted error on rank 1")
    return errors.leave_exit_code(0)


def train(world: Any, folder: Path, scale: str) -> Iterator[list[float]]:
    """Losses of two shards on one or two ranks in float64, after each step."""
    import torch

    import main
    from datasets.loading.train import Batch
    from tests import experiment
    from utils import config, transfer
    from utils.engine import learner
    from utils.shards import ShardPlan

    side = 32 if scale == "small" else 64
    words = ["model.kwargs.bn_group_size=2", "batch_size=2", "precision=fp64", "model.dropout=0"]
    words += [f"augmentation.input_size={side}", f"augmentation.test_resize={side + 4}", "augmentation.mix_up=0"]
    cfg = config.load(experiment.make(folder, folder.parent), [f"common.{word}" for word in words])
    shards = ShardPlan(total=2, batch_size=2, world=world.size, rank=world.rank, group_size=2)
    run_learner = learner.build(cfg, world, shards, None, lambda text: None)

    def batch(part: tuple[int, ...]) -> Batch:
        generator = torch.Generator()
        pieces = [
            torch.randint(0, 256, (2, 2, side, side, 3), generator=generator.manual_seed(shard), dtype=torch.uint8)
            for shard in part
        ]
        count = 2 * len(part)
        to = lambda tensor: transfer.to_device(tensor, world.device)  # noqa: E731
        labels = torch.tensor([(2 * shard + row) % 8 for shard in part for row in range(2)])
        ones = torch.ones(count)
        return Batch(to(torch.cat(pieces)), to(labels), to(ones), [0] * count, {}, part, [0] * count)

    losses: list[float] = []
    for step in range(STEPS + 1):
        batches = [batch(part) for part in shards.micro_batches]
        losses.append(main.train_step(run_learner, step, batches, stop=False, save=False)["loss"])
        yield losses


if __name__ == "__main__":
    from utils import errors

    own_rank, own_size, own_device, own_folder, own_scale = sys.argv[1:]
    os.environ["RANK"], os.environ["WORLD_SIZE"] = own_rank, own_size
    errors.leave_process(lambda: verb(int(own_rank), int(own_size), own_device, Path(own_folder), own_scale))
