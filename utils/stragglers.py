"""Find out which rank is slow, and whether reading or computing takes the time; log it when it is far slower.

One slow rank delays all ranks, so step time does not show which one it is. Each rank measures its own data wait and
forward time. One small all-reduce per log line compares them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from utils.dist import World
    from utils.shards import ShardPlan

SHARE_OF_DATA = 0.25  # of a step: a longer wait for clips is worth a line
FAR_SLOWER = (1.3, 0.1)  # a rank is slow above 1.3 x the median of the others and 0.1 step above it


class StragglerMonitor:
    """Measures the forward pass of a rank, and compares the ranks.

    Args:
        world: the ranks.
        shards: which ranks share BN groups; their forward passes wait for one another.
    """

    def __init__(self, world: World, shards: ShardPlan) -> None:
        self.world, self.shards = world, shards
        self._seconds, self._passes = 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._windows = 0
        self._reported: list[str] = []  # kinds of findings of the last report, so that each is logged once

    def forward(self, model: torch.nn.Module, clips: torch.Tensor) -> torch.Tensor:
        """Return `model(clips)` and time it; on a GPU by events, which need no synchronisation."""
        if clips.is_cuda:
            # A host clock would measure only the launch of the kernels.
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            logits = model(clips)
            last.record()
            self._events.append((first, last))
            self._passes += 1
            return logits

        began = time.perf_counter()
        logits = model(clips)
        self._seconds += time.perf_counter() - began
        self._passes += 1
        return logits

    def report(
        self, *, data: float, step: float, figures: Sequence[torch.Tensor] = ()
    ) -> tuple[list[tuple[int | None, str]], list[float]]:
        """Compare the ranks over the steps since the last call. Collective.

        Args:
            data: this rank's average wait for clips, seconds per step.
            step: average duration of a step, seconds.
            figures: scalars on the device, the same number on every rank; read together, so a progress line waits once.

        Returns:
            On the main rank (rank or None for all, sentence) for each finding that the last call did not have; and the
            main rank's figures.
        """
        # `elapsed_time` is in milliseconds.
        self._seconds += sum(first.elapsed_time(last) for first, last in self._events) / 1000

        # Each rank fills its row; the sum over the ranks is the whole table.
        rows = torch.zeros(self.world.size, 2 + len(figures), dtype=torch.float64, device=self.world.device)
        steps = max(1, self._passes // len(self.shards.micro_batches))
        rows[self.world.rank, 0].fill_(data)  # a copy from the host would wait for the GPU's queue
        rows[self.world.rank, 1].fill_(self._seconds / steps)
        for place, figure in enumerate(figures, start=2):
            rows[self.world.rank, place].copy_(figure)

        self._seconds, self._passes = 0.0, 0
        self._events.clear()
        self._windows += 1

        table = self.world.sum_(rows).tolist()
        read = table[0][2:]
        if not self.world.is_main or self._windows == 1:  # the first window includes the start of the readers
            return [], read

        span = min(self.shards.group_size, self.shards.world)
        findings = find_stragglers([row[0] for row in table], [row[1] for row in table], step, span)

        # Report a finding when it appears, not at every line while it lasts.
        kinds = [kind for kind, _, _ in findings]
        is_new, self._reported = kinds != self._reported, kinds
        return [(rank, text) for _, rank, text in findings] if is_new else [], read


def find_stragglers(
    data: Sequence[float], forward: Sequence[float], step: float, span: int = 1
) -> list[tuple[str, int | None, str]]:
    """Return (kind, the rank or None for all, a sentence) for each finding that is worth a line.

    Args:
        data: each rank's wait for clips, seconds per step.
        forward: each rank's forward pass, seconds per step.
        step: duration of a step, seconds.
        span: neighbouring ranks that share BN groups. Their forward passes wait for each other, so they count as one.
    """
    findings: list[tuple[str, int | None, str]] = []
    waiting, computing = statistics.fmean(data), statistics.fmean(forward)

    if waiting > SHARE_OF_DATA * step:
        text = (
            f"reading delays training: a step of {step:.3f} s waits {waiting:.3f} s for clips, and its forward pass "
            f"takes {computing:.3f} s (mean of the ranks); raise workers, or read smaller files"
        )
        findings.append(("data", None, text))

    # One rank's readers are slow.
    slowest = _slowest(data, step)

    if slowest is not None:
        rank, others = slowest
        text = f"it waits {data[rank]:.3f} s per step for clips, the others {others:.3f} s, of {step:.3f} s"
        findings.append((f"data of {rank}", rank, text))
        return findings  # in a BN group the other ranks' forward passes wait for this rank

    # One rank's, or one BN group's, forward pass is slow.
    groups = [statistics.fmean(forward[first : first + span]) for first in range(0, len(forward), span)]
    slowest = _slowest(groups, step)
    if slowest is not None:
        group, others = slowest
        where = "" if span == 1 else f" (with the {span - 1} other ranks of its BN group)"
        text = (
            f"its forward pass takes {groups[group]:.3f} s per step{where}, "
            f"that of the others {others:.3f} s, of {step:.3f} s"
        )
        findings.append((f"forward of {group}", group * span, text))

    return findings


def _slowest(seconds: Sequence[float], step: float) -> tuple[int, float] | None:
    """Return the index of the largest value and the median of the others, or None if it does not stand out."""
    if len(seconds) < 2:
        return None

    largest = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median([value for index, value in enumerate(seconds) if index != largest])

    # Both limits: a ratio alone would report noise of short waits.
    factor, share = FAR_SLOWER
    stands_out = seconds[largest] > factor * others and seconds[largest] - others > share * step
    return (largest, others) if stands_out else None
