"""The numbers of one training step, summed over micro-batches and ranks; the host reads them once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from utils import metrics

if TYPE_CHECKING:
    from datasets.loading.train import Batch
    from utils.dist import Pending, World
    from utils.mixup import Mix

NAMES = ("loss", "top1", "top5")  # of each head
SHARED = ("counted", "non_finite", "stop", "save")


class StepTotals:
    """Sums that also carry the requests of each rank, so that all ranks stop and save after the same step.

    Args:
        world: the ranks.
        stop, save: what this rank requests; a request from any rank counts for all.

    Attributes:
        losses: mean loss of each micro-batch of this rank, by its shards.
    """

    def __init__(self, world: World, *, stop: bool, save: bool) -> None:
        self.world, self._stop, self._save = world, stop, save
        self.losses: dict[tuple[int, ...], torch.Tensor] = {}
        self._sums: torch.Tensor | None = None  # NAMES of the first head, of the second ..., then SHARED
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
            loss: its mean loss; for a probe with several heads, (heads,).
            logits: (B, K), or (heads, B, K).
            labels: (B,) or (B, K), as the loss used them.
            mix: how neighbouring clips were mixed.
            share: of the micro-batch in the global batch.
            is_last: True for the last micro-batch of this rank.
        """
        self.losses[batch.shards] = loss = loss.detach()
        counted = batch.weights.double().sum()  # clips that could be read

        # Columns of each head: its share of the step's loss; accuracies times counted clips, for `read` to divide
        parts = []
        for value, scores in zip(loss.reshape(-1), logits if logits.dim() == 3 else [logits], strict=True):
            right = metrics.mixed_accuracy(scores, labels, mix.lam, ks=(1, 5), weights=batch.weights)  # per cent
            parts += [share * value.double(), *(counted * right.double())]

        added = torch.stack([*parts, counted])
        if self._sums is None:
            self._sums = torch.zeros(len(added) + len(SHARED) - 1, dtype=torch.float64, device=self.world.device)
        self._sums[: len(added)] += added

        # The last micro-batch completes the sums: add the flags and start the all-reduce right after the forward pass
        if is_last:
            # Counts: the sum over ranks is above 0 if any rank has a loss that is not finite
            self._sums[-3] = ~torch.isfinite(self._sums[: len(parts) : len(NAMES)]).all()
            self._sums[-2].fill_(self._stop)  # a plain number becomes an argument of the kernel: no copy, no wait
            self._sums[-1].fill_(self._save)
            self._pending = self.world.sum_async(self._sums)

    def read(self) -> dict[str, float]:
        """Wait for the sums.

        Returns:
            loss of the global batch, top1 and top5 (per cent) of its clips that could be read (nan: none could);
            non_finite, stop, save: the number of ranks for which it is true. With several heads, loss, top1 and top5
            are those of the first head; `loss_train/head03`, `top1_train/head03` and so on are those of each head.
        """
        assert self._pending is not None, "a rank has at least one micro-batch"
        values = self._pending.read().tolist()
        # The flags at the end of the vector, then the columns of each head
        numbers: dict[str, float] = dict(zip(SHARED, values[-len(SHARED) :], strict=True))
        counted = numbers.pop("counted") or math.nan
        columns = (values[place : -len(SHARED) : len(NAMES)] for place in range(len(NAMES)))
        heads = [(loss, top1 / counted, top5 / counted) for loss, top1, top5 in zip(*columns, strict=True)]

        numbers |= dict(zip(NAMES, heads[0], strict=True))
        for number, (loss, top1, _) in enumerate(heads if len(heads) > 1 else ()):
            numbers |= {f"loss_train/head{number:02}": loss, f"top1_train/head{number:02}": top1}
        return numbers
