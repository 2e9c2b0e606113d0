"""The numbers of one training step, summed over micro-batches and ranks and read by the host once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from utils import metrics

if TYPE_CHECKING:
    from datasets.loading.train import Batch
    from utils.dist import Pending, World
    from utils.mixup import Mix

NAMES = ("loss", "prec1", "prec5", "counted", "non_finite", "stop", "save")


class StepTotals:
    """Sums that also carry the requests of each rank, so that all ranks stop and save after the same step.

    Args:
        world: the ranks.
        stop, save: what this rank requests; a request of any rank counts for all.

    Attributes:
        losses: mean loss of each micro-batch of this rank, by its shards.
    """

    def __init__(self, world: World, *, stop: bool, save: bool) -> None:
        self.world, self._stop, self._save = world, stop, save
        self.losses: dict[tuple[int, ...], torch.Tensor] = {}
        self._sums = torch.zeros(len(NAMES), dtype=torch.float64, device=world.device)
        self._pending: Pending | None = None

    @torch.no_grad()
    def add(
        self,
        batch: Batch,
        loss: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        *,
        mix: Mix,
        share: float,
        is_last: bool,
    ) -> None:
        """Add a micro-batch. The last one sends the sums, before its backward pass is queued.

        Args:
            batch: for its shards and weights (B,).
            loss: its mean loss.
            logits: (B, K).
            labels: (B,) or (B, K), as they were trained on.
            mix: how neighbouring clips were mixed.
            share: of the micro-batch in the global batch.
            is_last: True for the last micro-batch of this rank.
        """
        self.losses[batch.shards] = loss = loss.detach()
        right = metrics.mixed_accuracy(logits, labels, mix.lam, ks=(1, 5), weights=batch.weights)  # per cent
        counted = batch.weights.double().sum()  # clips that could be read
        self._sums[:4] += torch.stack([share * loss.double(), *(counted * right.double()), counted])
        if is_last:
            self._sums[4] = ~torch.isfinite(self._sums[0])
            self._sums[5].fill_(self._stop)  # a number becomes an argument of the kernel, a tensor would be copied
            self._sums[6].fill_(self._save)
            self._pending = self.world.sum_async(self._sums)

    def read(self) -> dict[str, float]:
        """Wait for the sums.

        Returns:
            loss of the global batch, prec1 and prec5 (per cent) of its clips that could be read (nan: none could);
            non_finite, stop, save: the number of ranks for which it is true.
        """
        assert self._pending is not None, "a rank has at least one micro-batch"
        numbers: dict[str, float] = dict(zip(NAMES, self._pending.read().tolist(), strict=True))
        counted = numbers.pop("counted") or math.nan
        return numbers | {name: numbers[name] / counted for name in ("prec1", "prec5")}
