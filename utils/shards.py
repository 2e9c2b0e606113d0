"""Compute which clips of the global batch each rank trains on, in which pieces. Plain arithmetic, no process group."""

from __future__ import annotations

from dataclasses import dataclass

from utils.errors import UserError


@dataclass(frozen=True)
class ShardPlan:
    """The clips of each global batch that this rank trains on, and their micro-batches.

    The global batch is `total` shards of `batch_size` clips, for any number of ranks. `group_size` neighbouring shards
    share batch-norm statistics. Rank r runs shards r, r + W, ...: one shard per micro-batch, or this rank's part of one
    group if a group spans more shards than there are ranks. So a group is always complete within one micro-batch taken
    over all ranks.

    Args:
        total: V, shards in the global batch (the number of ranks at the first start).
        batch_size: clips per shard.
        world: W, current number of ranks.
        rank: this rank.
        group_size: n, shards per BN group.

    Raises:
        UserError: a number of ranks or a group size that does not allow this; lists the legal numbers of ranks.
    """

    total: int
    batch_size: int
    world: int = 1
    rank: int = 0
    group_size: int = 1

    def __post_init__(self) -> None:
        if min(self.total, self.batch_size, self.world, self.group_size) < 1 or not 0 <= self.rank < self.world:
            raise ValueError(f"not a shard plan: {self}")

        # Two rules keep each BN group whole: groups divide the shards, and (below) ranks fit the groups.
        if self.total % self.group_size:
            fit = ", ".join(str(n) for n in range(1, self.total + 1) if self.total % n == 0)
            raise UserError(
                f"model.kwargs.bn_group_size = {self.group_size} does not divide the {self.total} shards of the "
                f"global batch (the ranks of the first start): use one of {fit}"
            )

        if self.world not in (legal := legal_ranks(self.total, self.group_size)):
            # A run that began on one rank has one shard; the message says how to prepare for more ranks.
            one = self.total == 1
            later = "; for other numbers, set `shards: 4` before the first start: 1, 2 and 4 ranks can share these"
            raise UserError(
                f"{self.world} ranks cannot share {self.total} shard{'' if one else 's'} with bn_group_size = "
                f"{self.group_size}: use {', '.join(map(str, legal))} rank{'' if one else 's'}{later if one else ''}"
            )

    @property
    def global_batch(self) -> int:
        """Clips per optimiser step."""
        return self.total * self.batch_size

    @property
    def num_groups(self) -> int:
        """BN groups in the global batch; depends on V and n only."""
        return self.total // self.group_size

    @property
    def shards_per_micro_batch(self) -> int:
        """Shards that are concatenated in each micro-batch of this rank."""
        return max(1, self.group_size // self.world)

    @property
    def micro_batches(self) -> tuple[tuple[int, ...], ...]:
        """The shards of each of this rank's micro-batches, in the order they run."""
        mine = tuple(range(self.rank, self.total, self.world))  # r, r + W, ...: neighbouring shards on different ranks
        width = self.shards_per_micro_batch
        return tuple(mine[i : i + width] for i in range(0, len(mine), width))

    def positions(self, step: int, shard: int) -> range:
        """Return the positions in the endless order of samples that `shard` of global batch `step` holds."""
        start = (step * self.total + shard) * self.batch_size
        return range(start, start + self.batch_size)

    def group_of(self, shard: int) -> int:
        """Return the BN group of a shard."""
        return shard // self.group_size


def legal_ranks(total: int, group_size: int = 1) -> list[int]:
    """Return the numbers of ranks on which `total` shards with BN groups of `group_size` can run."""
    # Equal work for each rank, and no group that is only partly on some ranks.
    return [w for w in range(1, total + 1) if total % w == 0 and (w % group_size == 0 or group_size % w == 0)]
