"""Handle media that cannot be read: count them, name them, and stop the run above a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from utils.errors import UserError
from utils.ledger import BadEvent

#: Substitutes that are tried for one clip before it is skipped.
MAX_SUBSTITUTES = 5
_NAMED = 5  # samples that `Ledger.summary` lists by name


def printable(path: str) -> str:
    """Return a path that any log accepts: bytes that are not UTF-8 become escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


class Ledger:
    """The read failures of this process. `utils/ledger.py` keeps the journal of all ranks.

    Args:
        videos: number of records, N.
        bad_budget: largest tolerated share of N. One bad sample is tolerated even if the share is below 1/N.
        policy: "error", "skip" or "substitute".
    """

    def __init__(self, videos: int, bad_budget: float, policy: str) -> None:
        self.samples: dict[int, list[BadEvent]] = {}
        self.policy = policy
        self.limit = max(1, int(bad_budget * videos))
        self.videos = videos
        self._events: list[BadEvent] = []

    def add(self, event: BadEvent) -> None:
        """Record a failure. Raise UserError under the policy "error", or if the budget is exceeded."""
        self.samples.setdefault(event.sample, []).append(event)
        self._events.append(event)

        if self.policy == "error":
            raise UserError(
                f"{event.path}: {event.reason}; repair or remove it, or set data.on_bad to substitute or skip"
            )

        # Count samples, not events: one bad file that fails in every epoch uses the budget once.
        if len(self.samples) > self.limit:
            raise UserError(
                f"{len(self.samples)} of {self.videos} videos cannot be read; data.bad_budget allows {self.limit}: "
                f"{self.summary()}"
            )

    def take_events(self) -> list[BadEvent]:
        """Return the failures since the last call."""
        events, self._events = self._events, []
        return events

    def summary(self) -> str:
        """Return one line with the number of failed samples and the ones that failed most often."""
        if not self.samples:
            return "no bad samples"

        worst = sorted(self.samples.items(), key=lambda item: (-len(item[1]), item[0]))[:_NAMED]
        named = "; ".join(f"{met[0].path} ({met[0].reason}, {len(met)}x)" for _, met in worst)
        more = len(self.samples) - len(worst)
        return f"{len(self.samples)} bad: {named}" + (f"; and {more} more" if more else "")


class Substitutes:
    """Choose a substitute for a sample: the next one of the same label in list order, cyclically.

    Args:
        labels: (N,) integer labels.
    """

    def __init__(self, labels: np.ndarray | Sequence[int]) -> None:
        self._labels = np.asarray(labels)

    def after(self, sample: int) -> int | None:
        """Return the next sample of the same label, or None if there is no other."""
        same = np.flatnonzero(self._labels == self._labels[sample])
        following = int(same[(np.searchsorted(same, sample) + 1) % len(same)])
        return None if following == sample else following
